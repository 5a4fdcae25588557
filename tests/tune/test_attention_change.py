"""What tuning did to attention: distances against a plain loop, where they are zero, and what is refused."""

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

FAITHFUL = {"deletion", "insertion", "random_deletion", "random_insertion"}


def random_images(count: int = 2, side: int = 32) -> list[np.ndarray]:
    return list(noise(count, side=side)[0])


def padded_swin() -> vs.VisionModel:
    """18 × 18 tokens and then 9 × 9, in windows of 4 × 4."""
    import transformers

    torch.manual_seed(0)
    shape: dict[str, Any] = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    config = transformers.SwinConfig(**shape, image_size=36, patch_size=2, num_labels=5)
    return vs.load(perturbed(transformers.SwinForImageClassification(config), 0.1))


def moved(model: vs.VisionModel, part: str = "", scale: float = 0.3) -> vs.VisionModel:
    """The model with other weights, in one part of it or everywhere."""
    module = copy.deepcopy(model.module)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if part in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return dataclasses.replace(vs.load(module), preprocessing=model.preprocessing)


def total_variation(before: vs.VisionModel, after: vs.VisionModel, images: Sequence[Any]) -> list[float]:
    """Query by query, in float64; a query on padding is no query."""
    layers = []
    for layer in range(vs.capture(before, images[0]).num_layers):
        per_image = []
        for image in images:
            first, second = (vs.capture(model, image).step(layer) for model in (before, after))
            a, b = first.weights().double().numpy(), second.weights().double().numpy()
            found = []
            for window in range(a.shape[1]):
                for head in range(a.shape[2]):
                    for query in range(a.shape[3]):
                        if first.slots is not None and int(first.slots[window, query]) < 0:
                            continue
                        found.append(np.abs(a[0, window, head, query] - b[0, window, head, query]).sum() / 2)
            per_image.append(sum(found) / len(found))
        layers.append(sum(per_image) / len(per_image))
    return layers


BUILDS: dict[str, Any] = {"vit": small_vit, "swin": small_swin, "padded": padded_swin}
every_build = pytest.mark.parametrize("name", BUILDS)


@every_build
def test_a_model_and_itself_attend_alike(name: str) -> None:
    model = BUILDS[name]()
    found = vs.attention_change(model, model, random_images())
    assert found.distances == (0.0,) * vs.capture(model, random_images(1)[0]).num_layers
    assert found.correlation == pytest.approx(1, abs=1e-6)
    assert np.array_equal(found.before, found.after)


@every_build
def test_distances_are_those_of_a_plain_loop(name: str) -> None:
    before = BUILDS[name]()
    after, side = moved(before), 36 if name == "padded" else 32
    found = vs.attention_change(before, after, random_images(2, side))
    assert found.distances == pytest.approx(total_variation(before, after, random_images(2, side)), abs=1e-6)
    assert all(0.001 < distance <= 1 for distance in found.distances)


def test_queries_on_padding_do_count_for_nothing() -> None:
    """There are some, and counting them would give other numbers."""
    before, image = padded_swin(), random_images(1, 36)[0]
    after = moved(before)
    found = vs.attention_change(before, after, [image])
    steps = [vs.capture(model, image).blocks for model in (before, after)]
    with_padding = [
        float((one.weights() - other.weights()).abs().sum(-1).mean() / 2) for one, other in zip(*steps, strict=True)
    ]
    assert all(bool((step.require_slots() < 0).any()) for step in steps[0])
    assert all(abs(one - other) > 1e-4 for one, other in zip(found.distances, with_padding, strict=True))


def test_attention_that_has_nothing_in_common_is_at_distance_one() -> None:
    """Every query looks at the CLS token alone, or at all the rest."""

    def looking(strength: float) -> vs.VisionModel:
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

    found = vs.attention_change(looking(1.0), looking(-1.0), random_images(1))
    assert found.distances == pytest.approx((1.0, 1.0), abs=1e-6)


@pytest.mark.parametrize("build", [small_vit, small_swin], ids=["vit", "swin"])
def test_what_comes_after_a_layer_does_not_change_it(build: Any) -> None:
    before = build()
    last = "layers.1.blocks.1" if before.library == "timm" else "layers.1."
    assert any(last in name for name, _ in before.module.named_parameters())
    found = vs.attention_change(before, moved(before, last), random_images())
    assert set(found.distances[:-1]) == {0.0}
    assert found.distances[-1] > 0.001


def test_what_is_read_from_the_attention_does_not_count() -> None:
    """The classifier and values change nothing in a layer's own map; the rollouts stay as they were."""
    before = small_vit()
    found = vs.attention_change(before, moved(before, "classifier"), random_images())
    assert found.distances == (0.0, 0.0)
    assert found.correlation == pytest.approx(1, abs=1e-6)


def test_rollouts_correlation_and_faithfulness_are_those_of_their_functions() -> None:
    before, images = small_vit(), random_images(3)
    after = moved(before)
    found = vs.attention_change(before, after, images)
    for model, values in ((before, found.before), (after, found.after)):
        np.testing.assert_allclose(values, vs.rollout(model, images).values.numpy(), atol=1e-7)
    pairs = zip(found.before, found.after, strict=True)
    expected = np.mean([np.corrcoef(a.astype(float).ravel(), b.astype(float).ravel())[0, 1] for a, b in pairs])
    assert found.correlation == pytest.approx(expected, abs=1e-5)
    assert found.correlation < 0.999
    for model, faithful in ((before, found.faithfulness_before), (after, found.faithfulness_after)):
        areas = vs.faithfulness(model, images, vs.rollout(model, images))
        assert faithful == {name: pytest.approx(float(getattr(areas, name).mean())) for name in FAITHFUL}
    assert found.faithfulness_before != found.faithfulness_after


def test_a_model_without_classes_is_asked_how_alike_its_features_stay() -> None:
    import transformers

    from tests.helpers.families import TINY

    torch.manual_seed(0)
    bare = transformers.ViTModel(transformers.ViTConfig(**(TINY | {"image_size": 32, "patch_size": 8}))).eval()
    before, images = vs.load(bare), random_images(2)
    after = reset_classifier(before, ("a", "b"))
    found = vs.attention_change(before, after, images)
    alike = vs.faithfulness(before, images, vs.rollout(before, images), target="similarity")
    assert found.faithfulness_before is not None
    assert found.faithfulness_before["deletion"] == pytest.approx(float(alike.deletion.mean()))
    assert found.faithfulness_before != found.faithfulness_after


def test_attention_of_other_shapes_is_refused() -> None:
    import transformers

    from tests.helpers.families import TINY

    images = random_images(1)
    config = transformers.ViTConfig(**(TINY | {"image_size": 32, "patch_size": 8, "num_hidden_layers": 3}))
    deeper = vs.load(transformers.ViTForImageClassification(config).eval())
    for other in (deeper, small_swin()):
        with pytest.raises(vs.CallError, match="attend in different shapes: they are not one model"):
            vs.attention_change(small_vit(), other, images)


def test_more_heads_are_another_shape() -> None:
    import transformers

    from tests.helpers.families import TINY

    size = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    fewer = vs.load(transformers.ViTForImageClassification(transformers.ViTConfig(**(TINY | size))).eval())
    with pytest.raises(vs.CallError, match="different shapes"):
        vs.attention_change(small_vit(), fewer, random_images(1))


def test_a_family_that_no_row_goes_through_has_distances_alone() -> None:
    before = dataclasses.replace(MAXVIT.model((64, 64)), preprocessing=Preprocessing((64, 64)))
    found = vs.attention_change(before, moved(before, scale=0.05), random_images(1, 64))
    assert (found.before, found.after, found.correlation) == (None,) * 3
    assert (found.faithfulness_before, found.faithfulness_after) == (None, None)
    assert len(found.distances) == vs.capture(before, random_images(1, 64)).num_layers
    assert all(0 < distance <= 1 for distance in found.distances)
    assert dataclasses.astuple(vs.AttentionChange.of_json(found.as_json())) == (found.distances, *(None,) * 5)


def test_json_holds_it_and_gives_it_back() -> None:
    before = small_vit()
    found = vs.attention_change(before, moved(before), random_images())
    text = json.dumps(found.as_json(), allow_nan=False)
    again = vs.AttentionChange.of_json(json.loads(text))
    assert again.distances == found.distances
    assert again.correlation == found.correlation
    assert again.faithfulness_before == found.faithfulness_before
    assert again.faithfulness_after == found.faithfulness_after
    for one, other in ((again.before, found.before), (again.after, found.after)):
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, other, atol=5.1e-7)
    assert json.dumps(again.as_json()) == text


def test_a_flat_rollout_correlates_with_nothing() -> None:
    even = np.full((1, 2, 2), 0.25, dtype=np.float32)
    about = vs.AttentionChange((0.1,), even, even, float("nan"), None, None).as_json()
    assert json.loads(json.dumps(about, allow_nan=False))["correlation"] is None
    assert vs.AttentionChange.of_json(about).correlation is None


def test_weights_and_flags_stay_as_they_were() -> None:
    before = small_vit()
    after = moved(before)
    kept = [weights(model) for model in (before, after)]
    after.module.train()
    vs.attention_change(before, after, random_images(1))
    assert after.module.training
    for model, old in zip((before, after), kept, strict=True):
        assert same(weights(model), old)
