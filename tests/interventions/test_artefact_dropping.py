"""Maps without artefact tokens: a float64 reference, the laws of rows, and what is refused."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import vitscope as vs
from tests.helpers.families import ALL, Family
from tests.helpers.planted_artefacts import BLOCK, NEURON, PLAIN, Planted, planted
from tests.reference.attention import attention as library_attention
from tests.reference.rollout import rollout_among
from vitscope.attention.scores import Factored, Logits, StoredWeights, without_keys
from vitscope.attention.trace import Trace
from vitscope.interventions.artefacts import Artefacts

FAMILIES = ["timm-vit-mean", "transformers-beit", "transformers-dinov2-registers"]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"normalize": False, "start_layer": 1},
    {"head_fusion": "min", "discard_ratio": 0.5},
    {"head_fusion": "max", "discard_ratio": 0.9, "normalize": False},
]


@pytest.fixture(scope="module")
def example() -> Planted:
    return planted()


@pytest.fixture(scope="module")
def artefacts(example: Planted) -> Artefacts:
    return vs.artefact_tokens(example.model, example.pixels)


def family(name: str) -> Family:
    return next(each for each in ALL if each.name == name)


def remaining_tokens(result: Artefacts, threshold: float) -> torch.Tensor:
    remaining = result.norms[:, result.layer] <= threshold
    remaining[:, : result.grid.prefix] = True
    return remaining


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_rollout_is_that_of_the_other_tokens_among_themselves(name: str) -> None:
    """The highest tenth of the norms are the artefacts, so that their number differs between the images."""
    model, pixels = family(name).model(), family(name).pixels()
    norms = vs.artefact_tokens(model, pixels)
    threshold = float(norms.norms[:, -1, norms.grid.prefix :].quantile(0.9))
    maps, readout = library_attention(model.module, pixels), vs.capture(model, pixels).readout
    remaining = remaining_tokens(norms, threshold)
    for options in OPTIONS:
        result = vs.rollout(model, pixels, drop_artefacts=threshold, **options)
        expected = norms.grid.patches(rollout_among(maps, readout, remaining, **options))
        torch.testing.assert_close(result.values.double(), expected, rtol=2e-5, atol=1e-7)
        assert result.dropped is not None
        assert torch.equal(result.dropped, ~norms.grid.patches(remaining))
        if options not in OPTIONS[1:3]:
            continue
        evolution = vs.rollout_evolution(model, pixels, drop_artefacts=threshold, **options)
        torch.testing.assert_close(evolution[-1].values, result.values)
        first = rollout_among(maps[: len(maps) - len(evolution) + 1], readout, remaining, **options)
        torch.testing.assert_close(evolution[0].values.double(), norms.grid.patches(first), rtol=2e-5, atol=1e-7)


def test_the_readout_reads_no_artefacts(example: Planted, artefacts: Artefacts) -> None:
    """The classifier of this model reads CLS and the mean of the patches, 92 of which remain."""
    model, pixels = example.model, example.pixels
    trace = vs.capture(model, pixels[:2], layers=[-1])
    cls = vs.attention_map(trace, query="cls", drop_artefacts=artefacts).values
    patches = [
        vs.attention_map(trace, query=(row, column), drop_artefacts=artefacts).values
        for row in range(8)
        for column in range(12)
        if (row, column) not in PLAIN
    ]
    share = float(trace.readout[0, 0])  # of CLS
    rest = (1 - share) / 96
    expected = (share * cls + rest * torch.stack(patches).sum(0)) / (share + 92 * rest)
    result = vs.attention_map(model, pixels[:2], drop_artefacts=artefacts).values
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("head", ["mean", "max", 2])
def test_the_attention_map_is_the_softmax_over_the_other_tokens(example: Planted, head: Any) -> None:
    maps = library_attention(example.model.module, example.pixels)[-1]
    remaining = torch.cat([torch.ones(4, 5, dtype=torch.bool), ~example.places.flatten(1)], dim=1)
    rows = (maps * remaining[:, None, None])[:, :, 0].double()
    rows = rows / rows.sum(-1, keepdim=True)
    expected = {"mean": rows.mean(1), "max": rows.amax(1), 2: rows[:, 2]}[head]
    result = vs.attention_map(example.model, example.pixels, head=head, query="cls", drop_artefacts=True)
    torch.testing.assert_close(result.values.flatten(1).double(), expected[:, 5:], rtol=1e-5, atol=1e-8)
    assert torch.equal(result.dropped, example.places)


def test_true_a_threshold_and_artefacts_drop_the_same_patches(example: Planted, artefacts: Artefacts) -> None:
    model, pixels = example.model, example.pixels
    plain = vs.attention_map(model, pixels)
    expected = vs.attention_map(model, pixels, drop_artefacts=True)
    record = expected.provenance["dropped_artefacts"]
    assert record["threshold"] == artefacts.threshold
    assert (record["layer"], record["count"]) == (2, [4] * 4)
    assert record["patches"] == [[list(patch) for patch in PLAIN]] * 4
    shares = (plain.values * example.places).sum((1, 2)) / plain.values.sum((1, 2))
    assert record["share_of_map"] == pytest.approx(shares.tolist())
    assert min(record["share_of_map"]) > 1.5 * 4 / 96
    assert json.loads(json.dumps(dict(expected.provenance))) == expected.provenance
    few = vs.attention_map(model, pixels[:1], drop_artefacts=artefacts)  # too few patches to see a valley in them
    torch.testing.assert_close(few.values, expected.values[:1])
    for drop in (artefacts.threshold, artefacts):
        torch.testing.assert_close(
            vs.attention_map(model, pixels, drop_artefacts=drop).values, expected.values, rtol=0, atol=0
        )
    trace = vs.capture(model, pixels[2:])
    torch.testing.assert_close(vs.attention_map(trace, drop_artefacts=artefacts).values, expected.values[2:])
    one_image = replace(artefacts, places=artefacts.places & (torch.arange(4) == 2)[:, None, None])
    result = vs.attention_map(trace, drop_artefacts=one_image)  # the trace holds images 2 and 3
    assert result.provenance["dropped_artefacts"]["count"] == [4, 0]
    rollout = vs.rollout(model, pixels, drop_artefacts=True)
    torch.testing.assert_close(vs.rollout(trace, drop_artefacts=artefacts).values, rollout.values[2:])
    assert rollout.provenance["rows_sum_to_one"] is True
    assert rollout.provenance["row_sums"] == pytest.approx([1] * 4, abs=1e-5)
    kept = vs.rollout(model, pixels).values
    assert rollout.provenance["dropped_artefacts"]["share_of_map"] == pytest.approx(
        ((kept * example.places).sum((1, 2)) / kept.sum((1, 2))).tolist()
    )


@pytest.mark.parametrize("explain", [vs.attention_map, vs.rollout])
def test_without_a_valley_nothing_is_dropped_and_the_provenance_says_so(example: Planted, explain: Any) -> None:
    model = family("timm-vit").model()
    pixels = family("timm-vit").pixels()
    plain, result = explain(model, pixels), explain(model, pixels, drop_artefacts=True)
    torch.testing.assert_close(result.values, plain.values)
    assert result.dropped is None
    record = result.provenance["dropped_artefacts"]
    assert record["reason"].startswith("no valley between the norms after block 3")
    assert (record["threshold"], record["count"], record["patches"]) == (None, [0, 0], [[], []])
    added = {**plain.provenance, "dropped_artefacts": record}
    if "row_sums" in added:  # the heads are fused after the run, with other rounding
        added["row_sums"] = pytest.approx(added["row_sums"])
    assert result.provenance == added
    with vs.test_time_registers(example.model, [(BLOCK, NEURON)]):
        inside = explain(example.model, example.pixels, drop_artefacts=True)
    assert inside.dropped is None


def test_false_changes_nothing(example: Planted) -> None:
    for explain in (vs.attention_map, vs.rollout):
        plain = explain(example.model, example.pixels)
        result = explain(example.model, example.pixels, drop_artefacts=False)
        assert torch.equal(result.values, plain.values)
        assert result.provenance == plain.provenance
        assert result.dropped is None
        assert "dropped" not in result.as_json()
        assert "dropped_artefacts" not in result.provenance


def test_keys_are_left_out_of_every_form_of_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 1, 3, 6, 4, generator=generator)
    bias = torch.randn(1, 3, 6, 6, generator=generator)
    dropped = torch.tensor([[False, True, True, False, False, False], [False] * 5 + [True]])
    logits = query @ key.mT * 0.5
    for offset in (0.0, bias):
        expected = (logits + offset).double().masked_fill(dropped[:, None, None, None], -torch.inf).softmax(-1)
        forms = [
            Factored(query, key, 0.5, offset if isinstance(offset, torch.Tensor) else None),
            Logits(logits + offset),
            StoredWeights((logits + offset).softmax(-1)),
        ]
        for scores in forms:
            weights = next(without_keys(scores, dropped).blocks([slice(1, 4)]))
            torch.testing.assert_close(weights.double(), expected[..., 1:4, :], rtol=1e-5, atol=1e-7)


def test_a_saved_result_holds_the_dropped_patches(example: Planted, tmp_path: Any) -> None:
    result = vs.rollout(example.model, example.pixels, drop_artefacts=True)
    loaded = vs.Attribution.load(result.save(tmp_path / "map.safetensors"))
    assert torch.equal(loaded.dropped, example.places)
    assert torch.equal(result[1].dropped, example.places[1:2])
    plain = vs.rollout(example.model, example.pixels)[0]
    joined = vs.Attribution.join([plain, result[1]])
    assert torch.equal(joined.dropped, torch.stack([torch.zeros(8, 12, dtype=torch.bool), example.places[1]]))
    assert vs.Attribution.join([plain, plain]).dropped is None
    assert json.loads(result.save(tmp_path / "map.json").read_text())["dropped"] == example.places.tolist()


def test_dropped_patches_are_grey_and_do_not_darken_their_neighbours(example: Planted) -> None:
    result = vs.rollout(example.model, example.pixels[:1], drop_artefacts=16.0)
    view = result.images[0]
    painted = view.paint(result.values[0], dropped=result.dropped[0])
    missing = view.paint(example.places[0], smooth=False) > 0.5
    assert bool((torch.from_numpy(painted).isnan().numpy() == missing).all())
    values = result.values[0][~example.places[0]]
    assert painted[~missing].min() >= float(values.min()) > 0
    colours = torch.from_numpy(np.array(result.overlay(1.0))).float()[torch.from_numpy(missing)]
    assert float((colours.amax(-1) - colours.amin(-1)).max()) == 0


def refusals() -> list[Any]:
    return [
        ("yes", vs.CallError, "drop_artefacts is 'yes': pass True, a norm as the threshold, or the result of"),
        (None, vs.CallError, "drop_artefacts is None: pass True"),
        (
            0.5,
            vs.CallError,
            "all patches of image 0 have a norm above 0.5 after block 3 .index 2., so no map would remain",
        ),
    ]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("explain", [vs.attention_map, vs.rollout, vs.rollout_evolution])
def test_wrong_options_are_refused(example: Planted, artefacts: Artefacts, explain: Any) -> None:
    model, pixels = example.model, example.pixels
    trace = vs.capture(model, pixels)
    cases = [
        *[((model, pixels), *case) for case in refusals()],
        ((trace,), True, vs.CallError, "drop_artefacts is True, but a trace holds no norms: pass the model with"),
        ((trace,), 16.0, vs.CallError, "drop_artefacts is 16.0, but a trace holds no norms"),
        ((vs.capture(model, -pixels),), artefacts, vs.CallError, "the artefacts of other images than the trace"),
        (
            (vs.load("vit-nano"), pixels[:, :, :32, :32]),
            artefacts,
            vs.CallError,
            "the artefacts of Dinov2WithRegistersForImageClassification, and this model is vit-nano",
        ),
        (
            (vs.load("swin-nano"), pixels[:, :, :32, :32]),
            True,
            vs.UnsupportedModelError,
            "artefact tokens are not supported for swin-nano, a window transformer: pass a model",
        ),
        ((replace(trace, steps=trace.steps[:1], images=()), pixels), artefacts, vs.CallError, "has its images already"),
    ]
    for arguments, drop, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            explain(*arguments, drop_artefacts=drop)
        assert "\n" not in str(caught.value)
    with vs.test_time_registers(model, []):
        inside = vs.capture(model, pixels)
    with pytest.raises(vs.CallError, match="find the artefacts of the same run"):
        explain(inside, drop_artefacts=artefacts)


def test_blocks_with_windows_are_refused(example: Planted, artefacts: Artefacts) -> None:
    trace: Trace = vs.capture(example.model, example.pixels)
    order = torch.arange(101).flip(0)[None]
    odd = replace(trace, steps=[replace(step, slots=order) for step in trace.steps])
    with pytest.raises(vs.UnsupportedModelError, match="works on windows, so artefacts cannot be dropped"):
        vs.attention_map(odd, drop_artefacts=artefacts)
