"""Entropy and distance of heads: equal to plain loops, and right where the answer is known."""

import math

import pytest
import torch
from torch import Tensor

import vitscope as vs
from tests.helpers.families import ALL
from tests.reference.head_statistics import head_statistics as slow_statistics
from vitscope.attention.scores import Logits
from vitscope.attention.trace import AttentionStep, Trace

PREFIXES = {"timm-siglip": 0, "transformers-vit": 1, "timm-deit-distilled": 2, "transformers-dinov2-registers": 5}


@pytest.mark.parametrize(("name", "prefix"), PREFIXES.items())
@pytest.mark.parametrize("block_numbers", [1, 1 << 20], ids=["blocks", "one block"])
def test_the_slow_twin_agrees(name: str, prefix: int, block_numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitscope.attention.step.BLOCK_NUMBERS", block_numbers)
    family = next(family for family in ALL if family.name == name)
    model, pixels = family.model(), family.pixels()
    trace = vs.capture(model, pixels)
    for result in (vs.head_statistics(trace), vs.head_statistics(model, pixels)):
        assert result.layers == (0, 1, 2)
        assert result.entropy.shape == result.distance.shape == (2, 3, 4)
        for layer in range(3):
            for image, heads in enumerate(trace.attention(layer)):
                for head, attention in enumerate(heads):
                    expected = torch.tensor(slow_statistics(attention, 4, 6, prefix))
                    got = torch.stack([result.entropy[image, layer, head], result.distance[image, layer, head]])
                    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def trace_of(logits: Tensor, grid: vs.Grid) -> Trace:
    """A trace of one block with one head and these scores (token, token)."""
    slots = torch.arange(grid.num_tokens)[None]
    step = AttentionStep(0, "block", Logits(logits[None, None, None]), slots, grid)
    return Trace([step], 1, None, [])


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_uniform_attention(prefix: int) -> None:
    grid = vs.Grid(2, 3, prefix)
    result = vs.head_statistics(trace_of(torch.zeros(grid.num_tokens, grid.num_tokens), grid))
    assert result.entropy.item() == pytest.approx(math.log(grid.num_tokens), abs=1e-6)
    # Of 36 pairs 14 are neighbours, 8 diagonal, 4 two apart, 4 two apart in the next row, 6 the same patch.
    total = 14 + 8 * math.sqrt(2) + 4 * 2 + 4 * math.sqrt(5)
    assert result.distance.item() == pytest.approx(total / 36, abs=1e-6)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_attention_to_oneself(prefix: int) -> None:
    grid = vs.Grid(3, 2, prefix)
    result = vs.head_statistics(trace_of(1e4 * torch.eye(grid.num_tokens), grid))
    assert result.entropy.item() == 0
    assert result.distance.item() == 0


def test_attention_to_the_prefix_alone_has_no_distance() -> None:
    grid = vs.Grid(2, 2, 1)
    logits = torch.zeros(5, 5)
    logits[:, 0] = 1e4
    result = vs.head_statistics(trace_of(logits, grid))
    assert result.distance.item() == 0
    assert result.entropy.item() == 0


def test_distances_are_in_patches_on_the_grid() -> None:
    """From the first patch to each of the six, four prefix tokens before them."""
    for place, far in enumerate([0, 1, 2, 1, math.sqrt(2), math.sqrt(5)]):
        logits = torch.zeros(10, 10)
        logits[range(10), range(10)] = 1e4  # everyone looks at itself,
        logits[4, 4], logits[4, 4 + place] = 0, 1e4  # but the first patch
        result = vs.head_statistics(trace_of(logits, vs.Grid(2, 3, 4)))
        assert result.distance.item() == pytest.approx(far / 6, abs=1e-6)


def test_only_the_layers_of_the_trace() -> None:
    family = next(family for family in ALL if family.name == "timm-vit")
    model, pixels = family.model(), family.pixels()
    whole, part = vs.head_statistics(model, pixels), vs.head_statistics(vs.capture(model, pixels, layers=[0, -1]))
    assert part.layers == (0, 2)
    assert torch.equal(part.entropy, whole.entropy[:, [0, 2]])
    assert torch.equal(part.distance, whole.distance[:, [0, 2]])
