"""Properties of rollout, its refusals, and the two ways in which it is computed."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vitscope as vs
from tests.helpers.families import ALL, Family
from tests.reference.attention import attention as library_attention
from tests.reference.rollout import rollout as slow_rollout
from vitscope.attention.scores import Factored, Logits, StoredWeights
from vitscope.attention.trace import Trace
from vitscope.methods.rollout import discard_smallest

FUSIONS = ["mean", "max", "min"]
RATIOS = [0.0, 0.3, 0.9, 1.0]

every_prefix = pytest.mark.parametrize(
    "name", ["timm-siglip", "transformers-vit", "timm-deit-distilled", "transformers-dinov2-registers"]
)


def family(name: str) -> Family:
    return next(family for family in ALL if family.name == name)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return vs.capture(family("timm-vit").model(), family("timm-vit").pixels(3))


@pytest.mark.slow
@every_prefix
@pytest.mark.parametrize("head_fusion", FUSIONS)
@pytest.mark.parametrize("discard_ratio", RATIOS)
def test_rows_sum_to_one(name: str, head_fusion: str, discard_ratio: float) -> None:
    """Patches and prefix tokens sum to one; without prefix tokens the patches alone do."""
    model, pixels = family(name).model(), family(name).pixels()
    result = vs.rollout(model, pixels, head_fusion=head_fusion, discard_ratio=discard_ratio)
    assert result.provenance["rows_sum_to_one"] is True
    assert result.provenance["row_sums"] == pytest.approx([1, 1], abs=1e-5)
    assert bool((result.values >= 0).all())
    shares = result.values.sum((1, 2))
    if family(name).prefix_names:
        assert bool((shares < 1 + 1e-5).all())
    else:
        torch.testing.assert_close(shares, torch.ones(2))


def test_rows_without_normalisation_grow(trace: Trace) -> None:
    """Each row of A + I sums to two, so three blocks give eight."""
    result = vs.rollout(trace, normalize=False)
    assert result.provenance["rows_sum_to_one"] is False
    assert result.provenance["row_sums"] == pytest.approx([8, 8, 8], rel=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_discarding_everything_leaves_the_readout(normalize: bool) -> None:
    trace = vs.capture(family("timm-beit").model(), family("timm-beit").pixels())
    result = vs.rollout(trace, discard_ratio=1.0, normalize=normalize)
    assert torch.equal(result.values, family("timm-beit").grid.patches(trace.readout))
    cls = vs.rollout(family("transformers-vit").model(), family("transformers-vit").pixels(), discard_ratio=1.0)
    assert not cls.values.any()


@pytest.mark.parametrize("head_fusion", FUSIONS)
@pytest.mark.parametrize("discard_ratio", [0.0, 0.9])
def test_the_order_of_heads_does_not_matter(trace: Trace, head_fusion: str, discard_ratio: float) -> None:
    order = [2, 0, 3, 1]

    def shuffled(scores: Factored) -> Factored:
        return dataclasses.replace(scores, query=scores.query[:, :, order], key=scores.key[:, :, order])

    steps = [dataclasses.replace(step, scores=shuffled(step.scores)) for step in trace.steps]
    permuted = dataclasses.replace(trace, steps=steps)
    assert not torch.equal(permuted.attention(0), trace.attention(0))
    options = {"head_fusion": head_fusion, "discard_ratio": discard_ratio}
    torch.testing.assert_close(vs.rollout(permuted, **options).values, vs.rollout(trace, **options).values)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"head_fusion": "max", "discard_ratio": 0.9}], ids=str)
def test_images_of_a_batch_are_independent(options: dict[str, Any]) -> None:
    model, pixels = family("timm-dinov2-registers").model(), family("timm-dinov2-registers").pixels(3)
    together = vs.rollout(model, pixels, **options)
    assert len(together) == len(together.provenance["row_sums"]) == 3
    for image in range(3):
        alone = vs.rollout(model, pixels[image : image + 1], **options).values
        torch.testing.assert_close(together.values[image : image + 1], alone, atol=1e-6, rtol=1e-4)
    order = [2, 0, 1]
    permuted = vs.rollout(model, pixels[order], **options).values
    torch.testing.assert_close(permuted, together.values[order], atol=1e-6, rtol=1e-4)
    assert not torch.allclose(permuted, together.values, atol=1e-4)


GENERATOR = torch.Generator().manual_seed(0)
FUSED: dict[str, Tensor] = {
    "random": torch.rand(2, 1, 7, 7, generator=GENERATOR) + 0.01,
    "ties": torch.randint(1, 4, (3, 1, 6, 6), generator=GENERATOR) / 4,
    "ties and zeros": torch.randint(0, 3, (3, 1, 6, 6), generator=GENERATOR) / 4,
    "constant": torch.full((2, 1, 5, 5), 0.2),
    "zeros": torch.zeros(1, 1, 4, 4),
    "one image constant": torch.cat([torch.full((1, 1, 5, 5), 0.2), torch.rand(1, 1, 5, 5, generator=GENERATOR)]),
    "windows": torch.rand(2, 4, 3, 3, generator=GENERATOR) + 0.01,
    "one entry": torch.ones(2, 1, 1, 1),
}


@pytest.mark.parametrize("fused", FUSED.values(), ids=FUSED)
@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0])
def test_exactly_the_smallest_entries_are_discarded(fused: Tensor, ratio: float) -> None:
    numbers = fused[0].numel()
    discarded = math.floor(ratio * numbers)
    before = fused.clone()
    thinned = discard_smallest(fused, ratio)
    assert torch.equal(fused, before)
    assert thinned.shape == fused.shape
    for image, entries in zip(thinned.flatten(1), fused.flatten(1), strict=True):
        order = entries.argsort(stable=True)
        assert not image[order[:discarded]].any()
        assert torch.equal(image[order[discarded:]], entries[order[discarded:]])
        if bool((entries > 0).all()):
            assert int((image == 0).sum()) == discarded


def test_the_last_block_alone_is_one_step(trace: Trace) -> None:
    matrix = (trace.attention(-1).mean(1) + torch.eye(25)) / 2
    expected = torch.einsum("bq,bqk->bk", trace.readout, matrix)[:, 1:].unflatten(-1, (4, 6))
    for start in (2, -1):
        result = vs.rollout(trace, start_layer=start)
        torch.testing.assert_close(result.values, expected)
        assert result.provenance["parameters"]["start_layer"] == 2


@pytest.mark.parametrize("start", [0, 1, 2])
def test_start_layer_counts_from_the_end_too(trace: Trace, start: int) -> None:
    model, pixels = family("timm-vit").model(), family("timm-vit").pixels(3)
    expected = vs.rollout(trace, start_layer=start).values
    for result in (
        vs.rollout(trace, start_layer=start - 3),
        vs.rollout(model, pixels, start_layer=start),
        vs.rollout(model, pixels, start_layer=start - 3),
    ):
        torch.testing.assert_close(result.values, expected)


OPTIONS = [
    {},
    {"start_layer": 1},
    {"start_layer": -1},
    {"head_fusion": "max", "discard_ratio": 0.5, "normalize": False},
]


@pytest.mark.slow
@every_prefix
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_evolution_equals_the_rollout_after_each_block(name: str, options: dict[str, Any]) -> None:
    model, pixels = family(name).model(), family(name).pixels()
    maps, readout = library_attention(model.module, pixels), vs.capture(model, pixels).readout
    entries = vs.rollout_evolution(model, pixels, **options)
    start = options.get("start_layer", 0) % 3
    assert [entry.provenance["parameters"]["end_layer"] for entry in entries] == list(range(start, 3))
    for entry, end in zip(entries, range(start, 3), strict=True):
        expected = slow_rollout(maps[: end + 1], readout, **(options | {"start_layer": start}))
        torch.testing.assert_close(entry.values, family(name).grid.patches(expected).float(), atol=1e-5, rtol=1e-5)
    last = vs.rollout(model, pixels, **options)
    torch.testing.assert_close(entries[-1].values, last.values)
    assert entries[-1].provenance["parameters"] == last.provenance["parameters"]


@pytest.mark.slow
@every_prefix
@pytest.mark.parametrize("explicit", [False, True], ids=["kernel", "softmax"])
@pytest.mark.parametrize(
    "options", [{}, {"head_fusion": "max"}, {"head_fusion": "min", "discard_ratio": 0.5, "start_layer": 1}], ids=str
)
def test_fusing_during_the_forward_pass_gives_the_same_result(
    name: str, explicit: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import vitscope.methods.rollout as method

    kinds: list[type] = []
    fold = method._fold

    def record(trace: Trace, *args: Any, **kwargs: Any) -> list[Tensor]:
        kinds.extend({type(step.scores) for step in trace.steps})
        return fold(trace, *args, **kwargs)

    monkeypatch.setattr(method, "_fold", record)
    model, pixels = family(name).model(), family(name).pixels()
    if explicit:
        use_softmax(model)
    results = []
    for smaller in (False, True):
        monkeypatch.setattr(
            "vitscope.tracing.recorder.Recorder._weights_are_smaller", lambda *_, smaller=smaller: smaller
        )
        results.append(vs.rollout(model, pixels, **options))
    assert kinds == [Logits if explicit else Factored, StoredWeights]
    torch.testing.assert_close(results[0].values, results[1].values, atol=1e-6, rtol=1e-5)
    assert results[0].provenance["parameters"] == results[1].provenance["parameters"]
    assert torch.allclose(torch.tensor(results[0].provenance["row_sums"]), torch.ones(2), atol=1e-5)


def use_softmax(model: vs.VisionModel) -> None:
    """Make the library compute attention without a fused kernel."""
    if model.library == "transformers":
        model.module.set_attn_implementation("eager")
        return
    for block in model.module.blocks:
        block.attn.fused_attn = False


def test_attention_is_fused_during_the_forward_pass_if_tokens_are_few() -> None:
    """One fused map per layer is smaller than queries and keys of 25 tokens, and larger than those of 65 tokens."""
    from vitscope.tracing.capture import run_and_capture

    model = family("transformers-vit").model()
    for size, kind in (((32, 48), StoredWeights), ((64, 64), Factored)):
        fused = run_and_capture(model, torch.zeros(1, 3, *size), fuse="mean")
        assert {type(step.scores) for step in fused.trace.steps} == {kind}
        assert torch.isfinite(fused.logits).all()
        plain = run_and_capture(model, torch.zeros(1, 3, *size))
        torch.testing.assert_close(fused.logits, plain.logits)


@pytest.mark.slow
@pytest.mark.parametrize("smaller", [False, True], ids=["queries and keys", "fused"])
@pytest.mark.parametrize("options", [{}, {"head_fusion": "max"}, {"discard_ratio": 0.5}, {"normalize": False}], ids=str)
def test_nan_in_the_attention_is_refused(
    smaller: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitscope.tracing.recorder.Recorder._weights_are_smaller", lambda *_: smaller)
    model, pixels = family("timm-vit").model(), family("timm-vit").pixels()
    with torch.no_grad():
        model.module.blocks[1].attn.qkv.weight[3] = float("nan")
    with pytest.raises(vs.WorkError, match="came out as NaN or infinity: check the model's weights") as caught:
        vs.rollout(model, pixels, **options)
    assert "\n" not in str(caught.value)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"head_fusion": "median"}, "'median'.*mean, max or min"),
    ({"head_fusion": 0}, "unknown head fusion 0"),
    ({"discard_ratio": -0.1}, "discard_ratio is -0.1.*between 0 and 1"),
    ({"discard_ratio": 1.01}, "discard_ratio is 1.01.*between 0 and 1"),
    ({"discard_ratio": float("nan")}, "discard_ratio is nan"),
    ({"start_layer": 3}, "start_layer is 3: the model has layers 0 to 2"),
    ({"start_layer": 99}, "start_layer is 99: the model has layers 0 to 2"),
    ({"start_layer": -4}, "start_layer is -4: the model has layers 0 to 2"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("method", [vs.rollout, vs.rollout_evolution])
@pytest.mark.parametrize(("options", "message"), WRONG, ids=str)
def test_options_out_of_range_are_refused(trace: Trace, method: Any, options: dict[str, Any], message: str) -> None:
    model, pixels = family("timm-vit").model(), family("timm-vit").pixels(1)
    for arguments in ((trace,), (model, pixels)):
        with pytest.raises(vs.CallError, match=message) as caught:
            method(*arguments, **options)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", [vs.rollout, vs.rollout_evolution, vs.attention_map, vs.head_statistics])
def test_methods_take_a_trace_alone_or_a_model_with_images(trace: Trace, method: Any) -> None:
    model, pixels = family("timm-vit").model(), family("timm-vit").pixels()
    with pytest.raises(vs.CallError, match="a trace has its images already"):
        method(trace, pixels)
    with pytest.raises(vs.CallError, match="images are missing"):
        method(model)


@pytest.mark.usefixtures("unchecked")
def test_a_string_is_not_a_model() -> None:
    with pytest.raises(vs.CallError, match=r"a model is expected, from vitscope\.load or an nn\.Module, not str"):
        vs.rollout("vit-nano", torch.zeros(1, 3, 32, 32))


def test_a_trace_without_all_layers_is_refused() -> None:
    partial = vs.capture(family("timm-vit").model(), family("timm-vit").pixels(), layers=[0, 2])
    with pytest.raises(vs.CallError, match=r"layer 1 was not captured: this trace holds layers \[0, 2\]"):
        vs.rollout(partial)
    assert vs.rollout(partial, start_layer=2).values.shape == (2, 4, 6)


def test_the_provenance_holds_all_parameters() -> None:
    model, pixels = family("timm-vit").model(), family("timm-vit").pixels()
    options = {"head_fusion": "max", "discard_ratio": 0.25, "start_layer": -2, "normalize": False}
    provenance = vs.rollout(model, pixels, **options).provenance
    assert provenance["method"] == "rollout"
    assert provenance["parameters"] == options | {"start_layer": 1, "end_layer": 2, "merge": "equal", "target": None}
    assert provenance["model"] == model.name
    assert provenance["library"] == "timm"
    assert {"vitscope", "torch", "timm"} <= set(provenance["versions"])
    assert provenance["readout"] == {"cls": 1.0}
    assert provenance["rows_sum_to_one"] is False
    assert len(provenance["row_sums"]) == 2
    assert json.loads(json.dumps(dict(provenance))) == provenance
