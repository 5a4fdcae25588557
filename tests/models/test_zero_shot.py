"""Zero-shot classifiers from CLIP and SigLIP, against the library's own logits_per_image."""

import copy
import gc
import pickle
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vitscope as vs
from tests.helpers.live import PHOTO, images
from tests.helpers.text_image import (
    FAMILIES,
    TEXTS,
    library_logits,
    save,
    text_image,
    tokenizer,
)
from vitscope.errors import VitscopeError
from vitscope.models.heads import reset_classifier
from vitscope.models.zero_shot import zero_shot_classifier
from vitscope.tracing.gradients import GradientOptions, capture_gradients

DOUBLE = torch.float64
every_family = pytest.mark.parametrize("family", FAMILIES)


def logits(model: vs.VisionModel, pixels: Tensor) -> Tensor:
    """Return the logits of a model without a graph."""
    with torch.no_grad(), model.running():
        rows = model.logits(pixels)
    assert rows is not None
    return rows


def message(error: type[VitscopeError], call: Callable[[], Any]) -> str:
    """Return the one-line message of an error that a call raises."""
    with pytest.raises(error) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@every_family
def test_logits_are_those_of_the_library(family: str, tmp_path: Path) -> None:
    module, words = save(family, tmp_path, dtype=DOUBLE), tokenizer(family, tmp_path / "vocabulary")
    model, pixels = vs.load(tmp_path, labels=TEXTS), images(3).to(DOUBLE)
    with torch.no_grad():
        expected = library_logits(module, family, words, TEXTS, pixels)
    assert model.dtype == DOUBLE
    assert expected.std() > 0.01
    torch.testing.assert_close(logits(model, pixels), expected, rtol=0, atol=1e-10)


@every_family
def test_a_live_module_gives_the_same_logits(family: str, tmp_path: Path) -> None:
    module, words = text_image(family).to(DOUBLE), tokenizer(family, tmp_path)
    pixels = images(2).to(DOUBLE)
    with torch.no_grad():
        expected = library_logits(module, family, words, TEXTS, pixels)
    torch.testing.assert_close(
        logits(vs.load(module, labels=TEXTS, tokenizer=words), pixels), expected, rtol=0, atol=1e-10
    )


@every_family
def test_gradients_to_pixels_are_those_of_the_library(family: str, tmp_path: Path) -> None:
    module, words = save(family, tmp_path, dtype=DOUBLE), tokenizer(family, tmp_path / "vocabulary")
    model = vs.load(tmp_path, labels=TEXTS)
    gradients = []
    for run in (model.logits, lambda pixels: library_logits(module, family, words, TEXTS, pixels)):
        pixels = images(2).to(DOUBLE).requires_grad_()
        rows = run(pixels)
        assert rows is not None
        gradients.extend(torch.autograd.grad(rows[:, 1].sum(), pixels))
    assert gradients[0].abs().max() > 1e-4
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-10)


@every_family
def test_each_text_is_independent_of_the_others(family: str, tmp_path: Path) -> None:
    """More texts than one batch of the text tower takes, of different lengths."""
    save(family, tmp_path, dtype=DOUBLE)
    many = [f"{'a photo of ' * (number % 3)}cat {'dog ' * (number % 4)}" for number in range(70)]
    model = vs.load(tmp_path)
    vectors = model.text_logits(many).vectors
    assert vectors.shape == (70, 16 if family == "clip" else 32)
    for index in (0, 2, 63, 64, 69):
        torch.testing.assert_close(model.text_logits([many[index]]).vectors[0], vectors[index], rtol=0, atol=1e-10)


@every_family
def test_probabilities_are_a_softmax_for_clip_and_sigmoids_for_siglip(family: str, tmp_path: Path) -> None:
    save(family, tmp_path)
    model = vs.load(tmp_path, labels=TEXTS)
    rows = logits(model, model.prepare(PHOTO)[0])
    expected = rows.softmax(-1) if family == "clip" else rows.sigmoid()
    assert model.meaning == ("softmax" if family == "clip" else "sigmoid")
    assert model.labels == tuple(TEXTS)
    predictions = {prediction.label: prediction.probability for prediction in model.predict(PHOTO)[0]}
    assert predictions == {label: pytest.approx(float(value)) for label, value in zip(TEXTS, expected[0], strict=True)}


@pytest.mark.slow
@every_family
def test_attention_and_rollout_are_those_of_the_vision_tower(family: str, tmp_path: Path) -> None:
    save(family, tmp_path)
    plain, labelled = vs.load(tmp_path), vs.load(tmp_path, labels=TEXTS)
    assert type(plain.module) is type(labelled.module)
    assert plain.layout == labelled.layout
    assert torch.equal(vs.capture(plain, images(1)).attention(1), vs.capture(labelled, images(1)).attention(1))
    assert torch.equal(vs.rollout(plain, PHOTO).values, vs.rollout(labelled, PHOTO).values)
    assert vs.check(labelled, PHOTO).readout == vs.check(plain, PHOTO).readout


@pytest.mark.slow
@every_family
def test_methods_explain_a_text(family: str, tmp_path: Path) -> None:
    save(family, tmp_path)
    model = vs.load(tmp_path, labels=TEXTS)
    result = vs.occlusion(model, PHOTO, target="owl", output="logit")
    assert result.target == "owl"
    assert result.values.abs().max() > 0


@pytest.mark.slow
@every_family
def test_text_logits_of_features_are_those_of_the_classifier(family: str, tmp_path: Path) -> None:
    """Also of a classifier whose labels are other texts."""
    save(family, tmp_path)
    pixels = images(2)
    expected = logits(vs.load(tmp_path, labels=TEXTS), pixels)
    for model in (vs.load(tmp_path), vs.load(tmp_path, labels=["cat", "dog"])):
        text_logits = model.text_logits(TEXTS)
        with torch.no_grad(), model.running():
            rows = text_logits(model.features(pixels))
        assert torch.equal(rows, expected)
        assert text_logits.texts == tuple(TEXTS)


@every_family
def test_the_length_of_a_vector_is_the_temperature(family: str, tmp_path: Path) -> None:
    module: Any = save(family, tmp_path)
    text_logits = vs.load(tmp_path).text_logits(TEXTS)
    lengths = text_logits.vectors.norm(dim=-1)
    torch.testing.assert_close(lengths, module.logit_scale.detach().exp().expand(3), rtol=1e-5, atol=0)
    assert (text_logits.bias is None) == (family == "clip")
    assert not text_logits.vectors.requires_grad


@pytest.mark.slow
@every_family
def test_half_precision_is_compared_in_float32(family: str, tmp_path: Path) -> None:
    save(family, tmp_path)
    full, half = vs.load(tmp_path, labels=TEXTS), vs.load(tmp_path, labels=TEXTS, dtype="bfloat16")
    rows = logits(half, images(2).bfloat16())
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, logits(full, images(2)), rtol=0.05, atol=0.2)


@every_family
def test_nothing_is_left_behind(family: str, tmp_path: Path) -> None:
    """A module in training mode, and a caller in inference mode: modes, weights, gradients and random numbers stay."""
    module, words = text_image(family).train(), tokenizer(family, tmp_path)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = torch.random.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu"):
        model = vs.load(module, labels=TEXTS, tokenizer=words)
    assert torch.equal(model.text_logits(TEXTS).vectors, model.forward.text_logits.vectors)  # type: ignore[attr-defined]
    rows = model.logits(images(1).requires_grad_())
    assert rows is not None
    (gradient,) = torch.autograd.grad(rows.sum(), model.module.get_submodule("post_layernorm").weight)  # type: ignore[arg-type]
    assert gradient.abs().max() > 0
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(child.training for child in module.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in module.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())


@every_family
def test_dropout_does_not_reach_the_vectors(family: str, tmp_path: Path) -> None:
    module, words = text_image(family), tokenizer(family, tmp_path)
    for child in module.text_model.modules():
        if hasattr(child, "dropout") and isinstance(child.dropout, float):
            child.dropout = 0.5
    expected = vs.load(module, tokenizer=words).text_logits(TEXTS).vectors
    assert torch.equal(vs.load(module.train(), tokenizer=words).text_logits(TEXTS).vectors, expected)


@every_family
def test_the_random_state_is_unchanged_by_loading_the_text_tower(family: str, tmp_path: Path) -> None:
    save(family, tmp_path)
    model, state = vs.load(tmp_path), torch.random.get_rng_state()
    model.text_logits(TEXTS)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.slow
@every_family
def test_the_models_are_released(family: str, tmp_path: Path) -> None:
    save(family, tmp_path)
    model = vs.load(tmp_path, labels=TEXTS)
    model.predict(PHOTO)
    references = [weakref.ref(model.module), weakref.ref(model.text)]
    del model
    gc.collect()
    assert [reference() for reference in references] == [None, None]


@every_family
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_compute_the_same(family: str, copied: Callable[[Any], Any], tmp_path: Path) -> None:
    """A pickle needs no files: it holds the text tower and the tokenizer, once they are loaded."""
    save(family, tmp_path / "model")
    model = vs.load(tmp_path / "model", labels=TEXTS)
    twin = copied(model)
    shutil.rmtree(tmp_path / "model")
    assert torch.equal(logits(twin, images(2)), logits(model, images(2)))
    assert twin.predict(PHOTO) == model.predict(PHOTO)
    assert twin.labels == model.labels
    # Rounding: weights in a mapped file are not aligned in memory like those of a copy.
    expected = model.text_logits(["dog"]).vectors
    torch.testing.assert_close(twin.text_logits(["dog"]).vectors, expected, rtol=0, atol=1e-5)


@every_family
def test_a_live_module_is_copied_once(family: str, tmp_path: Path) -> None:
    """The vision tower that the model runs is the one inside the copied whole model."""
    module = text_image(family)
    model = vs.load(module, labels=TEXTS, tokenizer=tokenizer(family, tmp_path))
    assert model.module is module.vision_model
    twin = copy.deepcopy(model)
    assert twin.module is not model.module
    assert torch.equal(logits(twin, images(1)), logits(model, images(1)))


@every_family
def test_every_tensor_is_created_on_an_explicit_device(family: str, tmp_path: Path) -> None:
    save(family, tmp_path)
    expected = logits(vs.load(tmp_path, labels=TEXTS), images(1))
    model, pixels, before = vs.load(tmp_path), images(1), torch.get_default_device()
    torch.set_default_device("meta")
    try:
        rows = logits(zero_shot_classifier(model, TEXTS), pixels)
    finally:
        torch.set_default_device(before)
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-5)


@every_family
def test_the_relevance_of_tokens_and_biases_sums_to_the_logit(family: str, tmp_path: Path) -> None:
    """Libra's rules: Σ h₀·∇h₀ + Σ b·∇b = f needs the norm of the features and SigLIP's bias to be seen."""
    save(family, tmp_path, dtype=DOUBLE)
    model = vs.load(tmp_path, labels=TEXTS)
    with capture_gradients(model, images(2).to(DOUBLE), GradientOptions(rules="libra", biases=True)) as run:
        score, stream = run.output[:, 1], run.streams[0]
        (gradient,) = run.gradients(score, [stream])
        biases = [(term.values.sum(1) if term.values.ndim > 1 else term.values) for term in run.bias_terms()]
        total = (stream * gradient).sum((1, 2)) + torch.stack(biases).sum(0)
    torch.testing.assert_close(total.detach(), score.detach(), rtol=0, atol=1e-10)


@pytest.mark.slow
# peft asks transformers for an attribute of an older name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@every_family
def test_a_live_adapter_is_part_of_both_towers_and_their_projections(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    layers = ["q_proj", "v_proj", *(["visual_projection", "text_projection"] if family == "clip" else [])]
    config = peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False, lora_dropout=0.5)
    live, words = peft.get_peft_model(text_image(family).to(DOUBLE), config).to(DOUBLE), tokenizer(family, tmp_path)
    model = vs.load(live.train(), labels=TEXTS, tokenizer=words)
    with torch.no_grad():
        expected = library_logits(live.eval(), family, words, TEXTS, images(2).to(DOUBLE))
    torch.testing.assert_close(logits(model, images(2).to(DOUBLE)), expected, rtol=0, atol=1e-10)


@pytest.mark.slow
# peft asks transformers for an attribute of an older name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@every_family
def test_an_adapter_folder_of_the_vision_tower_keeps_the_text_tower(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    save(family, tmp_path)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(vs.load(tmp_path).module, config).save_pretrained(tmp_path / "adapter")
    plain, adapted = (vs.load(tmp_path, labels=TEXTS, adapter=adapter) for adapter in (None, tmp_path / "adapter"))
    assert torch.equal(adapted.text_logits(["dog"]).vectors, plain.text_logits(["dog"]).vectors)
    assert not torch.allclose(logits(adapted, images(1)), logits(plain, images(1)), atol=1e-3)


@pytest.mark.slow
@every_family
def test_a_new_classifier_replaces_the_texts(family: str, tmp_path: Path) -> None:
    save(family, tmp_path)
    model = vs.load(tmp_path, labels=TEXTS)
    trainable = reset_classifier(model, ["old", "new"])
    assert (trainable.labels, trainable.meaning, trainable.text) == (("old", "new"), "logits", None)
    assert logits(trainable, images(1)).shape == (1, 2)
    few = vs.few_shot_classifier(model, {"first": PHOTO, "second": PHOTO.rotate(90)})
    assert few.predict(PHOTO, top_k=1)[0][0].label == "first"
