"""Rollout through windows and merging: equal to the dense reference, and its properties."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import vitscope as vs
from tests.helpers.swin_families import (
    ALL,
    CLASSES,
    LARGE,
    MAXVIT,
    PATCH,
    SIZES,
    WINDOW,
    SwinFamily,
    every_swin,
    family,
    pixels,
)
from tests.reference.swin_rollout import Block, Merge, Story, story
from vitscope.attention.scores import StoredWeights
from vitscope.attention.trace import Trace

SUPPORTED = "a class with positive evidence in each image"

OPTIONS: list[dict[str, Any]] = [
    {},
    {"head_fusion": "max", "start_layer": 1},
    {"head_fusion": "min", "discard_ratio": 0.3, "merge": "norm"},
    {"normalize": False, "discard_ratio": 0.9, "start_layer": 1},
    {"merge": "norm", "target": SUPPORTED},
    {"start_layer": 3, "merge": "norm"},
    {"start_layer": -2, "discard_ratio": 0.5, "target": SUPPORTED},
    {"normalize": False, "head_fusion": "max", "merge": "norm", "target": SUPPORTED},
]
NORMALISED = [options for options in OPTIONS if options.get("normalize", True)]

each_size = pytest.mark.parametrize(
    ("name", "kind"),
    [pytest.param(f.name, kind, id=f"{f.name}-{kind}") for f in ALL for kind in f.sizes if kind in (*LARGE, "small")],
)


@cache
def recorded_run(name: str, kind: str) -> tuple[vs.VisionModel, Tensor, Trace, Story]:
    """Return a model, its images, their trace, and the record of a plain run."""
    chosen = family(name)
    size = chosen.sizes[kind]
    model, x, grid = chosen.model(size), pixels(size), chosen.grid(size)
    return model, x, vs.capture(model, x), story(model.module, x, (grid.height, grid.width))


def with_class_index(options: dict[str, Any], twin: Story) -> dict[str, Any]:
    """Replace the placeholder target by the index of a class."""
    if "target" not in options:
        return options
    best = (twin.features @ twin.classifier.weight.T).amax(1).amin(0)
    assert best.max() > 0
    return options | {"target": int(best.argmax())}


def assert_equal(result: vs.Attribution, expected: Tensor) -> None:
    """Compare a result with (batch, token + 1) of the reference, padding last."""
    assert result.values.dtype == torch.float32
    values, padding = expected[:, :-1].float(), expected[:, -1].float()
    torch.testing.assert_close(result.values.flatten(1), values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.tensor(result.provenance["padding_mass"]), padding, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@each_size
def test_rollout_equals_the_dense_reference(name: str, kind: str) -> None:
    model, x, trace, twin = recorded_run(name, kind)
    for options in [with_class_index(options, twin) for options in OPTIONS]:
        expected = twin.rollout(**options)
        assert_equal(vs.rollout(trace, **options), expected)
        assert_equal(vs.rollout(model, x, **options), expected)


@pytest.mark.slow
@each_size
def test_evolution_equals_the_dense_reference(name: str, kind: str) -> None:
    model, x, trace, twin = recorded_run(name, kind)
    for choice in (
        {"merge": "norm", "target": SUPPORTED},
        {"start_layer": 1, "head_fusion": "max", "discard_ratio": 0.2},
    ):
        options = with_class_index(choice, twin)
        by_image = [twin.evolution(image, **options) for image in range(len(x))]
        for results in (vs.rollout_evolution(trace, **options), vs.rollout_evolution(model, x, **options)):
            for result, *rows in zip(results, *by_image, strict=True):
                assert_equal(result, torch.stack(rows))
        torch.testing.assert_close(results[-1].values, vs.rollout(trace, **options).values, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@each_size
def test_patches_and_padding_sum_to_one(name: str, kind: str) -> None:
    _, _, trace, twin = recorded_run(name, kind)
    for options in [with_class_index(options, twin) for options in NORMALISED]:
        result = vs.rollout(trace, **options)
        padding = torch.tensor(result.provenance["padding_mass"])
        assert result.values.min() >= 0
        torch.testing.assert_close(result.values.sum((1, 2)) + padding, torch.ones(2), atol=1e-5, rtol=0)
        assert result.provenance["rows_sum_to_one"] == bool((padding < 1e-4).all())
    lossless = all(len(step.places) == step.dense(0)[0].shape[1] for step in twin.steps if isinstance(step, Block))
    has_padding = any(None in group for step in twin.steps if isinstance(step, Merge) for group in step.groups())
    assert vs.rollout(trace).provenance["rows_sum_to_one"] == (lossless and not has_padding)


@pytest.mark.slow
@each_size
def test_the_map_of_a_patch_is_its_row_and_zero_outside_its_window(name: str, kind: str) -> None:
    _, _, trace, twin = recorded_run(name, kind)
    blocks = [step for step in twin.steps if isinstance(step, Block)]
    for layer, block in enumerate(blocks):
        height, width = block.grid
        dense = torch.stack([block.dense(image)[0] for image in range(2)])[..., : height * width].float()
        torch.testing.assert_close(trace.attention(layer), dense, atol=1e-5, rtol=0)
        together = block.dense(0)[1]
        for row, column in {(0, 0), (height - 1, width // 2), (height // 2, width - 1)}:
            token = row * width + column
            for head, rows in ((0, dense[:, 0]), (-1, dense[:, -1]), ("max", dense.amax(1)), ("mean", dense.mean(1))):
                got = trace.map(layer, head, (row, column))
                assert got.shape == (2, height, width)
                torch.testing.assert_close(got.flatten(1), rows[:, token], atol=1e-6, rtol=1e-5)
                assert not got.flatten(1)[:, ~together[token]].any()


@pytest.mark.slow
@each_size
def test_the_map_of_the_readout_is_the_readout_pulled_back_through_merging(name: str, kind: str) -> None:
    _, _, trace, twin = recorded_run(name, kind)
    row, layer = twin.readout(0, None), trace.num_layers
    for step in reversed(twin.steps):
        if isinstance(step, Merge):
            row = row @ step.matrix(0, "equal")
            continue
        layer -= 1
        mean = step.dense(0)[0].mean(0)
        tokens = len(mean)
        expected = (row[:-1] @ mean)[:tokens].view(step.grid).float()
        got = vs.attention_map(trace, layer=layer)
        torch.testing.assert_close(got.values[0], expected, atol=1e-6, rtol=1e-5)
        lost = float((row[:-1] @ mean)[tokens:].sum())
        assert got.provenance["padding_mass"][0] == pytest.approx(lost, abs=1e-5)


@pytest.mark.slow
@each_size
def test_a_merged_token_is_the_sum_of_its_parts(name: str, kind: str) -> None:
    """The library's merging equals Σ_q T_q x_q plus a constant, and the lengths of the terms are the weights."""
    model, x, trace, twin = recorded_run(name, kind)
    merges = [step for step in trace.steps if isinstance(step, vs.MergeStep)]
    layers = [model.module.get_submodule(step.module) for step in merges]
    outputs: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda _, __, y: outputs.append(y.flatten(1, -2))) for layer in layers]
    vs.capture(model, x)
    for handle in handles:
        handle.remove()
    expected = [step for step in twin.steps if isinstance(step, Merge)]
    assert len(merges) == len(expected) == 2
    for step, layer, dense, y in zip(merges, layers, expected, outputs, strict=True):
        norm_first = layer.norm.normalized_shape[0] == layer.reduction.in_features
        constant = layer.reduction(layer.norm.bias) if norm_first else layer.norm.bias
        torch.testing.assert_close(dense.parts.sum(2).float() + constant, y, atol=1e-4, rtol=1e-4)
        assert step.groups.tolist() == [[-1 if t is None else t for t in group] for group in dense.groups()]
        for merge in ("equal", "norm"):
            shares = step.shares(merge)
            torch.testing.assert_close(shares.sum(-1), torch.ones_like(shares[..., 0]))
            for image in range(2):
                rows = shares.expand(2, -1, -1)[image]
                torch.testing.assert_close(rows, dense.shares(image, merge).float(), atol=1e-6, rtol=1e-5)
        assert not step.shares("norm")[:, step.groups < 0].any()


@pytest.mark.slow
@each_size
def test_the_contributions_of_tokens_sum_to_the_logit(name: str, kind: str) -> None:
    _, _, trace, twin = recorded_run(name, kind)
    for target in range(CLASSES):
        added = trace.classifier.contributions(target).sum(-1) + twin.classifier.bias[target]
        torch.testing.assert_close(added, twin.logits[:, target], atol=1e-4, rtol=1e-4)
    target = with_class_index({"target": SUPPORTED}, twin)["target"]
    expected = torch.stack([twin.readout(image, target)[:-1] for image in range(2)]).float()
    torch.testing.assert_close(trace.readout_row(target), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@every_swin
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_order_of_heads_changes_nothing(family: SwinFamily, options: dict[str, Any]) -> None:
    _, _, trace, twin = recorded_run(family.name, family.kinds[-1])
    options = with_class_index(options, twin)
    expected = vs.rollout(trace, **options).values
    for layer, step in enumerate(trace.blocks):
        order = torch.randperm(step.num_heads, generator=torch.Generator().manual_seed(layer))
        reordered = replace(step, scores=StoredWeights(step.weights()[:, :, order]))
        permuted = replace(trace, steps=[reordered if step is each else each for each in trace.steps])
        torch.testing.assert_close(vs.rollout(permuted, **options).values, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@every_swin
def test_rolling_the_image_by_a_window_rolls_the_maps_of_the_first_block(family: SwinFamily) -> None:
    size = (WINDOW * PATCH * 4, WINDOW * PATCH * 5)
    model, x = family.model(size), pixels(size)
    original = vs.capture(model, x)
    rolled = vs.capture(model, x.roll((WINDOW * PATCH, 2 * WINDOW * PATCH), (2, 3)))
    for row, column in ((0, 0), (3, 6), (15, 19), (9, 11)):
        for head in (0, 1, "max"):
            expected = original.map(0, head, (row, column)).roll((WINDOW, 2 * WINDOW), (1, 2))
            values = rolled.map(0, head, ((row + WINDOW) % 16, (column + 2 * WINDOW) % 20))
            torch.testing.assert_close(values, expected, atol=1e-6, rtol=1e-5)
            assert expected.count_nonzero() == 2 * WINDOW**2


@pytest.mark.slow
@every_swin
def test_layers_count_from_the_end_too(family: SwinFamily) -> None:
    model, x, trace, _ = recorded_run(family.name, family.kinds[0])
    for layer in range(6):
        expected = vs.rollout(trace, start_layer=layer).values
        assert torch.equal(vs.rollout(trace, start_layer=layer - 6).values, expected)
        torch.testing.assert_close(vs.rollout(model, x, start_layer=layer - 6).values, expected, atol=1e-6, rtol=1e-5)
        assert expected.shape[1:] == (trace.grid.height, trace.grid.width)
        assert torch.equal(trace.map(layer - 6), trace.map(layer))
    for layer in (6, -7):
        with pytest.raises(vs.CallError, match="layers 0 to 5"):
            vs.rollout(trace, start_layer=layer)


@every_swin
def test_without_attention_the_readout_is_uniform(family: SwinFamily) -> None:
    """All pairs are discarded and there is no padding: merging alone gives each token a quarter of a quarter."""
    if "fitting" in family.kinds:
        _, _, trace, _ = recorded_run(family.name, "fitting")
        result = vs.rollout(trace, discard_ratio=1.0)
        torch.testing.assert_close(result.values, torch.full((2, 16, 16), 1 / 256))


def test_a_target_can_be_a_label() -> None:
    model, x, trace, twin = recorded_run("transformers-swin", "fitting")
    target = with_class_index({"target": SUPPORTED}, twin)["target"]
    by_label = vs.rollout(model, x, target=f"LABEL_{target}")
    torch.testing.assert_close(by_label.values, vs.rollout(trace, target=target).values, atol=1e-6, rtol=1e-5)
    assert by_label.provenance["parameters"]["target"] == by_label.target == f"LABEL_{target}"


def test_rollout_refuses_strided_convolutions_between_stages() -> None:
    model, x = MAXVIT.model((64, 64)), pixels((64, 64))
    with pytest.raises(vs.UnsupportedModelError, match="rollout is not supported for this model"):
        vs.rollout(model, x)
    trace = vs.capture(model, x)
    assert trace.grid == vs.Grid(16, 16)
    torch.testing.assert_close(trace.map(3, 0, (5, 2))[:, 1::4, 2::4].sum((1, 2)), torch.ones(2))
    torch.testing.assert_close(trace.map(2, 0, (5, 2))[:, 4:6, 2:4].sum((1, 2)), torch.ones(2))


@pytest.mark.slow
@every_swin
def test_the_output_depends_on_every_token_of_the_readout(family: SwinFamily) -> None:
    """Changing any token of the last block's output changes the logits, and the readout is uniform."""
    model, images = family.model(), pixels(SIZES["fitting"], 1)
    readout = vs.capture(model, images).readout[0]
    assert torch.equal(readout, torch.full((16,), 1 / 16))
    last = list(family.blocks(model.module).values())[-1]
    outputs = []
    for token in [None, *range(16)]:

        def nudge(_: Any, __: Any, output: Any, token: int | None = token) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            if token is not None:
                hidden.view(1, 16, -1)[:, token] += torch.linspace(-3, 3, hidden.shape[-1])
            return output

        handle = last.register_forward_hook(nudge)
        try:
            with torch.no_grad():
                outputs.append(model.forward(images))
        finally:
            handle.remove()
    assert not any(torch.allclose(outputs[0], output, atol=1e-6) for output in outputs[1:])
