"""Attention flow: equal to networkx on the graph of the paper, its laws, and its refusals."""

from typing import Any

import pytest
import torch
from torch import Tensor

import vitscope as vs
from tests.helpers import swin_families
from tests.helpers.families import Family, every_family
from tests.helpers.swin_families import SwinFamily, every_swin
from tests.reference import attention_flow as slow
from tests.reference.attention import attention as library_attention
from tests.reference.swin_rollout import Block, story
from vitscope.attention.scores import StoredWeights
from vitscope.attention.trace import AttentionStep, Trace


def trace_of(blocks: list[Tensor], readout: Tensor, grid: vs.Grid) -> Trace:
    """Return a trace of these attention matrices, (head, token, token) each, with one image."""
    slots = torch.arange(grid.num_tokens)[None]
    steps = [
        AttentionStep(layer, f"block {layer}", StoredWeights(weights[None, None]), slots, grid)
        for layer, weights in enumerate(blocks)
    ]
    return Trace(steps, len(steps), readout[None], [], prefix_names=("cls",) * grid.prefix)


def random_blocks(tokens: int, layers: int, heads: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(4 * torch.randn(heads, tokens, tokens, generator=generator)).softmax(-1) for _ in range(layers)]


def cls(tokens: int) -> Tensor:
    return torch.eye(tokens)[0]


@pytest.mark.parametrize("head_fusion", ["mean", "max", "min"])
@pytest.mark.parametrize("pooled", [False, True], ids=["cls", "several tokens"])
@pytest.mark.parametrize("start_layer", [0, 1, -1])
def test_flow_equals_networkx(head_fusion: Any, pooled: bool, start_layer: int) -> None:
    grid, blocks = vs.Grid(2, 3, 1), random_blocks(7, 3)
    readout = torch.tensor([0, 0.3, 0.1, 0.1, 0.1, 0.2, 0.2]) if pooled else cls(7)
    result = vs.attention_flow(trace_of(blocks, readout, grid), head_fusion=head_fusion, start_layer=start_layer)
    matrices = [slow.with_residual(block, head_fusion) for block in blocks[start_layer:]]
    expected = slow.flow(matrices, readout, range(1, 7)).view(1, 2, 3)
    assert float(expected.min()) < 0.95  # not all at the capacity of the readout
    torch.testing.assert_close(result.values.double(), expected, atol=2e-7, rtol=0)
    assert result.provenance["parameters"] == {"head_fusion": head_fusion, "start_layer": start_layer % 3}
    assert 0 <= result.provenance["max_error"] < 1e-6


def one_hot(*keys: int) -> Tensor:
    return torch.eye(len(keys))[list(keys)][None]


def test_flow_follows_the_only_path() -> None:
    """CLS attends to patch 2 in the last block, which attends to patch 4 in the first: both edges have capacity ½."""
    first, last = one_hot(0, 1, 4, 3, 4), one_hot(2, 1, 2, 3, 4)
    result = vs.attention_flow(trace_of([first, last], cls(5), vs.Grid(2, 2, 1)))
    assert result.values.flatten().tolist() == [0, 0.5, 0, 0.5]


def test_a_patch_gets_all_of_its_paths_up_to_the_share_of_the_readout() -> None:
    """Two of four averaged patches attend to the third, which gets their halves and its own share."""
    block = one_hot(2, 2, 2, 3)
    result = vs.attention_flow(trace_of([block], torch.full((4,), 0.25), vs.Grid(2, 2)))
    # Each of the first two has a share of ¼ and an edge of ½ to the third, and an edge of ½ to itself.
    assert result.values.flatten().tolist() == [0.25, 0.25, 0.75, 0.25]


def test_one_block_gives_its_own_row() -> None:
    blocks = random_blocks(7, 1)
    result = vs.attention_flow(trace_of(blocks, cls(7), vs.Grid(2, 3, 1)))
    torch.testing.assert_close(result.values.flatten(), blocks[0].mean(0)[0, 1:] / 2, atol=1e-7, rtol=0)


def bounds(matrices: list[Tensor], readout: Tensor) -> tuple[Tensor, Tensor]:
    """Return the flow of rollout, which is possible, and the least of some cuts: between levels and at each patch."""
    row = readout.double()
    for matrix in reversed(matrices):
        row = row @ matrix
    return row, matrices[0].sum(0).clamp_max(float(readout.double().sum()))


def check_laws(values: Tensor, matrices: list[Tensor], readout: Tensor, prefix: int) -> None:
    least, most = (bound[prefix:] for bound in bounds(matrices, readout))
    flows = values.flatten().double()
    assert bool((flows >= least - 1e-6).all())
    assert bool((flows <= most + 1e-6).all())


@pytest.mark.slow
@every_family
def test_flow_of_every_family(family: Family) -> None:
    model, pixels = family.model(), family.pixels()
    trace = vs.capture(model, pixels)
    readout = trace.readout
    assert readout is not None
    result = vs.attention_flow(model, pixels)
    maps = library_attention(model.module, pixels)
    for image in range(2):
        matrices = [slow.with_residual(layer[image]) for layer in maps]
        check_laws(result.values[image], matrices, readout[image], family.grid.prefix)
        alone = vs.attention_flow(model, pixels[image : image + 1]).values[0]
        torch.testing.assert_close(result.values[image], alone, atol=2e-6, rtol=0)
    expected = slow.flow(matrices[-1:], readout[1], range(family.grid.prefix, family.grid.num_tokens)).view_as(alone)
    last = vs.attention_flow(model, pixels, start_layer=-1)
    torch.testing.assert_close(last.values[1].double(), expected, atol=2e-6, rtol=0)
    assert result.provenance["method"] == "attention_flow"
    torch.testing.assert_close(vs.attention_flow(trace).values, result.values, atol=2e-6, rtol=0)


@pytest.mark.slow
@every_swin
def test_flow_through_windows_and_merging(family: SwinFamily) -> None:
    size = swin_families.SIZES["small"]
    model, pixels, grid = family.model(size), swin_families.pixels(size), family.grid(size)
    if "small" not in family.kinds:
        size = (25, 25)
        pixels, grid = swin_families.pixels(size), family.grid(size)
    trace = vs.capture(model, pixels)
    twin = story(model.module, pixels, (grid.height, grid.width))
    assert trace.readout is not None
    result = vs.attention_flow(trace, head_fusion="max")
    for image in range(2):
        matrices = [
            (step.matrix(image, "max", 0.0, True) if isinstance(step, Block) else step.matrix(image, "equal"))[:-1, :-1]
            for step in twin.steps
        ]
        check_laws(result.values[image], matrices, trace.readout[image], 0)
    tokens = range(0, grid.num_tokens, grid.num_tokens // 12)
    expected = slow.flow(matrices, trace.readout[1], tokens)
    torch.testing.assert_close(result.values[1].flatten()[list(tokens)].double(), expected, atol=2e-6, rtol=0)


def test_more_than_200_tokens_are_refused(chelsea: Any) -> None:
    with pytest.raises(vs.UnsupportedModelError) as caught:
        vs.attention_flow(vs.load("swin-nano"), chelsea)
    message = "swin-nano has 256 tokens and attention_flow takes at most 200: use a smaller image, or vitscope.rollout"
    assert str(caught.value) == f"{message}, or pass max_tokens=256 and wait"
    blocks = random_blocks(200, 1, heads=1)
    trace = trace_of(blocks, cls(200), vs.Grid(1, 199, 1))
    assert vs.attention_flow(trace).values.shape == (1, 1, 199)
    with pytest.raises(
        vs.UnsupportedModelError, match="this model has 200 tokens and attention_flow takes at most 199"
    ):
        vs.attention_flow(trace, max_tokens=199)


@pytest.mark.slow
def test_the_limit_of_tokens_can_be_raised(chelsea: Any) -> None:
    result = vs.attention_flow(vs.load("swin-nano"), chelsea, max_tokens=256)
    assert result.values.shape == (1, 16, 16)
    assert 0 < float(result.values.min()) < float(result.values.max()) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_layer": 6}, "start_layer is 6: the model has layers 0 to 5"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"start_layer": 1.5}, "start_layer is 1.5, a whole number is expected"),
        ({"head_fusion": "sum"}, "unknown head fusion 'sum'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_options_are_refused(options: dict[str, Any], message: str, chelsea: Any) -> None:
    with pytest.raises(vs.CallError) as caught:
        vs.attention_flow(vs.load("vit-nano"), chelsea, **options)
    assert str(caught.value).startswith(message)


def test_a_trace_and_images_are_refused_together(chelsea: Any) -> None:
    trace = vs.capture(vs.load("vit-nano"), chelsea)
    with pytest.raises(vs.CallError, match="a trace has its images already"):
        vs.attention_flow(trace, chelsea)
    with pytest.raises(vs.CallError, match="images are missing"):
        vs.attention_flow(vs.load("vit-nano"))
    with pytest.raises(vs.CallError, match="captured"):
        vs.attention_flow(vs.capture(vs.load("vit-nano"), chelsea, layers=[5]))


def test_blocks_that_form_no_chain_are_refused() -> None:
    trace = trace_of(random_blocks(5, 2), cls(5), vs.Grid(2, 2, 1))
    broken = Trace(trace.steps, 2, trace.readout, [], unchained="its blocks run in parallel")
    with pytest.raises(vs.UnsupportedModelError, match="attention_flow is not available for this model: its blocks"):
        vs.attention_flow(broken)
