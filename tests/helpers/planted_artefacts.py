"""A tiny DINOv2 in which one neuron writes artefact tokens that attract the attention of CLS."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import vitscope as vs
from tests.helpers.families import ALL
from vitscope.models.blocks import blocks

BLOCK, NEURON = 1, 7
PLAIN = ((0, 3), (2, 5), (4, 9), (6, 1))  # patches of every image without texture
SIZE = (64, 96)  # pixels, 8 × 12 patches


@dataclass(frozen=True)
class Planted:
    """A model with a planted neuron, images, and the patches at which the neuron fires."""

    model: vs.VisionModel
    pixels: Tensor
    places: Tensor


def planted(family: str = "transformers-dinov2-registers", batch: int = 4) -> Planted:
    """Return the model and noise images, each with four plain patches."""
    model = next(each for each in ALL if each.name == family).model()
    pixels = torch.randn(batch, 3, *SIZE, generator=torch.Generator("cpu").manual_seed(3))
    places = torch.zeros(batch, SIZE[0] // 8, SIZE[1] // 8, dtype=torch.bool)
    for row, column in PLAIN:
        pixels[:, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = 1.0
        places[:, row, column] = True
    plant(model, pixels, places, block=BLOCK, neuron=NEURON)
    return Planted(model, pixels, places)


def plant(
    model: vs.VisionModel, pixels: Tensor, places: Tensor, *, block: int, neuron: int, length: float = 20.0
) -> None:
    """Change a neuron so that it writes artefacts of about this length at these patches (image, height, width)."""
    source, final = blocks(model.module)[block], blocks(model.module)[-1]
    first, last = [child for child in source.module.mlp.modules() if isinstance(child, nn.Linear)]
    norm = next(child for child in final.module.children() if isinstance(child, nn.LayerNorm))
    inputs, queries = [], []
    handles = [
        first.register_forward_pre_hook(lambda _, args: inputs.append(args[0])),
        final.attention.register_forward_pre_hook(lambda _, args: queries.append(args[0][:, 0])),
    ]
    with torch.no_grad(), model.running():
        model.logits_or_none(pixels)
    for handle in handles:
        handle.remove()
    prefix = len(model.layout.prefix_names)
    with torch.no_grad():
        # The neuron fires where the MLP's input is that of plain patches, and nowhere else.
        patches = inputs[0][:, prefix:]
        plain, others = patches[places.flatten(1)], patches[~places.flatten(1)]
        direction = torch.linalg.lstsq(
            torch.cat([plain, others]) - others.mean(0),
            torch.cat([torch.ones(len(plain)), torch.zeros(len(others))])[:, None],
        ).solution[:, 0]
        scale = 40 / ((plain - others.mean(0)) @ direction).mean()
        first.weight[neuron] = direction * scale
        first.bias[neuron] = -(others.mean(0) @ direction) * scale - 20
        # It writes what the query of CLS in the last block looks for.
        query = final.attention.q_proj(queries[0]).mean(0)
        wanted = final.attention.k_proj.weight.mT @ query / norm.weight
        last.weight[:, neuron] = wanted / wanted.norm() * (length / 20)
