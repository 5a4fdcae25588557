"""Fixtures of all tests. Types and shapes of every annotated function of vitscope are checked while the tests run."""

import os
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch

from tests.helpers import type_checks

# No test may access the model hub.
os.environ["HF_HUB_OFFLINE"] = "1"

# The models are tiny, so that threads inside an operation would only wait for each other.
torch.set_num_threads(1)

type_checks.install()


@pytest.fixture(scope="session")
def chelsea():
    """Return scikit-image's photo of a cat, uint8 (300, 451, 3)."""
    import skimage.data

    return skimage.data.chelsea()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Switch off the type checks, so that wrong types reach vitscope's own errors, as they do for a user."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def little_garbage() -> Iterator[None]:
    """Collect garbage rarely."""
    from tests.helpers.coloured import light_garbage

    with light_garbage():
        yield


@pytest.fixture(scope="module")
def quick_comparisons() -> Iterator[None]:
    """Make comparisons fast."""
    from tests.helpers.comparisons import quick

    with quick():
        yield


@pytest.fixture
def coarse_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw figures with fewer pixels, which is faster."""
    from vitscope.views import figure
    from vitscope.views.style import FigureStyle

    monkeypatch.setattr(figure, "PLAIN", FigureStyle(dpi=40))


@pytest.fixture
def no_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a pickle is read or written."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was read or written")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny ViT that transformers saved, with a processor."""
    import transformers

    from tests.helpers.tiny import tiny_vit

    path = tmp_path_factory.mktemp("models") / "tiny-vit"
    tiny_vit().save_pretrained(path)
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6])
    processor.save_pretrained(path)
    return path
