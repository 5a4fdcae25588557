"""transformers' Swin and Swin v2: their windows, and the settings that version 1 changes permanently during a run."""

from functools import partial
from typing import Any

from torch import nn

from vitscope.attention.windows import Windows, merged_grid
from vitscope.grid import Grid
from vitscope.models.hierarchy import Hierarchy, Merging, Projection, WindowBlock, restore_attributes

_BLOCKS = ("SwinLayer", "Swinv2Layer")
_MERGINGS = ("SwinPatchMerging", "Swinv2PatchMerging")


def hierarchy(module: Any) -> Hierarchy:
    """Return the hierarchy of a Swin model with or without a head."""
    children = dict(module.named_modules())
    layers = {name: child for name, child in children.items() if type(child).__name__ in _BLOCKS}
    backbone: Any = getattr(module, module.base_model_prefix, module)
    classifier = getattr(module, "classifier", None)
    # Version 1 shrinks its windows to the grid during a run, except as a backbone; version 2 does so when it is built.
    first_version = any(type(layer).__name__ == "SwinLayer" for layer in layers.values())
    clamps = first_version and type(module).__name__ != "SwinBackbone"
    return Hierarchy(
        blocks={
            f"{name}.attention": WindowBlock(layer, partial(_windows, layer, clamps), _projection(layer))
            for name, layer in layers.items()
        },
        mergings={
            name: Merging(child, child.norm, child.reduction)
            for name, child in children.items()
            if type(child).__name__ in _MERGINGS
        },
        before_pooling=getattr(backbone, "layernorm", None),
        classifier=classifier if isinstance(classifier, nn.Linear) else None,
        why_unsupported=partial(_refusal, backbone, clamps),
        preserved_state=partial(restore_attributes, list(layers.values()), ("window_size", "shift_size")),
    )


def _windows(layer: Any, clamps: bool, grid: Grid) -> Windows:
    size, shift = layer.window_size, layer.shift_size
    if clamps and min(grid.height, grid.width) <= size:
        size, shift = min(grid.height, grid.width), 0
    return Windows((size, size), (shift, shift))


def _projection(layer: Any) -> Projection | None:
    if type(layer).__name__ != "SwinLayer":
        return None
    attention = layer.attention
    inputs = (attention.q_proj, attention.k_proj, attention.v_proj)
    return Projection(layer.layernorm_before, inputs, attention.o_proj, attention.num_attention_heads)


def _refusal(backbone: Any, clamps: bool, grid: Grid) -> str | None:
    """Return why transformers cannot run a grid (a position embedding or bias table does not fit); None if it can."""
    embeddings = backbone.embeddings
    patch = embeddings.patch_embeddings.patch_size[0]
    if embeddings.position_embeddings is not None and (grid.height, grid.width) != tuple(embeddings.patch_grid):
        rows, columns = embeddings.patch_grid
        return f"its position embedding fits {rows * patch}×{columns * patch} only"
    stages = list(backbone.encoder.layers)
    stage_grid = grid
    for stage in stages:
        for layer in stage.blocks if clamps else ():
            table = layer.attention.relative_position_bias.window_size[0]
            if layer.window_size != table:
                return (
                    f"its windows changed from {table} to {layer.window_size} tokens when it ran on a small image "
                    "outside vitscope: load it again"
                )
            if _windows(layer, clamps, stage_grid).size[0] != table:
                rows = (table - 1) * 2 ** (len(stages) - 1)
                return f"its windows of {table}×{table} tokens need at least {rows * patch + 1} pixels per side"
        stage_grid = merged_grid(stage_grid)
    return None
