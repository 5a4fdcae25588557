"""A text as target of a text-image model: its logit, a contrast of two texts, and refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch

import vitscope as vs
from tests.helpers.text_image import FAMILIES, library_logits, save, tokenizer
from vitscope.errors import CallError


@pytest.fixture(params=FAMILIES)
def saved(request: Any, tmp_path: Path) -> tuple[str, Any, vs.VisionModel, Any]:
    """A family, the library's model, the vision model of its folder and its tokenizer."""
    pytest.importorskip("tokenizers")
    family: str = request.param
    module = save(family, tmp_path / "model", dtype=torch.float64).eval()
    words = tokenizer(family, tmp_path / "words")
    return family, module, vs.load(str(tmp_path / "model"), dtype=torch.float64), words


def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_the_gradient_of_a_text_is_that_of_the_librarys_logit(saved: Any) -> None:
    family, module, model, words = saved
    images = pixels().requires_grad_()
    logits = library_logits(module, family, words, ["a photo of a dog", "a cat"], images)
    for target, value in (
        ("a photo of a dog", logits[:, 0]),
        (("a photo of a dog", "a cat"), logits[:, 0] - logits[:, 1]),
    ):
        (gradient,) = torch.autograd.grad(value.sum(), images, retain_graph=True)
        expected = (images * gradient).sum(1).detach()
        result = vs.input_x_gradient(model, pixels(), target=target, at="pixels")
        tolerance = 2e-6 * float(expected.abs().max())
        torch.testing.assert_close(result.values.double(), expected, rtol=0, atol=tolerance)
        torch.testing.assert_close(
            torch.tensor(result.provenance["score"], dtype=torch.float64), value.detach().double(), rtol=1e-9, atol=1e-9
        )
    assert result.target == "a photo of a dog − a cat"


def test_a_text_is_explained_by_hiding_too(saved: Any) -> None:
    _, _, model, _ = saved
    result = vs.occlusion(model, pixels()[:1], target="a cat", output="logit")
    assert result.target == "a cat"
    assert bool((result.values != 0).any())


@pytest.mark.parametrize("method", [vs.libra, vs.occlusion])
def test_a_text_without_a_text_tower_is_refused(method: Any) -> None:
    model = vs.load("vit-nano", output="features")
    with pytest.raises(CallError, match="vit-nano has no classifier and no text tower, so there is no class"):
        method(model, torch.zeros(1, 3, 32, 32), target="a photo of a cat")


def test_a_contrast_of_a_text_with_itself_is_refused(saved: Any) -> None:
    _, _, model, _ = saved
    with pytest.raises(CallError, match="a contrast of 'a cat' with itself is always 0"):
        vs.libra(model, pixels(), target=("a cat", "a cat"))
