"""What tuning did to attention: distances against a plain loop, when they are zero, and which models are refused."""

import copy
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import vitscope as vs
from tests.helpers.coloured import noise, small_swin, small_vit
from tests.helpers.every_model import same, weights
from tests.helpers.swin_families import MAXVIT, perturbed
from tests.tracing.test_foreign import LAYOUT, Homemade
from vitscope.images.preprocessing import Preprocessing
from vitscope.models.heads import reset_classifier

AREAS = {"deletion", "insertion", "random_deletion", "random_insertion"}


def random_images(count: int = 2, side: int = 32) -> list[np.ndarray]:
    return list(noise(count, side=side)[0])


def padded_swin() -> vs.VisionModel:
    """Return a Swin with 18 × 18 tokens and then 9 × 9, in windows of 4 × 4."""
    import transformers

    torch.manual_seed(0)
    shape: dict[str, Any] = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    config = transformers.SwinConfig(**shape, image_size=36, patch_size=2, num_labels=5)
    return vs.load(perturbed(transformers.SwinForImageClassification(config), 0.1))


def with_other_weights(model: vs.VisionModel, path: str = "", scale: float = 0.3) -> vs.VisionModel:
    """Return the model with other weights, everywhere or below one path."""
    module = copy.deepcopy(model.module)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if path in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return dataclasses.replace(vs.load(module), preprocessing=model.preprocessing)


def total_variation(before: vs.VisionModel, after: vs.VisionModel, images: Sequence[Any]) -> list[float]:
    """Return the mean distance of each layer, query by query in float64, without queries on padding."""
    layers = []
    for layer in range(vs.capture(before, images[0]).num_layers):
        per_image = []
        for image in images:
            first, second = (vs.capture(model, image).step(layer) for model in (before, after))
            a, b = first.weights().double().numpy(), second.weights().double().numpy()
            distances = []
            for window in range(a.shape[1]):
                for head in range(a.shape[2]):
                    for query in range(a.shape[3]):
                        if first.slots is not None and int(first.slots[window, query]) < 0:
                            continue
                        distances.append(np.abs(a[0, window, head, query] - b[0, window, head, query]).sum() / 2)
            per_image.append(sum(distances) / len(distances))
        layers.append(sum(per_image) / len(per_image))
    return layers


BUILDS: dict[str, Any] = {"vit": small_vit, "swin": small_swin, "padded": padded_swin}
every_build = pytest.mark.parametrize("name", BUILDS)


@pytest.mark.slow
@every_build
def test_a_model_and_itself_attend_alike(name: str) -> None:
    model = BUILDS[name]()
    change = vs.attention_change(model, model, random_images())
    assert change.distances == (0.0,) * vs.capture(model, random_images(1)[0]).num_layers
    assert change.correlation == pytest.approx(1, abs=1e-6)
    assert np.array_equal(change.before, change.after)


@pytest.mark.slow
@every_build
def test_distances_are_those_of_a_plain_loop(name: str) -> None:
    before = BUILDS[name]()
    after, side = with_other_weights(before), 36 if name == "padded" else 32
    change = vs.attention_change(before, after, random_images(2, side))
    assert change.distances == pytest.approx(total_variation(before, after, random_images(2, side)), abs=1e-6)
    assert all(0.001 < distance <= 1 for distance in change.distances)


@pytest.mark.slow
def test_queries_on_padding_do_not_count() -> None:
    """There are queries on padding, and counting them would change the distances."""
    before, image = padded_swin(), random_images(1, 36)[0]
    after = with_other_weights(before)
    change = vs.attention_change(before, after, [image])
    steps = [vs.capture(model, image).blocks for model in (before, after)]
    with_padding = [float((a.weights() - b.weights()).abs().sum(-1).mean() / 2) for a, b in zip(*steps, strict=True)]
    assert all(bool((step.require_slots() < 0).any()) for step in steps[0])
    assert all(abs(a - b) > 1e-4 for a, b in zip(change.distances, with_padding, strict=True))


@pytest.mark.slow
def test_disjoint_attention_has_distance_one() -> None:
    """Every query attends to the CLS token alone, or to all other tokens."""

    def model_with(strength: float) -> vs.VisionModel:
        module = Homemade("by hand")
        with torch.no_grad():
            for layer in module.stages:
                layer.qkv.weight.zero_()
                layer.qkv.bias.zero_()
                layer.qkv.weight[0, 0] = layer.qkv.weight[8, 0] = 1.0  # of each head: query and key
                layer.qkv.weight[16, 0] = layer.qkv.weight[24, 0] = strength
                layer.out.weight.zero_()
                layer.out.bias.zero_()
            module.embed.weight.zero_()
            module.embed.bias.zero_()
            module.embed.bias[0] = 30.0
            module.cls.zero_()
            module.cls[..., 0] = 60.0
        return vs.load(module, image_size=32, **LAYOUT)

    change = vs.attention_change(model_with(1.0), model_with(-1.0), random_images(1))
    assert change.distances == pytest.approx((1.0, 1.0), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("build", [small_vit, small_swin], ids=["vit", "swin"])
def test_later_weights_do_not_change_the_attention_of_a_layer(build: Any) -> None:
    before = build()
    last = "layers.1.blocks.1" if before.library == "timm" else "layers.1."
    assert any(last in name for name, _ in before.module.named_parameters())
    change = vs.attention_change(before, with_other_weights(before, last), random_images())
    assert set(change.distances[:-1]) == {0.0}
    assert change.distances[-1] > 0.001


@pytest.mark.slow
def test_the_classifier_changes_no_attention() -> None:
    """Distances are zero, and the rollouts are the same."""
    before = small_vit()
    change = vs.attention_change(before, with_other_weights(before, "classifier"), random_images())
    assert change.distances == (0.0, 0.0)
    assert change.correlation == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
def test_rollouts_correlation_and_faithfulness_are_those_of_their_functions() -> None:
    before, images = small_vit(), random_images(3)
    after = with_other_weights(before)
    change = vs.attention_change(before, after, images)
    for model, values in ((before, change.before), (after, change.after)):
        np.testing.assert_allclose(values, vs.rollout(model, images).values.numpy(), atol=1e-7)
    pairs = zip(change.before, change.after, strict=True)
    expected = np.mean([np.corrcoef(a.astype(float).ravel(), b.astype(float).ravel())[0, 1] for a, b in pairs])
    assert change.correlation == pytest.approx(expected, abs=1e-5)
    assert change.correlation < 0.999
    for model, areas in ((before, change.faithfulness_before), (after, change.faithfulness_after)):
        expected_areas = vs.faithfulness(model, images, vs.rollout(model, images))
        assert areas == {name: pytest.approx(float(getattr(expected_areas, name).mean())) for name in AREAS}
    assert change.faithfulness_before != change.faithfulness_after


@pytest.mark.slow
def test_faithfulness_of_a_model_without_classes_follows_the_similarity_of_its_features() -> None:
    import transformers

    from tests.helpers.families import TINY

    torch.manual_seed(0)
    bare = transformers.ViTModel(transformers.ViTConfig(**(TINY | {"image_size": 32, "patch_size": 8}))).eval()
    before, images = vs.load(bare), random_images(2)
    after = reset_classifier(before, ("a", "b"))
    change = vs.attention_change(before, after, images)
    areas = vs.faithfulness(before, images, vs.rollout(before, images), target="similarity")
    assert change.faithfulness_before is not None
    assert change.faithfulness_before["deletion"] == pytest.approx(float(areas.deletion.mean()))
    assert change.faithfulness_before != change.faithfulness_after


def test_models_with_different_shapes_are_refused() -> None:
    import transformers

    from tests.helpers.families import TINY

    images = random_images(1)
    config = transformers.ViTConfig(**(TINY | {"image_size": 32, "patch_size": 8, "num_hidden_layers": 3}))
    deeper = vs.load(transformers.ViTForImageClassification(config).eval())
    for after in (deeper, small_swin()):
        with pytest.raises(
            vs.CallError, match=r"cannot compare .*, whose attention has different shapes: pass one model"
        ):
            vs.attention_change(small_vit(), after, images)


def test_another_number_of_heads_is_refused() -> None:
    import transformers

    from tests.helpers.families import TINY

    size = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    fewer = vs.load(transformers.ViTForImageClassification(transformers.ViTConfig(**(TINY | size))).eval())
    with pytest.raises(vs.CallError, match="different shapes"):
        vs.attention_change(small_vit(), fewer, random_images(1))


@pytest.mark.slow
def test_a_family_without_rollout_has_only_distances() -> None:
    before = dataclasses.replace(MAXVIT.model((64, 64)), preprocessing=Preprocessing((64, 64)))
    change = vs.attention_change(before, with_other_weights(before, scale=0.05), random_images(1, 64))
    assert (change.before, change.after, change.correlation) == (None,) * 3
    assert (change.faithfulness_before, change.faithfulness_after) == (None, None)
    assert len(change.distances) == vs.capture(before, random_images(1, 64)).num_layers
    assert all(0 < distance <= 1 for distance in change.distances)
    assert dataclasses.astuple(vs.AttentionChange.from_json(change.as_json())) == (change.distances, *(None,) * 5)


def test_a_change_survives_json() -> None:
    before = small_vit()
    change = vs.attention_change(before, with_other_weights(before), random_images())
    text = json.dumps(change.as_json(), allow_nan=False)
    again = vs.AttentionChange.from_json(json.loads(text))
    assert again.distances == change.distances
    assert again.correlation == change.correlation
    assert again.faithfulness_before == change.faithfulness_before
    assert again.faithfulness_after == change.faithfulness_after
    for loaded, saved in ((again.before, change.before), (again.after, change.after)):
        assert loaded.dtype == np.float32
        np.testing.assert_allclose(loaded, saved, atol=5.1e-7)
    assert json.dumps(again.as_json()) == text


def test_a_flat_rollout_has_no_correlation() -> None:
    even = np.full((1, 2, 2), 0.25, dtype=np.float32)
    record = vs.AttentionChange((0.1,), even, even, float("nan"), None, None).as_json()
    assert json.loads(json.dumps(record, allow_nan=False))["correlation"] is None
    assert vs.AttentionChange.from_json(record).correlation is None


def test_weights_and_flags_do_not_change() -> None:
    before = small_vit()
    after = with_other_weights(before)
    weights_before = [weights(model) for model in (before, after)]
    after.module.train()
    vs.attention_change(before, after, random_images(1))
    assert after.module.training
    for model, expected in zip((before, after), weights_before, strict=True):
        assert same(weights(model), expected)
