"""Shapes are checked while the tests run: every annotated function of vitscope is wrapped."""

import os
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch
from jaxtyping import install_import_hook

# No test may ask the model hub for anything.
os.environ["HF_HUB_OFFLINE"] = "1"

# The models are tiny: threads inside an operation would only wait for each other.
torch.set_num_threads(1)

hook = install_import_hook("vitscope", "beartype.beartype")
hook.__enter__()


@pytest.fixture(scope="session")
def chelsea():
    """scikit-image's photo of a cat: (300, 451, 3) uint8."""
    import skimage.data

    return skimage.data.chelsea()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Wrong types reach vitscope's own refusals, as they do for a user, who has no type checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def little_garbage() -> Iterator[None]:
    from tests.helpers.coloured import light_garbage

    with light_garbage():
        yield


@pytest.fixture(scope="module")
def quick_comparisons() -> Iterator[None]:
    from tests.helpers.comparisons import quick

    with quick():
        yield


@pytest.fixture
def coarse_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of fewer pixels, which are drawn sooner."""
    from vitscope.views import figure

    monkeypatch.setattr(figure, "DPI", 40)


@pytest.fixture
def no_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was read or written")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ViT saved as its library saves one, with a processor."""
    import transformers

    from tests.helpers.tiny import tiny_vit

    path = tmp_path_factory.mktemp("models") / "tiny-vit"
    tiny_vit().save_pretrained(path)
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6])
    processor.save_pretrained(path)
    return path
