"""Artefact tokens: patches whose norm is a multiple of all others', which large transformers use as registers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitscope.attention.step import require_index
from vitscope.attention.tap import OnModule
from vitscope.display import Drawn, one_line, ordinal
from vitscope.errors import UnsupportedModelError
from vitscope.grid import Grid
from vitscope.images.image import InputImage
from vitscope.interventions.norm_valley import norm_valley
from vitscope.models.blocks import Block, blocks
from vitscope.models.vision_model import VisionModel
from vitscope.tracing.capture import as_vision_model, run_and_capture
from vitscope.typing import Maps, Pixels
from vitscope.validation import require_finite_tensor

REGISTER_PREFIXES = ("register_", "test_register_")  # of the names of register tokens


@dataclass(frozen=True, eq=False, repr=False)
class Artefacts(Drawn):
    """The norms of a model's tokens, and the artefact tokens among its patches.

    Attributes:
        norms: float32 (image, layer, token), Euclidean norm of the residual stream after every block, on the CPU.
        thresholds: for each layer the norm in the valley between ordinary patches and artefacts; None if there is no
            valley.
        layer: index of the block whose output is searched for artefacts, from 0.
        places: bool (image, height, width), patches whose norm is above the threshold of ``layer``, on the CPU.
        attention: float32 (image, height, width), attention of ``query`` to the patches in block ``layer``, mean of its
            heads, on the CPU; None if the tokens that the classifier reads are unknown.
        query: ``"cls"``, or ``"readout"`` for a model without a CLS token.
        registers: names of the model's register tokens, test-time registers included, in order.
        register_attention: float32 (image, register, height, width), attention of each register to the patches in block
            ``layer``, mean of its heads, on the CPU.
        grid: token grid.
        images: the photos.
        model: name of the model.
    """

    norms: Float[Tensor, "image layer token"]
    thresholds: tuple[float | None, ...]
    layer: int
    places: Bool[Tensor, "image height width"]
    attention: Maps | None
    query: str
    registers: tuple[str, ...]
    register_attention: Float[Tensor, "image register height width"]
    grid: Grid
    images: Sequence[InputImage]
    model: str

    @property
    def threshold(self) -> float | None:
        """The norm above which a patch is an artefact after block ``layer``; None if there is no valley."""
        return self.thresholds[self.layer]

    @property
    def share(self) -> float:
        """The share of patches that are artefacts, over all images, from 0 to 1."""
        return float(self.places.float().mean())

    @property
    def attention_share(self) -> float | None:
        """The share of the query's attention that falls on artefacts, mean over images; None if unknown."""
        return None if self.attention is None else float((self.attention * self.places).sum((1, 2)).mean())

    @property
    def first_layer(self) -> int | None:
        """The first block after which at least half of the artefacts lie above a valley; None without artefacts."""
        tokens = self.places.flatten(1)
        for layer, threshold in enumerate(self.thresholds[: self.layer + 1]):
            if threshold is not None and bool(tokens.any()):
                above = self.norms[:, layer, self.grid.prefix :] > threshold
                if float(above[tokens].float().mean()) >= 0.5:
                    return layer
        return None

    @property
    def summary(self) -> str:
        """The result in one line."""
        if self.threshold is None:
            patches = self.norms[:, self.layer, self.grid.prefix :]
            ratio = float(patches.max() / patches.median())
            block = ordinal("block", self.layer)
            return f"no valley between the norms after {block}, highest {ratio:.2g} × median: no artefacts"
        reader = "CLS" if self.query == "cls" else "the readout"
        attention = (
            "" if self.attention_share is None else f" and {self.attention_share:.1%} of the attention of {reader}"
        )
        first = "" if self.first_layer is None else f", from {ordinal('block', self.first_layer)} on"
        return (
            f"artefacts are {self.share:.2%} of patches{attention}: norm above {self.threshold:.4g} after "
            f"{ordinal('block', self.layer)}{first}"
        )

    def __repr__(self) -> str:
        return one_line(f"Artefacts of {self.model}: {self.summary}")


def artefact_tokens(model: VisionModel | nn.Module, images: Any, *, layer: int = -1) -> Artefacts:
    """Find the patches whose norm is a multiple of all others'.

    Large transformers that were trained for long store global information in a few patches of plain regions. These
    artefacts have large norms and attract attention, so maps show them although nothing is there. The threshold is
    derived from the norms of all patches of all images: see
    :func:`~vitscope.interventions.norm_valley.norm_valley`. Norms without a valley have no artefacts; pass several
    images, because at least 10 artefacts are needed.

    Reference: Vision Transformers Need Registers, Darcet et al., 2024 (arXiv 2309.16588).

    Args:
        model: from :func:`vitscope.load`, or a live module. All of its blocks have the same token grid.
        images: a path, a PIL image, a uint8 array (height, width, 3), a list of these, or a preprocessed tensor
            (batch, channel, height, width). They run one at a time.
        layer: index of the block whose output is searched, from 0; negative indices count from the end. The default is
            the last block, before the last norm.

    Returns:
        The norms after every block, the threshold and the artefacts.

    Raises:
        CallError: the layer is out of range, or the images are not valid.
        ImageError: an image file cannot be read.
        UnsupportedModelError: the model is a window transformer, or its token grid or blocks are unknown.
        WorkError: the model fails on the input, or its norms are NaN or infinite.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> artefacts = vs.artefact_tokens(vs.load("vit-nano"), skimage.data.chelsea())
        >>> artefacts
        <Artefacts of vit-nano: no valley between the norms after block 6 (index 5), highest 1.1 × median: no artefacts>
        >>> artefacts.threshold, artefacts.norms.shape, artefacts.places.shape
        (None, torch.Size([1, 6, 65]), torch.Size([1, 8, 8]))
    """
    vision = as_vision_model(model)
    layers, prefix_names = require_plain_blocks(vision, "artefact tokens")
    layer = require_index(layer, len(layers), "layer", "the model") % len(layers)
    pixels, views = vision.prepare(images)
    query = "cls" if "cls" in prefix_names else "readout"
    registers = tuple(name for name in prefix_names if name.startswith(REGISTER_PREFIXES))
    norms, maps, register_maps = zip(
        *(_norms_and_maps(vision, layers, image[None], layer, query, registers) for image in pixels), strict=True
    )
    assert vision.layout is not None
    grid = vision.layout.grid(*pixels.shape[-2:])
    all_norms = torch.stack(norms)
    patches = all_norms[:, :, grid.prefix :]
    thresholds = tuple(norm_valley(patches[:, index].flatten().numpy()) for index in range(len(layers)))
    threshold = thresholds[layer]
    return Artefacts(
        norms=all_norms,
        thresholds=thresholds,
        layer=layer,
        places=grid.patches(all_norms[:, layer] > (float("inf") if threshold is None else threshold)),
        attention=None if any(attention is None for attention in maps) else torch.cat(maps),
        query=query,
        registers=registers,
        register_attention=torch.stack(register_maps),
        grid=grid,
        images=views,
        model=vision.name,
    )


def require_plain_blocks(model: VisionModel, feature: str) -> tuple[list[Block], tuple[str, ...]]:
    """Return the blocks of a model whose blocks all have the same tokens, and the names of its prefix tokens.

    Args:
        model: the model.
        feature: what needs them, as the plural subject of the error message.

    Raises:
        UnsupportedModelError: the model is a window transformer, or its tokens are unknown.
        UnknownModelError: its blocks are unknown.
    """
    if model.layout is None:
        raise UnsupportedModelError(
            f"{feature} are not supported for {model.name}, whose tokens are unknown: pass patch_size to vitscope.load"
        )
    if model.layout.hierarchy is not None:
        raise UnsupportedModelError(
            f"{feature} are not supported for {model.name}, a window transformer: pass a model whose blocks all attend "
            "among the same tokens"
        )
    return blocks(model.module.get_submodule(model.backbone)), model.layout.prefix_names


def _norms_and_maps(
    model: VisionModel, layers: Sequence[Block], pixels: Pixels, layer: int, query: str, registers: Sequence[str]
) -> tuple[Float[Tensor, "layer token"], Maps | None, Float[Tensor, "register height width"]]:
    """Return the norms of an image's tokens after every block, and the attention of tokens in one block.

    The attention is that of the query, None if it is unknown, and that of each register.
    """
    norms: list[Tensor] = []

    def record(_: Tensor, output: Any) -> None:
        stream = output[0] if isinstance(output, tuple) else output
        norms.append(torch.linalg.vector_norm(stream.detach().float(), dim=-1)[0].cpu())

    watch: dict[nn.Module, OnModule] = {block.module: record for block in layers}
    trace = run_and_capture(model, pixels, layers=[layer], watch=watch).trace
    num_tokens = trace.step(layer).require_grid().num_tokens
    if len(norms) != len(layers) or any(norm.shape != (num_tokens,) for norm in norms):
        shapes = ", ".join(sorted({"×".join(map(str, norm.shape)) for norm in norms}))
        raise UnsupportedModelError(
            f"the {len(layers)} blocks of {model.name} returned {len(norms)} streams of {shapes} tokens: each is "
            f"expected to return its {num_tokens} tokens once"
        )
    attention = None if query == "readout" and trace.readout is None else trace.map(layer, "mean", query).cpu()
    grid = trace.step(layer).require_grid()
    maps = [trace.map(layer, "mean", name)[0].cpu() for name in registers]
    register_maps = torch.stack(maps) if maps else torch.zeros(0, grid.height, grid.width, device="cpu")
    return require_finite_tensor(torch.stack(norms), "norms"), attention, register_maps
