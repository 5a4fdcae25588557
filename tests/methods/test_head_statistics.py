"""Entropy and distance of heads: equal to plain loops, and correct in cases with a known result."""

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


@pytest.mark.slow
@pytest.mark.parametrize(("name", "prefix"), PREFIXES.items())
@pytest.mark.parametrize("block_numbers", [1, 1 << 20], ids=["blocks", "one block"])
def test_statistics_equal_the_slow_reference(
    name: str, prefix: int, block_numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
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
                    statistics = torch.stack([result.entropy[image, layer, head], result.distance[image, layer, head]])
                    torch.testing.assert_close(statistics, expected, atol=1e-5, rtol=1e-5)


def trace_of(logits: Tensor, grid: vs.Grid) -> Trace:
    """Return a trace of one block with one head and these scores (token, token)."""
    slots = torch.arange(grid.num_tokens)[None]
    step = AttentionStep(0, "block", Logits(logits[None, None, None]), slots, grid)
    return Trace([step], 1, None, [])


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_uniform_attention_has_the_maximal_entropy(prefix: int) -> None:
    grid = vs.Grid(2, 3, prefix)
    result = vs.head_statistics(trace_of(torch.zeros(grid.num_tokens, grid.num_tokens), grid))
    assert result.entropy.item() == pytest.approx(math.log(grid.num_tokens), abs=1e-6)
    # Of 36 pairs 14 are adjacent, 8 diagonal, 4 two apart, 4 two apart in the next row, 6 the same patch.
    total = 14 + 8 * math.sqrt(2) + 4 * 2 + 4 * math.sqrt(5)
    assert result.distance.item() == pytest.approx(total / 36, abs=1e-6)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_attention_to_the_query_itself_has_no_entropy_and_no_distance(prefix: int) -> None:
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
    """The first patch attends to each of the six patches; there are four prefix tokens."""
    for patch, distance in enumerate([0, 1, 2, 1, math.sqrt(2), math.sqrt(5)]):
        logits = torch.zeros(10, 10)
        logits[range(10), range(10)] = 1e4  # every token attends to itself,
        logits[4, 4], logits[4, 4 + patch] = 0, 1e4  # except the first patch
        result = vs.head_statistics(trace_of(logits, vs.Grid(2, 3, 4)))
        assert result.distance.item() == pytest.approx(distance / 6, abs=1e-6)


def test_only_captured_layers_are_included() -> None:
    family = next(family for family in ALL if family.name == "timm-vit")
    model, pixels = family.model(), family.pixels()
    complete, partial = vs.head_statistics(model, pixels), vs.head_statistics(vs.capture(model, pixels, layers=[0, -1]))
    assert partial.layers == (0, 2)
    assert torch.equal(partial.entropy, complete.entropy[:, [0, 2]])
    assert torch.equal(partial.distance, complete.distance[:, [0, 2]])
