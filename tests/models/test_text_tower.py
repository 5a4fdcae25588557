"""The text towers of CLIP and SigLIP: where they and their tokenizers come from, and what is refused."""

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import vitscope as vs
from tests.helpers.live import hf_vit, images
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
from tests.models.test_zero_shot import logits, message
from vitscope.errors import CallError, ModelUnavailableError, UnsupportedModelError
from vitscope.models.text import require_texts

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
