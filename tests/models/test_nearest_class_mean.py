"""Few-shot classifiers: the formula, their use in all methods, and refused examples."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitscope as vs
from tests.contracts.test_leaks import assert_same, mixed, state
from tests.helpers import families
from tests.helpers.tiny import tiny_vit
from tests.reference.stage import noise, painted

EXAMPLES = {
    name: [noise(30 + i, 40, 10 * index + i) for i in range(2 + index)] for index, name in enumerate(("a", "b", "c"))
}


def family(name: str) -> families.Family:
    return next(family for family in families.ALL if family.name == name)


def bare() -> vs.VisionModel:
    return family("transformers-vit-bare").model()


def expected(model: vs.VisionModel, examples: dict[str, Any], image: Any, temperature: float) -> np.ndarray:
    """Return cos(f − μ, m − μ) / temperature, computed for each image and class separately."""

    def features(image: Any) -> np.ndarray:
        with torch.no_grad(), model.running():
            return model.features(model.prepare(image)[0])[0].double().numpy()

    means = [np.mean([features(example) for example in images], axis=0) for images in examples.values()]
    center = np.mean(means, axis=0)
    centred = features(image) - center
    cosines = [centred @ (mean - center) / np.linalg.norm(centred) / np.linalg.norm(mean - center) for mean in means]
    return np.array(cosines) / temperature


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.07, 1, 0.5])
@pytest.mark.parametrize("name", ["transformers-vit-bare", "transformers-dinov2", "transformers-clip"])
def test_logits_match_the_formula(name: str, temperature: float) -> None:
    model = family(name).model()
    classifier = vs.few_shot_classifier(model, EXAMPLES, temperature=temperature)
    assert classifier.labels == ("a", "b", "c")
    photo = noise(33, 44, 99)
    with torch.no_grad(), classifier.running():
        logits = classifier.logits(classifier.prepare([photo, EXAMPLES["b"][0]])[0])
    assert logits is not None
    assert logits[0].numpy() == pytest.approx(expected(model, EXAMPLES, photo, temperature), abs=2e-4 / temperature)
    of_example = expected(model, EXAMPLES, EXAMPLES["b"][0], temperature)
    assert logits[1].numpy() == pytest.approx(of_example, abs=2e-4 / temperature)
    assert model.labels is None
    assert model.embed is not None


def test_the_default_temperature_is_dinos() -> None:
    photo = noise(33, 44, 99)
    cold = vs.few_shot_classifier(bare(), EXAMPLES).predict(photo, top_k=3)
    assert cold == vs.few_shot_classifier(bare(), EXAMPLES, temperature=0.07).predict(photo, top_k=3)
    scaled = np.exp(expected(bare(), EXAMPLES, photo, 0.07))
    by_name = {prediction.label: prediction.probability for prediction in cold[0]}
    assert [by_name[name] for name in "abc"] == pytest.approx(scaled / scaled.sum(), abs=1e-3)


def test_examples_can_be_images_of_any_type(tmp_path: Path) -> None:
    Image.fromarray(EXAMPLES["b"][0]).save(tmp_path / "b.png")
    tensor = bare().prepare(EXAMPLES["c"][0])[0]
    mixed = {"a": tuple(EXAMPLES["a"]), "b": tmp_path / "b.png", "c": tensor}
    plain = {"a": EXAMPLES["a"], "b": EXAMPLES["b"][:1], "c": EXAMPLES["c"][:1]}
    photo = noise(33, 44, 99)
    predictions, expected_predictions = (
        vs.few_shot_classifier(bare(), examples).predict(photo)[0] for examples in (mixed, plain)
    )
    assert [(p.label, p.probability) for p in predictions] == [
        (p.label, pytest.approx(p.probability, abs=1e-6)) for p in expected_predictions
    ]


def test_a_folder_of_folders_names_the_classes(tmp_path: Path) -> None:
    for name, images in (("n02123045_tabby_cat", "a"), ("bull mastiff", "b")):
        (tmp_path / name).mkdir()
        for index, image in enumerate(EXAMPLES[images]):
            Image.fromarray(image).save(tmp_path / name / f"{index}.png")
    (tmp_path / ".hidden").write_text("no image")
    classifier = vs.few_shot_classifier(bare(), tmp_path)
    assert classifier.labels == ("bull mastiff", "tabby cat")
    same = vs.few_shot_classifier(bare(), {"bull mastiff": EXAMPLES["b"], "tabby cat": EXAMPLES["a"]})
    photo = noise(33, 44, 99)
    assert classifier.predict(photo) == same.predict(photo)
    assert vs.few_shot_classifier(bare(), str(tmp_path)).predict(photo) == same.predict(photo)


def test_hidden_files_are_not_examples(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.fromarray(EXAMPLES[name][0]).save(tmp_path / name / "1.png")
        (tmp_path / name / ".DS_Store").write_text("no image")
    assert vs.few_shot_classifier(bare(), tmp_path).labels == ("a", "b")


def test_an_empty_class_folder_is_refused(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
    for name in "ab":
        Image.fromarray(EXAMPLES[name][0]).save(tmp_path / name / "1.png")
    with pytest.raises(vs.CallError, match=r"c.* no (examples|images)") as caught:
        vs.few_shot_classifier(bare(), tmp_path)
    assert "\n" not in str(caught.value)


def test_single_images_name_their_classes(tmp_path: Path) -> None:
    for name, image in (("n01776313_tick", "a"), ("milk_can", "b")):
        Image.fromarray(EXAMPLES[image][0]).save(tmp_path / f"{name}.png")
    classifier = vs.few_shot_classifier(bare(), tmp_path)
    assert classifier.labels == ("milk can", "tick")
    assert classifier.predict(EXAMPLES["a"][0])[0][0].label == "tick"


@pytest.mark.slow
def test_it_works_in_all_methods_for_classifiers() -> None:
    classifier, photo = vs.few_shot_classifier(bare(), EXAMPLES), painted(44, 60, (10, 10, 16, 16))
    objects = [vs.object_mask(photo, box=(10, 10, 16, 16), name="thing", label="b")]
    result = vs.compose(classifier, photo, objects, tests=("size", "location", "controls"), places=2, attention=True)
    assert list(result.labels) == ["a", "b", "c"]
    assert result.location_map().target == "b"
    np.testing.assert_allclose(result.outputs.sum(1), 1, atol=1e-5)
    with torch.no_grad(), classifier.running():
        logits = classifier.logits(classifier.prepare(result.image("thing × 0.5"))[0])
    assert logits is not None
    np.testing.assert_allclose(result.outputs[result.index_of("thing × 0.5")], logits.softmax(-1)[0], atol=1e-5)
    assert result.rollouts is not None
    rolled = vs.rollout(bare(), result.image(0)).values[0]
    np.testing.assert_allclose(result.rollouts[0], rolled, atol=1e-6)
    assert any(image.neutral for image in result.edited_images)
    lime = vs.lime(classifier, photo, target="c", num_samples=130, segments="patches")
    assert lime.target == "c"
    assert bool(lime.weights.any())
    assert vs.rollout(classifier, photo).values.shape == (1, 4, 4)


@pytest.mark.usefixtures("unchecked")
def test_the_module_does_not_change() -> None:
    model = bare()
    mixed(model.module)
    before = state(model.module)
    vs.few_shot_classifier(model, EXAMPLES).predict(noise(30, 30))
    assert_same(state(model.module), before)


def test_gradients_pass_through_the_classes() -> None:
    classifier = vs.few_shot_classifier(bare(), EXAMPLES)
    logits = classifier.logits(classifier.prepare(noise(30, 30))[0].requires_grad_())
    assert logits is not None
    assert logits.requires_grad


@pytest.mark.usefixtures("unchecked")
def test_invalid_examples_are_refused(tmp_path: Path) -> None:
    for name in ("empty", "one", "damaged"):
        (tmp_path / name).mkdir()
    for name in ("x", "y"):
        (tmp_path / "damaged" / name).mkdir()
        (tmp_path / "damaged" / name / "1.png").write_text("no image")
    Image.fromarray(EXAMPLES["a"][0]).save(tmp_path / "one" / "cat.png")
    wrong: list[tuple[Any, Any, dict[str, Any], str]] = [
        (bare(), tmp_path / "nowhere", {}, "nowhere is not a folder: pass one with a folder of images for each class"),
        (bare(), tmp_path / "one" / "cat.png", {}, "is not a folder"),
        (bare(), tmp_path / "empty", {}, "contains no images"),
        (bare(), tmp_path / "one", {}, "examples must contain two classes or more, not 1"),
        (bare(), tmp_path / "damaged", {}, "is not an image"),
        (bare(), {}, {}, "examples must contain two classes or more, not 0"),
        (bare(), {"a": EXAMPLES["a"]}, {}, "examples must contain two classes or more, not 1"),
        (bare(), {"a": EXAMPLES["a"], "b": []}, {}, "a class has no examples"),
        (bare(), {"a": EXAMPLES["a"], "b": "nowhere.png"}, {}, "nowhere.png does not exist"),
        (bare(), EXAMPLES, {"temperature": 0}, "temperature is 0: pass a number above 0"),
        (bare(), EXAMPLES, {"temperature": -1.0}, "temperature is -1.0"),
        (bare(), EXAMPLES, {"temperature": "cold"}, "temperature is 'cold', a number"),
        (
            vs.load(tiny_vit()),
            EXAMPLES,
            {},
            "has classes already: pass a model that returns features, without a classifier",
        ),
        (
            vs.load(torch.nn.Conv2d(3, 4, 8), image_size=16),
            EXAMPLES,
            {},
            "returns no features that vitscope recognises",
        ),
        (vs.few_shot_classifier(bare(), EXAMPLES), EXAMPLES, {}, "has classes already"),
    ]
    for model, examples, options, message in wrong:
        with pytest.raises(vs.VitscopeError, match=message) as caught:
            vs.few_shot_classifier(model, examples, **options)
        assert "\n" not in str(caught.value)


def test_a_live_module_is_loaded_first() -> None:
    classifier = vs.few_shot_classifier(bare().module, EXAMPLES)
    assert classifier.labels == tuple(EXAMPLES)
