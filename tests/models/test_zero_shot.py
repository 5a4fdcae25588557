"""Zero-shot classifiers from CLIP and SigLIP, against the library's own logits_per_image."""

import copy
import gc
import os
import pickle
import shutil
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vitscope as vs
from tests.helpers.live import PHOTO, hf_vit, images
from tests.helpers.text_image import (
    CONTEXT,
    FAMILIES,
    TEXTS,
    clip_tokenizer,
    library_logits,
    save,
    siglip_tokenizer,
    text_image,
    tokenizer,
)
from tests.helpers.tiny import refusal
from vitscope.errors import CallError, ModelUnavailableError, UnsupportedModelError, VitscopeError
from vitscope.models.text import require_texts
from vitscope.models.zero_shot import zero_shot_classifier

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


@every_family
def test_attention_and_rollout_are_those_of_the_vision_tower(family: str, tmp_path: Path) -> None:
    save(family, tmp_path)
    plain, labelled = vs.load(tmp_path), vs.load(tmp_path, labels=TEXTS)
    assert type(plain.module) is type(labelled.module)
    assert plain.layout == labelled.layout
    assert torch.equal(vs.capture(plain, images(1)).attention(1), vs.capture(labelled, images(1)).attention(1))
    assert torch.equal(vs.rollout(plain, PHOTO).values, vs.rollout(labelled, PHOTO).values)
    assert vs.check(labelled, PHOTO).readout == vs.check(plain, PHOTO).readout


@every_family
def test_methods_explain_a_text(family: str, tmp_path: Path) -> None:
    save(family, tmp_path)
    model = vs.load(tmp_path, labels=TEXTS)
    result = vs.occlusion(model, PHOTO, target="owl", output="logit")
    assert result.target == "owl"
    assert result.values.abs().max() > 0


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
    with torch.inference_mode():
        model = vs.load(module, labels=TEXTS, tokenizer=words)
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
def test_the_text_tower_is_loaded_when_it_is_first_used(family: str, tmp_path: Path, monkeypatch: Any) -> None:
    """From the same files, even if the working directory has changed; not at all if no text is used."""
    save(family, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    model, missing = vs.load("model"), vs.load("model")
    expected = vs.load("model", labels=TEXTS).text_logits(TEXTS).vectors
    monkeypatch.chdir("/")
    assert torch.equal(model.text_logits(TEXTS).vectors, expected)
    shutil.rmtree(tmp_path / "model")
    assert torch.equal(model.text_logits(TEXTS).vectors, expected)
    assert "does not exist" in message(ModelUnavailableError, partial(missing.text_logits, TEXTS))


@every_family
def test_weights_from_a_file_fill_both_towers(family: str, tmp_path: Path) -> None:
    save(family, tmp_path / "model")
    changed = text_image(family)
    with torch.no_grad():
        changed.logit_scale.add_(0.5)
        for parameter in changed.parameters():
            parameter.mul_(1.5)
    torch.save(changed.state_dict(), tmp_path / "weights.pth")
    model = vs.load(tmp_path / "model", weights=tmp_path / "weights.pth", labels=TEXTS)
    words = tokenizer(family, tmp_path / "vocabulary")
    with torch.no_grad():
        expected = library_logits(changed, family, words, TEXTS, images(2))
    torch.testing.assert_close(logits(model, images(2)), expected, rtol=1e-4, atol=1e-4)


@every_family
def test_a_checkpoint_without_its_text_tower_is_refused(family: str, tmp_path: Path) -> None:
    save(family, tmp_path)
    state = {name: tensor for name, tensor in text_image(family).state_dict().items() if "text_model" not in name}
    torch.save(state, tmp_path / "weights.pth")
    reason = refusal(ModelUnavailableError, tmp_path, weights=tmp_path / "weights.pth", labels=TEXTS)
    assert "does not run on random weights" in reason


@every_family
def test_a_model_without_a_text_tower_is_refused(family: str, tmp_path: Path) -> None:
    reason = "has no text tower: load a CLIPModel or SiglipModel"
    text_image(family).vision_model.save_pretrained(tmp_path)
    assert reason in refusal(UnsupportedModelError, tmp_path, tokenizer=siglip_tokenizer())
    for module in (text_image(family).vision_model, hf_vit()):
        assert reason in message(UnsupportedModelError, partial(vs.load(module).text_logits, ["a cat"]))
    save(family, tmp_path / "whole")
    untrained = vs.load(tmp_path / "whole", pretrained=False)
    assert reason in message(UnsupportedModelError, partial(untrained.text_logits, ["a cat"]))


@every_family
def test_a_vision_tower_alone_takes_no_labels(family: str, tmp_path: Path) -> None:
    text_image(family).vision_model.save_pretrained(tmp_path)
    assert "has no text tower" in refusal(UnsupportedModelError, tmp_path, labels=TEXTS)
    assert "has no text tower" in refusal(UnsupportedModelError, text_image(family).vision_model, labels=TEXTS)


@every_family
def test_a_missing_tokenizer_is_refused(family: str, tmp_path: Path) -> None:
    """transformers itself would build a tokenizer without a vocabulary."""
    text_image(family).save_pretrained(tmp_path)
    vs.load(tmp_path)
    reason = refusal(ModelUnavailableError, tmp_path, labels=TEXTS)
    assert "has no tokenizer (tokenizer.json, vocab.json, spiece.model, tokenizer.model are missing)" in reason
    assert "pass tokenizer= to vitscope.load" in reason
    reason = refusal(ModelUnavailableError, text_image(family), labels=TEXTS)
    assert "has no tokenizer, because it does not come from a checkpoint: pass tokenizer=" in reason


@every_family
def test_the_tokenizer_may_be_passed(family: str, tmp_path: Path) -> None:
    import transformers

    save(family, tmp_path / "whole")
    expected = logits(vs.load(tmp_path / "whole", labels=TEXTS), images(1))
    text_image(family).save_pretrained(tmp_path / "bare")
    words = tokenizer(family, tmp_path / "words")
    words.save_pretrained(tmp_path / "words")
    processor_class = transformers.CLIPProcessor if family == "clip" else transformers.SiglipProcessor
    image_processor = getattr(transformers, f"{'CLIP' if family == 'clip' else 'Siglip'}ImageProcessorPil")
    image_processor = image_processor.from_pretrained(tmp_path / "whole")
    processor = processor_class(image_processor=image_processor, tokenizer=words)
    for options in ({"tokenizer": words}, {"tokenizer": tmp_path / "words"}, {"tokenizer": processor}):
        assert torch.equal(logits(vs.load(tmp_path / "bare", labels=TEXTS, **options), images(1)), expected)
        assert torch.equal(logits(vs.load(text_image(family), labels=TEXTS, **options), images(1)), expected)
    model = vs.load(text_image(family), labels=TEXTS, processor=processor)
    assert torch.equal(logits(model, images(1)), expected)
    assert model.preprocessing is not None
    assert model.preprocessing.size == (32, 32)


@every_family
def test_a_live_module_from_a_checkpoint_has_its_tokenizer(family: str, tmp_path: Path) -> None:
    module = save(family, tmp_path)
    loaded = type(module).from_pretrained(tmp_path)  # type: ignore[attr-defined]
    assert torch.equal(
        logits(vs.load(loaded, labels=TEXTS), images(1)), logits(vs.load(tmp_path, labels=TEXTS), images(1))
    )


@every_family
def test_invalid_texts_are_refused(family: str, tmp_path: Path) -> None:
    save(family, tmp_path)
    model = vs.load(tmp_path)
    for texts in ("a cat", [], [""], ["cat", "  "]):
        assert "pass" in message(CallError, partial(model.text_logits, texts))
    for invalid in (None, 3, [1], {"cat"}):
        assert "pass" in message(CallError, partial(require_texts, invalid))
    reason = message(CallError, partial(model.text_logits, ["a cat", "a dog " * CONTEXT]))
    assert f"reads at most {CONTEXT}: shorten it" in reason
    assert "lists 'cat' twice" in refusal(CallError, tmp_path, labels=["cat", "dog", "cat"])
    assert "omit output, or labels" in refusal(CallError, tmp_path, labels=TEXTS, output="features")
    assert "omit output, or labels" in refusal(CallError, tmp_path, labels=TEXTS, output="value")


def test_one_text_has_a_probability_for_siglip_only(tmp_path: Path) -> None:
    for family in FAMILIES:
        save(family, tmp_path / family)
    assert vs.load(tmp_path / "siglip", labels=["a cat"]).labels == ("a cat",)
    assert "always 1: pass two or more" in refusal(CallError, tmp_path / "clip", labels=["a cat"])
    assert vs.load(tmp_path / "clip").text_logits(["a cat"]).vectors.shape == (1, 16)


def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    clip, siglip = text_image("clip"), text_image("siglip")
    words = clip_tokenizer(tmp_path)
    assert "pass the model's own" in refusal(CallError, siglip, labels=TEXTS, tokenizer=words)
    assert "does not mark the end" in refusal(CallError, clip, labels=TEXTS, tokenizer=siglip_tokenizer())
    clip.config.text_config.eos_token_id = clip.text_model.eos_token_id = 2
    clip.text_model.config.eos_token_id = 2
    vs.load(clip, labels=TEXTS, tokenizer=words)
    assert "does not mark the end" in refusal(CallError, clip, labels=TEXTS, tokenizer=siglip_tokenizer())
    for invalid in (3, len, {"input_ids": [1]}):
        assert "pass a tokenizer of transformers" in refusal(CallError, clip, labels=TEXTS, tokenizer=invalid)
    assert "is not a folder" in refusal(CallError, clip, labels=TEXTS, tokenizer=tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "has no tokenizer" in refusal(ModelUnavailableError, clip, labels=TEXTS, tokenizer=tmp_path / "empty")


@every_family
def test_damaged_tokenizer_files_are_refused(family: str, tmp_path: Path) -> None:
    save(family, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    assert "loading its tokenizer failed" in refusal(ModelUnavailableError, tmp_path, labels=TEXTS)
    (tmp_path / "tokenizer.json").unlink()
    os.mkfifo(tmp_path / "tokenizer.json")
    assert "is not a regular file" in refusal(ModelUnavailableError, tmp_path, labels=TEXTS)


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
