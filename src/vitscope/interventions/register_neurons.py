"""Register neurons: the MLP channels that write the large norms of artefact tokens."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitscope.attention.tap import OnModule
from vitscope.display import ordinal
from vitscope.errors import CallError, UnsupportedModelError
from vitscope.interventions.artefacts import Artefacts, artefact_tokens, require_plain_blocks
from vitscope.models.blocks import Block
from vitscope.models.vision_model import VisionModel
from vitscope.tracing.capture import as_vision_model, run_and_capture
from vitscope.typing import Pixels
from vitscope.validation import require_at_least, require_finite_tensor, require_integer, require_number

Neuron = tuple[int, int]  # index of the block, and of a channel that enters the last linear layer of its MLP


def register_neurons(
    model: VisionModel | nn.Module,
    images: Any,
    *,
    threshold: float,
    layer: int = -1,
    highest: int | None = None,
    count: int = 10,
) -> list[Neuron]:
    """Find the MLP neurons that write the norms of artefact tokens.

    A neuron is a channel that enters the last linear layer of an MLP. Its score is the mean of its absolute activation
    on artefacts, less that on all other patches, times the norm of its weights in the linear layer. Neurons that are
    large everywhere have a low score, unlike in the paper, which ranks by the mean on artefacts alone.

    Reference: Vision Transformers Don't Need Trained Registers, Jiang et al., 2025 (arXiv 2506.08010).

    Args:
        model: as for :func:`vitscope.artefact_tokens`.
        images: as for :func:`vitscope.artefact_tokens`. They run one at a time, each twice.
        threshold: norm above which a patch is an artefact, as in ``vs.artefact_tokens(model, images).threshold``.
        layer: index of the block after which norms are compared with the threshold; negative indices count from the
            end. The default is the last block.
        highest: index of the last block that is searched, at most ``layer``; negative indices count from the end. The
            default is the block in which artefacts appear (:attr:`~vitscope.Artefacts.first_layer`), or ``layer`` if
            the norms have no valley.
        count: maximum number of neurons, at least 1.

    Returns:
        (block, neuron) of the neurons with the highest scores, the highest first.

    Raises:
        CallError: no patch, or every patch, is above the threshold; an option is out of range, or the images are not
            valid.
        ImageError: an image file cannot be read.
        UnsupportedModelError: as for :func:`vitscope.artefact_tokens`.
        WorkError: the model fails on the input, or its activations are NaN or infinite.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> len(vs.register_neurons(vs.load("vit-nano"), skimage.data.chelsea(), threshold=120.0, count=3))
        3
    """
    vision = as_vision_model(model)
    if threshold is None:
        raise CallError("threshold is None, so there are no artefacts and no register neurons: a norm is expected")
    threshold, count = require_number(threshold, "threshold"), require_at_least(1, count, "count")
    layers, _ = require_plain_blocks(vision, "register neurons")
    pixels, _ = vision.prepare(images)
    artefacts = artefact_tokens(vision, pixels, layer=layer)
    norms = artefacts.norms[:, artefacts.layer, artefacts.grid.prefix :]
    above = norms > threshold
    if not bool(above.any()) or bool(above.all()):
        raise CallError(
            f"threshold {threshold:g} is {'below' if bool(above.all()) else 'above'} the norms of all patches after "
            f"{ordinal('block', artefacts.layer)} ({float(norms.min()):.4g} to {float(norms.max()):.4g}): pass "
            "artefact_tokens(model, images).threshold, or other images"
        )
    searched = layers[: _last_block(artefacts, highest) + 1]
    scores = _scores(vision, [output_layer(block, vision.name) for block in searched], pixels, above)
    neurons = [(block, neuron) for block, values in enumerate(scores) for neuron in range(len(values))]
    order = require_finite_tensor(torch.cat(scores), "activations").argsort(descending=True, stable=True)
    return [neurons[index] for index in order[:count].tolist()]


def output_layer(block: Block, name: str) -> nn.Linear:
    """Return the last linear layer of a block's MLP.

    Args:
        block: the block.
        name: name of the model, for the error message.

    Raises:
        UnsupportedModelError: the MLP does not end in a linear layer.
    """
    inside = set(block.attention.modules())
    linears = [child for child in block.module.modules() if isinstance(child, nn.Linear) and child not in inside]
    if not linears or linears[-1].out_features != block.width:
        raise UnsupportedModelError(
            f"the MLP of {block.path} in {name} does not end in a linear layer of {block.width} outputs, so its "
            "neurons are unknown"
        )
    return linears[-1]


def _last_block(artefacts: Artefacts, highest: int | None) -> int:
    """Return the index of the last block to search."""
    if highest is None:
        return artefacts.layer if artefacts.first_layer is None else artefacts.first_layer
    length = artefacts.norms.shape[1]
    index = require_integer(highest, "highest")
    if not -length <= index < length or index % length > artefacts.layer:
        raise CallError(
            f"highest is {index}, a block from 0 to {artefacts.layer} is expected: artefacts after block "
            f"{artefacts.layer} are not written later"
        )
    return index % length


def _scores(
    model: VisionModel, linears: Sequence[nn.Linear], pixels: Pixels, above: Bool[Tensor, "image patch"]
) -> list[Float[Tensor, " neuron"]]:
    """Return the score of every neuron that enters these layers, one tensor per layer."""
    sums = [torch.zeros(2, linear.in_features, dtype=torch.float64, device="cpu") for linear in linears]

    def record(sums: Tensor, above: Bool[Tensor, " patch"], activations: Tensor, _: Tensor) -> None:
        patches = activations.detach()[0, -len(above) :].abs().double().cpu()
        sums += torch.stack([patches[above].sum(0), patches[~above].sum(0)])

    for image, places in zip(pixels, above, strict=True):
        watch: dict[nn.Module, OnModule] = {
            linear: partial(record, total, places) for linear, total in zip(linears, sums, strict=True)
        }
        run_and_capture(model, image[None], layers=[0], watch=watch)
    artefacts, others = int(above.sum()), int((~above).sum())
    return [
        (total[0] / artefacts - total[1] / others)
        * torch.linalg.vector_norm(linear.weight.detach().double(), dim=0).cpu()
        for linear, total in zip(linears, sums, strict=True)
    ]
