"""Modules that return an embedding: explained by its similarity, never by the index of a channel."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitscope as vs
from tests.helpers.live import SHAPE, hf_vit, images, seeded, timm_swin, timm_vit, torchvision_vit
from vitscope.errors import CallError, UnclearOutputError, UnsupportedModelError


class Tower(nn.Module):
    """A backbone and a linear layer with a configurable name."""

    def __init__(self, name: str = "proj") -> None:
        super().__init__()
        self.visual, self.name = timm_vit(0), name
        torch.manual_seed(1)
        setattr(self, name, nn.Linear(32, 12))

    def forward(self, pixels: Tensor) -> Tensor:
        return getattr(self, self.name)(self.visual(pixels))


class Normalised(Tower):
    def forward(self, pixels: Tensor) -> Tensor:
        return F.normalize(super().forward(pixels), dim=-1)


class Projected(nn.Module):
    """A projection by a bare matrix, as in CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.net = timm_vit(0)
        torch.manual_seed(1)
        self.matrix = nn.Parameter(torch.randn(32, 12))

    def forward(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.net(pixels) @ self.matrix, dim=-1)


class Dino(nn.Module):
    """The norm, then the first token, as in the DINO repository."""

    def __init__(self) -> None:
        super().__init__()
        inner: Any = timm_vit(0)
        self.patch_embed, self.cls_token, self.blocks = inner.patch_embed, inner.cls_token, inner.blocks
        self.pos_embed, self.norm, self.head = inner.pos_embed, inner.norm, nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.patch_embed(pixels)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens)[:, 0])


def clip_with_projection() -> nn.Module:
    import transformers

    config = transformers.CLIPVisionConfig(**SHAPE, projection_dim=12)
    return seeded(lambda: transformers.CLIPVisionModelWithProjection(config))


def open_clip_visual() -> nn.Module:
    open_clip = pytest.importorskip("open_clip")
    shape = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "heads": 2, "head_width": 32}
    vision = open_clip.model.CLIPVisionCfg(**{key: value for key, value in shape.items() if key != "heads"})
    text = open_clip.model.CLIPTextCfg(context_length=8, vocab_size=50, width=32, heads=2, layers=1)
    return seeded(lambda: open_clip.model.CLIP(12, vision, text).visual)


def without_head(build: Callable[[], Any], attribute: str) -> nn.Module:
    module = build()
    setattr(module, attribute, nn.Identity())
    return module.eval()


EMBEDDINGS: dict[str, Callable[[], nn.Module]] = {
    "open_clip": open_clip_visual,
    "CLIP with projection": clip_with_projection,
    "proj": Tower,
    "embedding layer": lambda: Tower("embedding"),
    "neck": lambda: Tower("neck"),
    "normalised": Normalised,
    "normalised matrix": Projected,
    "DINO": Dino,
    "num_classes=0": lambda: timm_vit(0),
    "swin num_classes=0": lambda: timm_swin(0),
    "timm head=Identity": lambda: without_head(timm_vit, "head"),
    "torchvision heads=Identity": lambda: without_head(torchvision_vit, "heads"),
    "transformers classifier=Identity": lambda: without_head(hf_vit, "classifier"),
}


TOKENS: dict[str, Any] = {"patch_size": 8, "prefix": ("cls",), "readout": "cls"}
# Arguments for facts that cannot be derived from the module.
OPTIONS: dict[str, dict[str, Any]] = {
    "open_clip": {"output": "features", **TOKENS},  # a matrix product is not necessarily an embedding
    "DINO": TOKENS,
}


def embedding(module: Any, pixels: Tensor) -> Tensor:
    """Return the embedding that the module itself computes."""
    with torch.no_grad():
        returned = module(pixels)
    if isinstance(returned, Tensor):
        return returned
    return returned.image_embeds if hasattr(returned, "image_embeds") else returned.logits


@pytest.mark.slow
@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_an_embedding_has_no_classes(kind: str) -> None:
    module, pixels = EMBEDDINGS[kind]().eval(), images()
    model = vs.load(module, **OPTIONS.get(kind, {}))
    with pytest.raises(UnsupportedModelError, match="has no classifier: it returns features, not classes") as caught:
        model.predict(pixels)
    assert "\n" not in str(caught.value)
    calls = ((vs.lime, "patches"), (vs.kernel_shap, "patches"), (vs.rise, None), (vs.occlusion, None))
    for method, segments in calls:
        with pytest.raises(CallError, match="has no classifier, so there is no class to explain"):
            method(model, pixels[:1], **({} if segments is None else {"segments": segments}))
    with torch.no_grad(), model.running():
        assert torch.allclose(model.features(pixels), embedding(module, pixels), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_an_embedding_is_explained_by_its_similarity(kind: str) -> None:
    module, pixels = EMBEDDINGS[kind]().eval(), images(1)
    model = vs.load(module, **OPTIONS.get(kind, {}))
    result = vs.occlusion(model, pixels, target="similarity", hide="grey")
    assert result.provenance["parameters"]["output"] == "similarity"
    assert result.provenance["output"] == "features"
    values = result.values[0]
    assert float(values.min()) > -1e-5
    assert float(values.max()) > 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", vs.VitscopeWarning)
        explained = vs.lime(model, pixels, target="similarity", segments="patches", num_samples=24)
    assert explained.output == pytest.approx(1.0, abs=1e-5)
    assert not any("class" in label for label in explained.classes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_similarity_is_the_cosine(kind: str) -> None:
    module = EMBEDDINGS[kind]().eval()
    original, changed = images(2).split(1)
    model = vs.load(module, **OPTIONS.get(kind, {}))
    expected = F.cosine_similarity(embedding(module, original), embedding(module, changed)).item()
    with torch.no_grad(), model.running():
        features = [model.features(pixels) for pixels in (original, changed)]
    assert F.cosine_similarity(*features).item() == pytest.approx(expected, abs=1e-5)


class Ambiguous(nn.Module):
    """A matrix product at the end: neither a layer nor a name reveals what the numbers are."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.weight = timm_vit(0), nn.Parameter(torch.randn(32, 6, device="cpu"))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.net(pixels) @ self.weight


@pytest.mark.slow
@pytest.mark.parametrize("method", ["predict", "lime", "rise", "occlusion", "kernel_shap", "compose"])
def test_an_output_with_unclear_meaning_is_refused(method: str) -> None:
    model, pixels = vs.load(Ambiguous()), images(1)
    calls: dict[str, Callable[[], Any]] = {
        "predict": lambda: model.predict(pixels),
        "compose": lambda: vs.compose(model, pixels, (8, 8, 8, 8)),
    }
    with pytest.raises(UnclearOutputError) as caught:
        calls.get(method, lambda: getattr(vs, method)(model, pixels))()
    assert str(caught.value) == (
        "Ambiguous returns 6 numbers per image, which could be classes or an embedding: pass "
        "output='logits' or output='features' to vitscope.load"
    )


@pytest.mark.slow
def test_attention_does_not_need_a_meaning() -> None:
    model, inner, pixels = vs.load(Ambiguous()), vs.load(timm_vit(0)), images(1)
    assert torch.allclose(vs.rollout(model, pixels).values, vs.rollout(inner, pixels).values, atol=1e-6)
    assert torch.allclose(vs.attention_map(model, pixels).values, vs.attention_map(inner, pixels).values, atol=1e-6)


def test_the_caller_can_state_the_meaning() -> None:
    module, pixels = Ambiguous(), images(1)
    rows = embedding(module, pixels)
    (predicted,) = vs.load(module, output="logits").predict(pixels, top_k=6)
    numbers = {prediction.index: prediction.probability for prediction in predicted}
    assert [numbers[index] for index in range(6)] == pytest.approx(rows.softmax(-1)[0].tolist(), abs=1e-6)
    model = vs.load(module, output="features")
    with torch.no_grad(), model.running():
        assert torch.equal(model.features(pixels), rows)


@pytest.mark.parametrize("kind", ["num_classes=0", "proj", "CLIP with projection", "normalised"])
def test_few_shot_classifiers_read_the_embedding(kind: str) -> None:
    model = vs.load(EMBEDDINGS[kind]().eval(), image_size=32, mean=[0.5] * 3, std=[0.5] * 3)
    random = np.random.default_rng(0)
    examples = {name: [random.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(2)] for name in ("a", "b")}
    classifier = vs.few_shot_classifier(model, examples)
    (row,) = classifier.predict(examples["b"][0])
    assert row[0].label == "b"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["classifier", "head", "fc", "linear", "pred", "classification_proj"])
def test_a_layer_named_like_a_classifier_is_one(name: str) -> None:
    module, pixels = Tower(name).eval(), images(1)
    (row,) = vs.load(module).predict(pixels, top_k=12)
    numbers = {prediction.index: prediction.probability for prediction in row}
    expected = embedding(module, pixels).softmax(-1)[0].tolist()
    assert [numbers[index] for index in range(12)] == pytest.approx(expected, abs=1e-6)
