"""TokenTM (2403.14552) as a product of dense matrices in float64, one image and one token at a time.

It does not use vitscope.
"""

import math

import torch
from torch import Tensor

from tests.reference.block_streams import Streams, gradients
from tests.reference.swin_rollout import Block, Merge, Story


def transformation(before: Tensor, after: Tensor) -> Tensor:
    """Return the diagonal matrix W of one image's tokens, from (token, channel) before and after a half of a block."""
    ratios, exponentials = [], []
    for e, changed in zip(before.flatten(0, -2).tolist(), after.flatten(0, -2).tolist(), strict=True):
        length, new = math.sqrt(sum(x * x for x in e)), math.sqrt(sum(x * x for x in changed))
        ratios.append(new / length)
        exponentials.append(math.exp(sum(x * y for x, y in zip(e, changed, strict=True)) / (length * new)))
    weights = [ratio * exponential / sum(exponentials) for ratio, exponential in zip(ratios, exponentials, strict=True)]
    return torch.diag(torch.tensor(weights, dtype=torch.float64))


def token_tm(run: Streams, readout: Tensor, target: int, start_layer: int = 0) -> Tensor:
    """Return (batch, token): the readout times the contribution map, which grows from the first block to the last.

    Args:
        run: a run of a plain ViT.
        readout: (batch, token), the shares of the tokens that the classifier reads.
        target: index of the output.
        start_layer: index of the first block.
    """
    slopes = gradients(run, run.maps, target)
    results = []
    for image, row in enumerate(readout.double()):
        contributions = torch.diag(run.inputs[start_layer][image].norm(dim=-1))
        for layer in range(start_layer, len(run.maps)):
            inputs, middle, output = (s[layer][image] for s in (run.inputs, run.middles, run.outputs))
            mixed = run.maps[layer][image].mean(0) @ transformation(inputs, middle)
            update = mixed * slopes[layer][image].clamp(min=0).mean(0)
            contributions = contributions + update @ contributions
            contributions = contributions + transformation(middle, output) @ contributions
        results.append(row @ contributions)
    return torch.stack(results).detach()


def windowed_token_tm(story: Story, run: Streams, target: int) -> Tensor:
    """Return (batch, token) of a Swin: windows as dense matrices, patch merging in equal shares, no padding.

    Args:
        story: a plain run of the same images.
        run: a run of the same module, whose maps are (batch · window, head, query, key).
        target: index of the output.
    """
    slopes, results = gradients(run, run.maps, target), []
    for image in range(len(run.output)):
        contributions = torch.diag(run.inputs[0][image].flatten(0, -2).norm(dim=-1))
        layers = iter(range(len(run.maps)))
        for step in story.steps:
            if isinstance(step, Merge):
                contributions = step.matrix(image, "equal")[:-1, :-1] @ contributions
                continue
            layer = next(layers)
            inputs, middle, output = (s[layer][image] for s in (run.inputs, run.middles, run.outputs))
            tokens = math.prod(step.grid)
            attention, slope = (
                Block(values.unflatten(0, (len(run.output), -1)), step.grid, step.size, step.shift, step.roll_first)
                .dense(image)[0]
                .mean(0)[:, :tokens]
                for values in (run.maps[layer], slopes[layer].clamp(min=0))
            )
            update = (attention @ transformation(inputs, middle)) * slope
            contributions = contributions + update @ contributions
            contributions = contributions + transformation(middle, output) @ contributions
        results.append(story.readout(image, None)[:-1] @ contributions)
    return torch.stack(results).detach()
