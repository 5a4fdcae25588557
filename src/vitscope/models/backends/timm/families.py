"""timm: the tokens of each family of vision transformers, and those that its head reads."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from vitscope.attention.windows import Windows
from vitscope.grid import Grid
from vitscope.models.hierarchy import Hierarchy, Merging, Projection, WindowBlock
from vitscope.models.layout import Layout

# Classes whose tokens are the prefix, then the patches row by row.
_PLAIN = {"VisionTransformer", "VisionTransformerDistilled", "Eva", "Beit"}

_SWIN = {"SwinTransformer", "SwinTransformerV2"}
_SWIN_BLOCKS = ("SwinTransformerBlock", "SwinTransformerV2Block")

_MAXVIT = "MaxxVit"
_MAXVIT_BLOCK = "PartitionAttentionCl"
# The stem has a stride of 2; each stage halves the grid once more before it attends.
_MAXVIT_STEM = (2, 2)


def token_layout(module: Any) -> Layout | None:
    """Return the tokens of a module; None for a class that vitscope does not know."""
    names = {cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("timm.")}
    if names & _SWIN:
        return Layout(tuple(module.patch_embed.patch_size), (), {"patches": 1.0}, _swin(module))
    if _MAXVIT in names:
        hierarchy = _maxvit(module)
        return None if hierarchy is None else Layout(_MAXVIT_STEM, (), {"patches": 1.0}, hierarchy)
    return _plain_layout(module) if names & _PLAIN else None


def _swin(module: Any) -> Hierarchy:
    """Return the hierarchy of Swin or Swin v2: every stage but the first begins with patch merging."""
    head = getattr(module.head, "fc", None)
    averages = getattr(getattr(module.head, "global_pool", None), "pool_type", "") == "avg"
    return Hierarchy(
        blocks={
            f"{name}.attn": WindowBlock(block, partial(_windows, block), _projection(block))
            for name, block in module.named_modules()
            if type(block).__name__ in _SWIN_BLOCKS
        },
        mergings={
            name: Merging(child, child.norm, child.reduction)
            for name, child in module.named_modules()
            if type(child).__name__ == "PatchMerging"
        },
        before_pooling=module.norm,
        classifier=head if averages and isinstance(head, nn.Linear) else None,
    )


def _windows(block: Any, _: Grid) -> Windows:
    return Windows(block.window_size, block.shift_size, roll_first=True)


def _projection(block: Any) -> Projection | None:
    if type(block).__name__ != "SwinTransformerBlock":
        return None
    return Projection(block.norm1, (block.attn.qkv,), block.attn.proj, block.attn.num_heads)


def _maxvit(module: Any) -> Hierarchy | None:
    """Return the hierarchy of MaxViT: windows, then dilated windows; strided convolutions between the stages.

    The result is None for CoAtNet, which shares the class but has no windows.
    """
    blocks = {
        f"{name}.attn": WindowBlock(block, partial(_partition, block))
        for name, block in module.named_modules()
        if type(block).__name__ == _MAXVIT_BLOCK
    }
    return Hierarchy(blocks, downsampling=[stage.blocks[0].conv for stage in module.stages]) if blocks else None


def _partition(block: Any, _: Grid) -> Windows:
    return Windows(tuple(block.partition_size), dilated=not block.partition_block)


def _plain_layout(module: Any) -> Layout:
    names = []
    if getattr(module, "cls_token", None) is not None:
        names.append("cls")
    if getattr(module, "dist_token", None) is not None:
        names.append("distillation")
    names += [f"register_{i + 1}" for i in range(module.num_prefix_tokens - len(names))]
    pads = bool(getattr(module.patch_embed, "dynamic_img_pad", False))
    return Layout(_patch_size(module.patch_embed), tuple(names), _readout(module), partial_patches=pads)


def _patch_size(embed: Any) -> tuple[int, int]:
    """Return the height and width of a token in pixels; for a hybrid, this includes the stride of its stem."""
    ratio: Any = embed.feat_ratio(as_scalar=False) if hasattr(embed, "feat_ratio") else embed.patch_size
    return tuple(ratio) if isinstance(ratio, list | tuple) else (ratio, ratio)


def _readout(module: Any) -> Mapping[str, float]:
    """Return the weights of the tokens that the head reads."""
    if hasattr(module, "head_dist"):
        return {"cls": 0.5, "distillation": 0.5}
    pool = module.global_pool
    if pool in ("map", "prr"):
        return {"pooling": 1.0}
    if pool == "token":
        return {"cls": 1.0}
    if pool in ("avg", "avgmax", "max"):
        # A maximum reads one patch per channel; the weights over tokens that come closest are the mean over patches.
        return {"tokens": 1.0} if getattr(module, "pool_include_prefix", False) else {"patches": 1.0}
    return {"cls": 1.0} if getattr(module, "cls_token", None) is not None else {"patches": 1.0}
