"""A tiny seeded window transformer of every supported library, with facts about its blocks."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import vitscope as vs

Size = tuple[int, int]
Builder = Callable[[Size], nn.Module]

PATCH, WINDOW, CLASSES = 2, 4, 5
SHAPE: dict[str, Any] = {"embed_dim": 16, "depths": (2, 2, 2), "num_heads": (2, 4, 8), "window_size": WINDOW}

# Pixels. In tokens: 16×16; 18×18, 9×9 and 5×5, padded and odd; 16×28 to 4×7; 17×21, odd from the start.
SIZES: dict[str, Size] = {"fitting": (32, 32), "padded": (36, 36), "rectangular": (32, 56), "odd": (34, 42)}
SIZES["small"] = (12, 20)  # 6×10, 3×5 and 2×3: grids smaller than a window
SIZES["cut"] = (37, 43)  # the last patches extend beyond the image
LARGE = ("fitting", "padded", "rectangular", "odd")


class Parts(NamedTuple):
    """The value and output projections of a block: values are ``weight @ x + bias``, head after head."""

    norm: nn.Module | None  # before attention (Swin); None if it follows attention (Swin v2)
    weight: Tensor
    bias: Tensor
    out: nn.Linear
    heads: int
    result: nn.Module  # its input is the output of attention, or the sum of that and the block's input
    adds: bool  # True for the sum


@dataclass(frozen=True)
class SwinFamily:
    name: str  # library, version, variant
    build: Builder
    parts: Callable[[Any], Parts]
    block_types: tuple[str, ...]
    attention: str  # name of the block's attention module
    least: Size  # the smallest image that runs
    sized: bool = False  # built for each size that it runs on
    kinds: tuple[str, ...] = tuple(SIZES)
    fills_patches: bool = False  # the last patch is padded with zeros, not dropped
    noise: float = 0.2  # added to all weights

    @property
    def library(self) -> str:
        return self.name.split("-")[0]

    @property
    def sizes(self) -> dict[str, Size]:
        return {kind: SIZES[kind] for kind in self.kinds} | {"smallest": self.least}

    def model(self, size: Size = SIZES["fitting"]) -> vs.VisionModel:
        """Return the seeded model with noise on all weights, so that no bias, table or mask token is zero."""
        pytest.importorskip(self.library)
        torch.manual_seed(0)
        return vs.load(perturbed(self.build(size if self.sized else SIZES["fitting"]), self.noise))

    def grid(self, size: Size) -> vs.Grid:
        height, width = (-(-side // PATCH) if self.fills_patches else side // PATCH for side in size)
        return vs.Grid(height, width)

    def blocks(self, module: nn.Module) -> dict[str, Any]:
        """Return the module's blocks by path, in execution order."""
        return {name: child for name, child in module.named_modules() if type(child).__name__ in self.block_types}


def perturbed(module: nn.Module, scale: float) -> nn.Module:
    """Return the module in evaluation mode with noise on all parameters."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return module.eval()


def pixels(size: Size, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def from_hf(version: str, size: Size) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{version}Config")(**SHAPE, image_size=size, patch_size=PATCH, num_labels=CLASSES)
    return getattr(transformers, f"{version}ForImageClassification")(config)


def swin_of_timm(name: str, size: Size, **options: Any) -> nn.Module:
    import timm

    shape = SHAPE | {"img_size": size, "patch_size": PATCH, "num_classes": CLASSES}
    return timm.create_model(name, pretrained=False, **(shape | options))


def from_torchvision(version: int, _: Size) -> nn.Module:
    from torchvision.models import swin_transformer as library

    shape = {key: list(value) if isinstance(value, tuple) else value for key, value in SHAPE.items()}
    shape |= {"patch_size": [PATCH] * 2, "window_size": [WINDOW] * 2, "num_classes": CLASSES}
    second = {"block": library.SwinTransformerBlockV2, "downsample_layer": library.PatchMergingV2}
    return library.SwinTransformer(**shape, **(second if version == 2 else {}))


def maxvit(size: Size) -> nn.Module:
    import timm

    return timm.create_model("test_maxvit", img_size=size, num_classes=CLASSES)


def hf_parts(block: Any) -> Parts:
    value, attention = block.attention.v_proj, block.attention
    heads, after = attention.num_attention_heads, block.layernorm_after
    return Parts(block.layernorm_before, value.weight, value.bias, attention.o_proj, heads, after, True)


def hf_v2_parts(block: Any) -> Parts:
    inner, out = block.attention.self, block.attention.output.dense
    heads, after = inner.num_attention_heads, block.layernorm_before
    return Parts(None, inner.value.weight, inner.value.bias, out, heads, after, False)


def joint_parts(block: Any) -> Parts:
    """Return the parts of a block whose queries, keys and values come from one layer, in this order."""
    joint, attention = block.attn.qkv, block.attn
    weight, bias = joint.weight.chunk(3)[2], joint.bias.chunk(3)[2]
    return Parts(block.norm1, weight, bias, attention.proj, attention.num_heads, block.norm2, True)


def joint_v2_parts(block: Any) -> Parts:
    joint, attention = block.attn.qkv, block.attn
    bias = attention.v_bias if joint.bias is None else joint.bias.chunk(3)[2]
    return Parts(None, joint.weight.chunk(3)[2], bias, attention.proj, attention.num_heads, block.norm1, False)


def maxvit_parts(block: Any) -> Parts:
    """Return the parts of a block whose layer interleaves query, key and value of each head."""
    joint, attention = block.attn.qkv, block.attn
    by_head = (attention.num_heads, 3, -1)
    weight = joint.weight.unflatten(0, by_head)[:, 2].flatten(0, 1)
    bias = joint.bias.unflatten(0, by_head)[:, 2].flatten()
    return Parts(block.norm1, weight, bias, attention.proj, attention.num_heads, block.ls1, False)


timm_v1 = partial(swin_of_timm, "swin_tiny_patch4_window7_224")
timm_v2 = partial(swin_of_timm, "swinv2_tiny_window8_256")
DYNAMIC = {"strict_img_size": False}
SOME = ("fitting", "padded", "rectangular", "small")
HF_V2: dict[str, Any] = {"parts": hf_v2_parts, "block_types": ("Swinv2Layer",), "attention": "attention"}
TIMM: dict[str, Any] = {"parts": joint_parts, "block_types": ("SwinTransformerBlock",), "attention": "attn"}
TIMM_V2: dict[str, Any] = {"parts": joint_v2_parts, "block_types": ("SwinTransformerV2Block",), "attention": "attn"}

ALL = [
    SwinFamily(
        "transformers-swin",
        partial(from_hf, "Swin"),
        hf_parts,
        ("SwinLayer",),
        "attention",
        (25, 25),  # 13, 7 and 4 tokens: the last grid is one window
        kinds=(*LARGE, "cut"),
        fills_patches=True,
    ),
    SwinFamily("transformers-swinv2", partial(from_hf, "Swinv2"), least=(1, 1), fills_patches=True, **HF_V2),
    SwinFamily(
        "transformers-swinv2-sized",
        partial(from_hf, "Swinv2"),
        least=(8, 8),
        sized=True,
        kinds=("small",),
        fills_patches=True,
        **HF_V2,
    ),
    SwinFamily("timm-swin", timm_v1, least=(2, 2), sized=True, **TIMM),
    SwinFamily("timm-swin-dynamic", partial(timm_v1, **DYNAMIC), least=(2, 2), kinds=SOME, **TIMM),
    SwinFamily(
        "timm-swin-always",
        partial(timm_v1, always_partition=True),
        least=(2, 2),
        sized=True,
        kinds=("fitting", "small"),
        **TIMM,
    ),
    SwinFamily("timm-swinv2", timm_v2, least=(2, 2), sized=True, **TIMM_V2),
    SwinFamily("timm-swinv2-dynamic", partial(timm_v2, **DYNAMIC), least=(2, 2), kinds=SOME, **TIMM_V2),
    SwinFamily(
        "torchvision-swin", partial(from_torchvision, 1), joint_parts, ("SwinTransformerBlock",), "attn", (2, 2)
    ),
    SwinFamily(
        "torchvision-swinv2", partial(from_torchvision, 2), joint_v2_parts, ("SwinTransformerBlockV2",), "attn", (2, 2)
    ),
]

MAXVIT = SwinFamily(
    "timm-maxvit", maxvit, maxvit_parts, ("PartitionAttentionCl",), "attn", (64, 64), sized=True, noise=0.1
)

MAXVIT_SIZES: dict[str, Size] = {"fitting": (64, 64), "rectangular": (64, 96)}

every_swin = pytest.mark.parametrize("family", ALL, ids=lambda family: family.name)


each_size = pytest.mark.parametrize(
    ("family", "kind"), [pytest.param(f, kind, id=f"{f.name}-{kind}") for f in ALL for kind in f.sizes]
)


def family(name: str) -> SwinFamily:
    return next(family for family in ALL if family.name == name)
