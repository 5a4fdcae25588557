"""A trace stores the requested layers, and returns the same maps from windows, row blocks and half precision."""

import dataclasses
import itertools
import json
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.helpers.families import ALL, Family, every_family
from vitscope.attention.scores import Factored, Logits, StoredWeights
from vitscope.attention.step import AttentionStep
from vitscope.attention.trace import Trace
from vitscope.errors import NoAttentionError, UnsupportedModelError
from vitscope.tracing.layer_selection import LayerSelection
from vitscope.tracing.slab import ALIGNMENT, SLAB_BYTES

FUSIONS = ["mean", "max", "min"]


def family(name: str) -> Family:
    return next(family for family in ALL if family.name == name)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "held"),
    [([0], [0]), ([-1], [2]), ([0, -1], [0, 2]), ([2, 0, 1], [0, 1, 2]), ([1, -2], [1]), ([-3, 2], [0, 2])],
    ids=str,
)
def test_only_the_selected_layers_are_stored(layers: list[int], held: list[int]) -> None:
    model, pixels = family("timm-vit").model(), family("timm-vit").pixels()
    full, selected = vs.capture(model, pixels), vs.capture(model, pixels, layers=layers)
    assert selected.num_layers == full.num_layers == 3
    assert [step.layer for step in selected.steps] == held
    for layer in range(3):
        if layer in held:
            assert torch.equal(selected.attention(layer), full.attention(layer))
            assert torch.equal(selected.attention(layer - 3), full.attention(layer))
        else:
            with pytest.raises(vs.CallError, match=rf"layer {layer} was not captured.* {layers_text(held)}$"):
                selected.attention(layer)


def layers_text(held: list[int]) -> str:
    return str(held).replace("[", r"\[").replace("]", r"\]")


def test_unselected_layers_are_dropped_while_the_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only block 3 and the two blocks that may turn out to be the second from the end are stored."""
    counts: list[int] = []
    add = LayerSelection.add

    def count(selection: LayerSelection, step: AttentionStep) -> None:
        add(selection, step)
        counts.append(len(selection._steps))

    monkeypatch.setattr(LayerSelection, "add", count)
    vs.capture(module_of_ten_blocks(), random(1, 3, 16, 16), layers=[3, -2])
    assert counts == [1, 2, 2, 2, 2, 3, 3, 3, 3, 3]


class Block(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + (x @ x.transpose(-1, -2)).softmax(-1) @ x


def module_of_ten_blocks() -> vs.VisionModel:
    patches = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten(2), *[Block() for _ in range(10)])
    return vs.load(patches, patch_size=8, readout="patches")


@pytest.mark.parametrize("layers", [[3], [-4], [0, 5], [0, -9], []], ids=str)
def test_layers_out_of_range_are_refused(layers: list[int]) -> None:
    model, pixels = family("timm-vit").model(), family("timm-vit").pixels()
    with pytest.raises(vs.CallError, match="layer") as caught:
        vs.capture(model, pixels, layers=layers)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@every_family
def test_a_step_stores_queries_and_keys_only(family: Family) -> None:
    model, pixels = family.model(), family.pixels(3)
    tokens, heads, channels = family.grid.num_tokens, 4, 8
    size, addresses, slabs = 3 * heads * tokens * channels * 4, [], set()
    for step in vs.capture(model, pixels).steps:
        assert isinstance(step.scores, Factored)
        for tensor in (step.scores.query, step.scores.key):
            assert tensor.is_contiguous()
            assert tensor.numel() * tensor.element_size() == size
            addresses.append(tensor.data_ptr())
            slabs.add((tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()))
    assert [nbytes for _, nbytes in slabs] == [SLAB_BYTES], "one slab and no joint projection is alive"
    gaps = [later - earlier for earlier, later in itertools.pairwise(addresses)]
    assert all(gap >= size for gap in gaps), "tensors must not overlap"
    if "beit" not in family.name:  # which stores a bias between them
        assert max(gaps) < size + ALIGNMENT


# Two windows with padding on a grid of 3×3 patches. The prefix token is in no window.
GRID = vs.Grid(3, 3, prefix=1)
SLOTS = torch.tensor([[1, 2, -1, 4, 5, -1], [-1, 3, 6, 9, 8, 7]])


def windowed(kind: str) -> AttentionStep:
    scores: Any
    if kind == "logits":
        scores = Logits(random(2, 2, 3, 6, 6))
    elif kind == "factored":
        bias = random(1, 1, 3, 6, 6, seed=3)
        scores = Factored(random(2, 2, 3, 6, 4, seed=1), random(2, 2, 3, 6, 4, seed=2), 0.5, bias)
    else:
        scores = StoredWeights(random(2, 2, 1, 6, 6).softmax(-1))
    return AttentionStep(0, "windows", scores, SLOTS, GRID)


def scattered(weights: Tensor) -> Tensor:
    """Return weights (batch, window, head, query, key) as (batch, head, token, token), copied one by one."""
    dense = torch.zeros(len(weights), weights.shape[2], GRID.num_tokens, GRID.num_tokens)
    for window, slots in enumerate(SLOTS.tolist()):
        for i, query in enumerate(slots):
            for j, key in enumerate(slots):
                if query >= 0 and key >= 0:
                    dense[:, :, query, key] = weights[:, window, :, i, j]
    return dense


def fused_padding(step: AttentionStep, head: Any) -> Tensor:
    """Return the fused attention of each token to the padding of its window, (batch, token, 1)."""
    weights = scores_by_hand(step)
    fused = {"mean": weights.mean(2), "max": weights.amax(2), "min": weights.amin(2)}
    selected = fused[head] if head in fused else weights[:, :, head]
    lost = torch.zeros(len(weights), GRID.num_tokens, 1)
    for window, slots in enumerate(SLOTS.tolist()):
        for i, query in enumerate(slots):
            for j, key in enumerate(slots):
                if query >= 0 > key:
                    lost[:, query, 0] += selected[:, window, i, j]
    return lost


def scores_by_hand(step: AttentionStep) -> Tensor:
    scores = step.scores
    if isinstance(scores, StoredWeights):
        return scores.weights
    if isinstance(scores, Logits):
        return scores.logits.softmax(-1)
    return torch.softmax(scores.query @ scores.key.mT * scores.scale + scores.bias, -1)


KINDS = pytest.mark.parametrize("kind", ["logits", "factored", "fused"])


@KINDS
def test_dense_attention_places_windows_on_the_grid(kind: str) -> None:
    step = windowed(kind)
    assert not step.is_plain
    torch.testing.assert_close(step.attention(), scattered(scores_by_hand(step)))


@KINDS
@pytest.mark.parametrize("head", [*FUSIONS, 0, -1], ids=str)
def test_products_with_windows_equal_products_with_the_dense_matrix(kind: str, head: Any) -> None:
    step = windowed(kind)
    heads = scattered(scores_by_hand(step))
    dense = {"mean": heads.mean(1), "max": heads.amax(1), "min": heads.amin(1)}
    matrix = dense[head] if head in dense else heads[:, head]
    rows = random(2, 5, GRID.num_tokens, seed=7)
    fused = step.fused(head)
    padding_share = rows @ fused_padding(step, head)
    torch.testing.assert_close(
        step.row_sums(fused)[..., None], matrix.sum(-1, keepdim=True) + fused_padding(step, head)
    )
    for pulled, fallen in (step.pull(rows, fused), step.pull_head(rows, head)):
        torch.testing.assert_close(pulled, rows @ matrix)
        torch.testing.assert_close(fallen[..., None], padding_share)


def test_a_single_window_with_permuted_tokens_is_not_plain() -> None:
    order = torch.tensor([[2, 0, 3, 1]])
    step = AttentionStep(0, "shuffled", Logits(random(1, 1, 2, 4, 4)), order, vs.Grid(2, 2))
    weights = random(1, 1, 2, 4, 4).softmax(-1)[:, 0]
    expected = torch.zeros(1, 2, 4, 4)
    for i, query in enumerate(order[0]):
        for j, key in enumerate(order[0]):
            expected[:, :, query, key] = weights[:, :, i, j]
    torch.testing.assert_close(step.attention(), expected)
    rows = random(1, 3, 4, seed=1)
    torch.testing.assert_close(step.pull_head(rows, 0)[0], rows @ expected[:, 0])


def test_windows_at_unknown_positions_are_refused() -> None:
    step = dataclasses.replace(windowed("logits"), slots=None)
    with pytest.raises(UnsupportedModelError, match=r"windows attends in 2 windows at unknown .*step\.weights\(\)"):
        step.attention()
    assert step.weights().shape == (2, 2, 3, 6, 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformers-vit", "transformers-beit", "timm-dinov2-registers"])
def test_row_blocks_equal_a_single_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pixels = family(name).model(), family(name).pixels()

    def all_results() -> list[Tensor]:
        trace = vs.capture(model, pixels)
        step = trace.steps[1]
        statistics = vs.head_statistics(trace)
        return [
            *[step.fused(head) for head in (*FUSIONS, 0, 3)],
            *[trace.map(1, head, query) for head in ("mean", 2) for query in ("readout", "cls", (2, 3))],
            *[vs.rollout(source, images, head_fusion="max", discard_ratio=0.4).values for source, images in sources],
            *[vs.rollout(source, images).values for source, images in sources],
            *[statistics.entropy, statistics.distance],
        ]

    sources: list[tuple[Any, Any]] = [(model, pixels), (vs.capture(model, pixels), None)]
    expected = all_results()
    assert len(sources[1][0].steps[0].row_slices()) == 1
    monkeypatch.setattr("vitscope.attention.step.BLOCK_NUMBERS", 1)
    assert len(sources[1][0].steps[0].row_slices()) == 2
    for result, single in zip(all_results(), expected, strict=True):
        torch.testing.assert_close(result, single, atol=1e-6, rtol=1e-5)


def test_row_slices_cover_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for numbers in (1, 10_000, 1 << 30):
        monkeypatch.setattr("vitscope.attention.step.BLOCK_NUMBERS", numbers)
        step = AttentionStep(0, "", Logits(random(1, 1, 2, 100, 100)), None, None)
        rows = [row for rows in step.row_slices() for row in range(100)[rows]]
        assert rows == list(range(100))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["transformers-vit", "timm-dinov3", "timm-siglip", "torchvision-vit"])
def test_half_precision_gives_float32_results_close_to_float32(name: str, dtype: torch.dtype) -> None:
    model, pixels = family(name).model(), family(name).pixels()
    trace = vs.capture(model, pixels)
    attention, rolled = trace.attention(-1), vs.rollout(model, pixels).values
    model.module.to(dtype)
    small = vs.capture(model, pixels)
    assert isinstance(small.steps[0].scores, Factored)
    assert small.steps[0].scores.query.dtype == dtype
    assert small.attention(-1).dtype == small.readout.dtype == torch.float32
    torch.testing.assert_close(small.attention(-1).sum(-1), torch.ones(2, 4, family(name).grid.num_tokens))
    torch.testing.assert_close(small.attention(-1), attention, atol=0.02, rtol=0)
    for result in (vs.rollout(model, pixels), vs.rollout(small)):
        assert result.values.dtype == torch.float32
        torch.testing.assert_close(result.values, rolled, atol=0.01, rtol=0)
        assert result.provenance["rows_sum_to_one"]


@pytest.fixture(scope="module")
def registers() -> Trace:
    return vs.capture(family("timm-dinov2-registers").model(), family("timm-dinov2-registers").pixels())


def test_prefix_tokens_are_queried_by_name(registers: Trace) -> None:
    dense = registers.attention(1)
    assert registers.prefix_names == ("cls", "register_1", "register_2", "register_3", "register_4")
    for token, name in enumerate(registers.prefix_names):
        expected = dense[:, 2, token, 5:].unflatten(-1, (4, 6))
        torch.testing.assert_close(registers.map(1, 2, name), expected)


WRONG: dict[str, tuple[Callable[[Trace], Any], str]] = {
    "layer too large": (lambda trace: trace.attention(3), "layer 3 is out of range.*0 to 2"),
    "layer too small": (lambda trace: trace.attention(-4), "layer -4 is out of range.*0 to 2"),
    "head too large": (lambda trace: trace.map(0, 4), "head 4 is out of range.*0 to 3"),
    "head too small": (lambda trace: trace.map(0, -5), "head -5 is out of range.*0 to 3"),
    "fused head too large": (lambda trace: trace.steps[0].fused(7), "head 7 is out of range.*0 to 3"),
    "unknown fusion": (lambda trace: trace.map(0, "median"), "'median'.*mean, max or min"),
    "unknown query": (lambda trace: trace.map(0, "mean", "register_9"), "'register_9'.*'cls', 'register_1'"),
    "row outside": (lambda trace: trace.map(0, "mean", (4, 0)), r"\(4, 0\) lies outside.*4 rows and 6 columns"),
    "column outside": (lambda trace: trace.map(0, "mean", (0, 6)), r"\(0, 6\) lies outside"),
    "negative patch": (lambda trace: trace.map(0, "mean", (-1, 0)), r"\(-1, 0\) lies outside"),
    "one number": (lambda trace: trace.map(0, "mean", (1,)), r"unknown query \(1,\).*\(row, column\)"),
    "not a whole number": (lambda trace: trace.map(0, "mean", (1.0, 2)), "row is 1.0, a whole number"),
    "no layer": (lambda trace: trace.map("last"), "layer is 'last', a whole number"),
    "a boolean": (lambda trace: trace.map(0, True), "head is True, a whole number"),
    "a token number": (lambda trace: trace.map(0, "mean", 7), "unknown query 7"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_invalid_arguments_are_refused_in_one_line(
    registers: Trace, call: Callable[[Trace], Any], message: str
) -> None:
    with pytest.raises(vs.CallError, match=message) as caught:
        call(registers)
    assert "\n" not in str(caught.value)


def test_a_model_without_prefix_tokens_has_no_query_cls() -> None:
    trace = vs.capture(family("timm-siglip").model(), family("timm-siglip").pixels())
    with pytest.raises(vs.CallError, match="unknown query 'cls': choose 'readout' or a patch"):
        trace.map(0, query="cls")


def test_a_module_of_unknown_layout_names_the_missing_arguments() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten(2), nn.Linear(4, 4), Block())
    trace = vs.capture(module, random(2, 3, 16, 16))
    assert trace.attention(0).shape == (2, 1, 4, 4)
    for call in (lambda: trace.map(0), lambda: vs.rollout(trace), lambda: vs.attention_map(trace)):
        message = r"token grid.* pass patch_size, prefix and readout to vitscope\.load"
        with pytest.raises(UnsupportedModelError, match=message):
            call()


def test_a_module_with_a_softmax_over_channels_has_no_attention() -> None:
    with pytest.raises(NoAttentionError, match="no attention that vitscope can observe"):
        vs.capture(nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Softmax(1)), random(1, 3, 16, 16))


@pytest.mark.usefixtures("unchecked")
def test_integers_of_numpy_are_accepted(registers: Trace) -> None:
    plain = registers.map(1, 2, (3, 4))
    assert torch.equal(registers.map(np.int64(1), np.int64(2), np.unravel_index(22, (4, 6))), plain)
    assert torch.equal(registers.map(1, 2, np.array([3, 4])), plain)
    result = vs.rollout(registers, start_layer=np.int64(1), discard_ratio=np.float32(0.5))
    assert json.loads(json.dumps(dict(result.provenance)))["parameters"]["start_layer"] == 1


def test_autocast_and_default_dtype_of_the_caller_do_not_affect_maps(registers: Trace) -> None:
    options = {"head_fusion": "max", "discard_ratio": 0.5}
    attention, values = registers.attention(1), vs.rollout(registers, **options).values
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(registers.attention(1), attention)
        assert torch.equal(vs.rollout(registers, **options).values, values)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(vs.rollout(registers, **options).values, values)
        assert registers.map(1, query="cls").dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_pickled_step_holds_only_the_values_of_its_tensors(registers: Trace) -> None:
    data = pickle.dumps(registers.steps)
    assert len(data) < 1_000_000
    again = pickle.loads(data)[1]
    assert torch.equal(again.attention(), registers.attention(1))


def test_nan_raises_a_work_error() -> None:
    model, pixels = family("transformers-vit").model(), family("transformers-vit").pixels()
    with torch.no_grad():
        model.module.vit.layers[1].attention.q_proj.weight[0, 0] = float("nan")
    trace = vs.capture(model, pixels)
    for call in (lambda: trace.map(1), lambda: vs.head_statistics(trace), lambda: vs.rollout(trace)):
        with pytest.raises(vs.WorkError, match="NaN"):
            call()


@pytest.mark.parametrize("size", [(38, 53), (40, 48)], ids=str)
def test_pixels_beyond_the_last_full_patch_are_excluded(size: tuple[int, int]) -> None:
    """The patch embedding drops partial patches, so the grid and the map end with the last full patch."""
    model = family("transformers-vit").model()
    trace = vs.capture(model, random(1, 3, *size))
    rows, columns = size[0] // 8, size[1] // 8
    assert trace.steps[0].grid == vs.Grid(rows, columns, 1)
    assert trace.images[0].box == pytest.approx((0, 0, columns * 8, rows * 8))


def test_additional_axes_of_attention_become_windows() -> None:
    class Mixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            tokens = x.flatten(2).transpose(1, 2).reshape(2, 3, 2, -1, 4)  # (batch, window, head, token, channel)
            return (tokens @ tokens.transpose(-1, -2)).softmax(-1).flatten(1)

    trace = vs.capture(vs.load(Mixed()), random(2, 3, 8, 8))
    weights = trace.steps[0].weights()
    assert weights.shape[:3] == (2, 3, 2)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


@pytest.mark.parametrize("layers", [3, "all", 1.5], ids=str)
@pytest.mark.usefixtures("unchecked")
def test_layers_must_be_a_list(layers: Any) -> None:
    with pytest.raises(vs.CallError, match="a list of whole numbers"):
        vs.capture(family("timm-vit").model(), family("timm-vit").pixels(), layers=layers)


def test_autocast_of_the_caller_does_not_affect_windows() -> None:
    step = windowed("factored")
    rows, fused = random(2, 3, GRID.num_tokens), step.fused("mean")
    expected, _ = step.pull(rows, fused)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(step.pull(rows, fused)[0], expected)
