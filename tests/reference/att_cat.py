"""AttCAT (Qiang et al., 2022) in float64, one image, block, head and token at a time.

It does not use vitscope.
"""

import math

import torch
from torch import Tensor

from tests.reference.block_streams import Streams, gradients
from tests.reference.swin_rollout import Block, Merge, Story


def att_cat(run: Streams, readout: Tensor, target: int, start_layer: int = 0) -> Tensor:
    """Return (batch, token) of a plain ViT; the arguments are those of the reference of TokenTM."""
    slopes = gradients(run, run.outputs, target)
    total = torch.zeros_like(readout, dtype=torch.float64)
    for layer in range(start_layer, len(run.maps)):
        for image in range(len(readout)):
            heads = run.maps[layer][image].detach()
            for token in range(readout.shape[1]):
                impact = float(run.outputs[layer][image, token].detach() @ slopes[layer][image, token])
                scores = [float(readout[image].double() @ head[:, token]) * impact for head in heads]
                total[image, token] += sum(scores) / len(scores)
    return total


def windowed_att_cat(story: Story, run: Streams, target: int) -> Tensor:
    """Return (batch, token) of a Swin: each block's values are spread over its finest patches in equal shares."""
    slopes, results = gradients(run, run.outputs, target), []
    for image in range(len(run.output)):
        row = story.readout(image, None)[:-1]
        layer, values = len(run.maps) - 1, torch.zeros(len(row), dtype=torch.float64)
        for step in reversed(story.steps):
            if isinstance(step, Merge):
                matrix = step.matrix(image, "equal")[:-1, :-1]
                row, values = row @ matrix, values @ matrix
                continue
            maps = run.maps[layer].detach().unflatten(0, (len(run.output), -1))
            heads, _ = Block(maps, step.grid, step.size, step.shift, step.roll_first).dense(image)
            attention = row @ heads.mean(0)[:, : math.prod(step.grid)]
            output, slope = (tensor[layer][image].flatten(0, -2) for tensor in (run.outputs, slopes))
            values = values + attention * (output.detach() * slope).sum(-1)
            layer -= 1
        results.append(values)
    return torch.stack(results)
