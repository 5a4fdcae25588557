"""The importance of heads: equal to a plain run with hooks, its laws, options, refusals and Ctrl-C."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.contracts.test_leaks import assert_same, state
from tests.helpers import families, swin_families
from tests.helpers.families import Family, every_family
from tests.helpers.live import hf_vit, images, timm_swin, timm_vit
from tests.helpers.perturbed import noise
from tests.helpers.swin_families import SwinFamily, every_swin
from tests.helpers.tiny import tiny_vit
from tests.interventions.test_head_ablation import Residual, unfused_outputs
from tests.reference import head_ablation as slow
from vitscope.interventions.head_ablation import AblatedModel, Replacement


def check_equals_reference(family: Any, model: vs.VisionModel, pixels: Tensor, replacement: Replacement) -> None:
    model.module.double()
    pixels = pixels.double()
    blocks = slow.projections(family, model.module, pixels)
    result = vs.head_importance(model, pixels, replacement=replacement, batch_size=5)
    targets = unfused_outputs(model, pixels).argmax(-1).tolist()
    assert result.targets == tuple(model.label(target) for target in targets)
    expected = slow.importance(lambda: unfused_outputs(model, pixels), 2, blocks, targets, replacement)
    torch.testing.assert_close(result.values.double(), expected, atol=5e-6, rtol=0, equal_nan=True)
    assert result.layers == tuple(range(len(blocks)))
    for image in range(2):
        alone = vs.head_importance(model, pixels[image : image + 1], replacement=replacement)
        torch.testing.assert_close(alone.values, result.values[image : image + 1], atol=5e-6, rtol=0, equal_nan=True)
        assert alone.targets == result.targets[image : image + 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "replacement"), [("timm-vit", "mean"), ("transformers-vit", "zero"), ("torchvision-vit", "mean")]
)
def test_importance_equals_a_plain_run_with_hooks(name: str, replacement: Replacement) -> None:
    family = next(f for f in families.ALL if f.name == name)
    check_equals_reference(family, family.model(), family.pixels(), replacement)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "replacement"), [("transformers-swin", "mean"), ("timm-swin", "zero"), ("torchvision-swinv2", "mean")]
)
def test_importance_in_windows_equals_a_plain_run(name: str, replacement: Replacement) -> None:
    family = swin_families.family(name)
    size = family.sizes["padded"]
    check_equals_reference(family, family.model(size), swin_families.pixels(size), replacement)


def target_of(model: vs.VisionModel, pixels: Tensor) -> dict[str, Any]:
    with torch.no_grad(), model.running():
        return {"target": "similarity"} if model.logits_or_none(pixels) is None else {}


def check_contract(model: vs.VisionModel, pixels: Tensor) -> None:
    before = state(model.module)
    result = vs.head_importance(model, pixels, **target_of(model, pixels))
    assert_same(state(model.module), before)
    trace = vs.capture(model, pixels)
    assert result.values.shape == (2, trace.num_layers, max(step.num_heads for step in trace.blocks))
    for layer, step in enumerate(trace.blocks):
        assert bool(result.values[:, layer, : step.num_heads].isfinite().all())
        assert bool(result.values[:, layer, step.num_heads :].isnan().all())
    assert float(result.values.nan_to_num().abs().max()) > 1e-5
    for image in range(2):
        alone = vs.head_importance(model, pixels[image : image + 1], **target_of(model, pixels), batch_size=3)
        torch.testing.assert_close(alone.values[0], result.values[image], atol=2e-4, rtol=0, equal_nan=True)
    json.dumps(result.as_json(), allow_nan=False)


@pytest.mark.slow
@every_family
@pytest.mark.usefixtures("unchecked")
def test_contract_of_every_family(family: Family) -> None:
    check_contract(family.model(), family.pixels())


@pytest.mark.slow
@every_swin
@pytest.mark.usefixtures("unchecked")
def test_contract_of_every_window_transformer(family: SwinFamily) -> None:
    check_contract(family.model(), swin_families.pixels(swin_families.SIZES["fitting"]))


def test_importance_adds_up_if_the_output_is_linear_in_the_heads() -> None:
    module = Residual().double()
    model = vs.load(module, patch_size=8, prefix=(), readout="patches")
    pixels = images(1).double()
    result = vs.head_importance(model, pixels, target=2, replacement="zero")
    x = module.patches(pixels).flatten(2).mT
    attended = module.attention(x, x, x, need_weights=False)[0] - module.attention.out_proj.bias
    expected = attended.mean(1) @ module.head.weight[2]
    torch.testing.assert_close(result.values.double().sum((1, 2)), expected.detach(), atol=1e-6, rtol=0)
    # Mean ablation preserves the mean over the tokens, which is all that the classifier reads.
    with pytest.warns(vs.VitscopeWarning, match="no head changes its logit"):
        assert vs.head_importance(model, pixels, target=2).values.tolist() == [[[0.0] * 4]]


class OneHead(Residual):
    """A model in which only the first of four heads reaches the output."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.attention.out_proj.weight[:, 4:] = 0


def test_only_the_head_that_the_output_depends_on_is_important() -> None:
    model = vs.load(OneHead(), patch_size=8, prefix=(), readout="patches")
    values = vs.head_importance(model, images(), target=1, replacement="zero").values
    assert bool((values[:, 0, 0].abs() > 1e-3).all())
    assert float(values[:, 0, 1:].abs().max()) < 1e-6


@pytest.mark.slow
def test_a_target_is_an_index_or_a_label_and_the_output_a_probability() -> None:
    model = vs.load("vit-nano")
    photos = [noise(40, 40, seed) for seed in range(2)]
    by_label, by_index = (vs.head_importance(model, photos, target=target) for target in ("cat", 3))
    assert torch.equal(by_label.values, by_index.values)
    assert by_label.targets == by_index.targets == ("cat", "cat")
    probability = vs.head_importance(model, photos, target="cat", output="probability")
    assert probability.provenance["parameters"] == {"by": "ablation", "replacement": "mean", "output": "probability"}
    assert float(probability.values.abs().max()) < 1
    outputs = [predictions[0] for predictions in model.predict(photos, top_k=1)]
    top = vs.head_importance(model, photos, output="probability")
    assert top.targets == tuple(prediction.label for prediction in outputs)
    assert top.provenance["outputs"] == pytest.approx([prediction.probability for prediction in outputs], abs=1e-5)


def test_the_result_is_short_as_text_and_complete_as_json(chelsea: np.ndarray) -> None:
    result = vs.head_importance(vs.load("swin-nano"), chelsea)
    assert repr(result) == (
        "<HeadImportance of swin-nano by ablation: 1 image, 8 layers of up to 16 heads, -0.228 to 0.865, target dog>"
    )
    entries = json.loads(json.dumps(result.as_json(), allow_nan=False))
    assert entries["values"][0][0][4:] == [None] * 12
    assert entries["values"][0][7][15] == pytest.approx(float(result.values[0, 7, 15]))
    assert entries["targets"] == ["dog"]
    assert entries["provenance"]["samples"] == 72
    bare = vs.HeadImportance(torch.zeros(2, 1, 3, device="cpu"), (0,), ("a\nb", "c"))
    assert repr(bare) == (
        "<HeadImportance of no model by an unknown measure: 2 images, 1 layer of up to 3 heads, 0, target a\\nb, c>"
    )


def test_progress_counts_the_heads_of_each_image() -> None:
    steps: list[tuple[int, int | None]] = []
    model = vs.load(timm_swin())
    vs.head_importance(model, images(), batch_size=5, progress=lambda step: steps.append((step.completed, step.total)))
    assert steps == [(5, 12), (10, 12), (12, 12)] * 2


def test_ctrl_c_leaves_heads_without_a_value() -> None:
    model = vs.load(tiny_vit())
    steps: list[int] = []

    def press(_: vs.Progress) -> None:
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt

    photos = [noise(20, 30, seed) for seed in range(3)]
    with (
        pytest.warns(vs.VitscopeWarning, match="interrupted: the result is based on 8 of 12"),
        pytest.warns(vs.VitscopeWarning, match="interrupted: the result holds the first 2 of 3 images"),
    ):
        result = vs.head_importance(model, photos, target=0, batch_size=4, progress=press)
    complete = vs.head_importance(model, photos, target=0, batch_size=4)
    assert result.provenance["interrupted"] is True
    assert result.provenance["samples"] == 20
    torch.testing.assert_close(result.values[0], complete.values[0])
    torch.testing.assert_close(result.values[1, :2], complete.values[1, :2])
    assert bool(result.values[1, 2].isnan().all())


def test_ctrl_c_before_two_heads_is_raised() -> None:
    def press(_: vs.Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vs.head_importance(vs.load(tiny_vit()), noise(20, 30), target=0, batch_size=1, progress=press)


def test_a_batch_that_does_not_fit_in_memory_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vs.load(tiny_vit())
    expected = vs.head_importance(model, noise(20, 30), target=0)
    run = AblatedModel.run

    def limited(self: AblatedModel, evaluate: Any, pixels: Tensor, *args: Any) -> Tensor:
        if len(pixels) > 6:
            raise torch.OutOfMemoryError
        return run(self, evaluate, pixels, *args)

    monkeypatch.setattr(AblatedModel, "run", limited)
    with pytest.warns(vs.VitscopeWarning, match="not enough memory for a batch of 12: continuing with 6"):
        result = vs.head_importance(model, noise(20, 30), target=0)
    torch.testing.assert_close(result.values, expected.values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "unicorn"}, "target 'unicorn' is not a label of this model"),
        ({"target": 10}, "target 10 does not exist: the model has classes 0 to 9"),
        ({"by": "magic"}, "unknown measure 'magic': choose ablation"),
        ({"replacement": "noise"}, "unknown replacement 'noise': choose mean or zero"),
        ({"output": "loss"}, "unknown output 'loss': choose logit, log_odds, probability, log_probability"),
        ({"batch_size": 0}, "batch_size is 0, at least 1 is expected"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_options_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(vs.CallError) as caught:
        vs.head_importance(vs.load("vit-nano"), noise(40, 40), **options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_an_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'seed'"):
        vs.head_importance(vs.load("vit-nano"), noise(40, 40), seed=1)


@pytest.mark.usefixtures("unchecked")
def test_missing_images_and_models_without_classes_or_attention_are_refused() -> None:
    with pytest.raises(vs.CallError, match="no image"):
        vs.head_importance(vs.load("vit-nano"), [])
    with pytest.raises(vs.CallError, match="has no classifier, so there is no class to explain"):
        vs.head_importance(vs.load(timm_vit(0)), images())
    module = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(vs.UnsupportedModelError, match="attention"):
        vs.head_importance(vs.load(module), images())


def test_photos_of_other_sizes_share_a_result() -> None:
    model = vs.load(hf_vit(), image_size=32)
    result = vs.head_importance(model, [noise(40, 36), noise(20, 70)], target=0)
    assert result.values.shape == (2, 2, 2)
    assert not math.isnan(float(result.values.sum()))


def test_top_heads_are_the_largest_of_each_sign() -> None:
    values = torch.tensor([[[0.25, -1.0, torch.nan], [0.5, 0.0, -2.0]], [[3.0] * 3] * 2], device="cpu")
    result = vs.HeadImportance(values, (4, 5), ("cat", "dog"))
    assert result.top() == [(5, 0), (4, 0)]
    assert result.top(1) == [(5, 0)]
    assert result.top(sign="negative") == [(5, 2), (4, 1)]
    assert result.top(3, sign="both") == [(5, 2), (4, 1), (5, 0)]
    assert len(result.top(10, index=1)) == 6
    for options, message in (
        ({"sign": "up"}, "sign is 'up': choose positive, negative, both"),
        ({"count": -1}, "count is -1"),
        ({"index": 2}, "image 2 is out of range"),
    ):
        with pytest.raises(vs.CallError, match=message):
            result.top(**options)


def test_halves_of_a_batch_without_memory_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    model, photos = vs.load("vit-nano"), [noise(40, 40, seed) for seed in range(3)]
    expected = vs.head_importance(model, photos, by="gradient")
    forward = type(model.module).forward

    def limited(self: nn.Module, pixel_values: torch.Tensor, **options: Any) -> Any:
        if len(pixel_values) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, pixel_values, **options)

    monkeypatch.setattr(type(model.module), "forward", limited)
    with pytest.warns(vs.VitscopeWarning, match="continuing with 1"):
        result = vs.head_importance(model, photos, by="gradient")
    np.testing.assert_allclose(result.values, expected.values, atol=1e-5)
    assert (result.targets, result.provenance["samples"]) == (expected.targets, 3)
    assert result.provenance["outputs"] == pytest.approx(expected.provenance["outputs"], abs=1e-4)


@pytest.mark.parametrize("by", ["ablation", "gradient"])
def test_a_class_that_no_head_changes_is_announced(by: Any) -> None:
    model = vs.load("vit-nano")
    with torch.no_grad():
        model.module.classifier.weight[3] = 0
    with pytest.warns(vs.VitscopeWarning, match="is zero everywhere: no head changes its logit"):
        vs.head_importance(model, noise(40, 40, 0), target=3, by=by)
