"""Shapes are checked while the tests run: every annotated function of vitscope is wrapped."""

import os

import pytest
from jaxtyping import install_import_hook

# No test may ask the model hub for anything.
os.environ["HF_HUB_OFFLINE"] = "1"

hook = install_import_hook("vitscope", "beartype.beartype")
hook.__enter__()


@pytest.fixture(scope="session")
def chelsea():
    """scikit-image's photo of a cat: (300, 451, 3) uint8."""
    import skimage.data

    return skimage.data.chelsea()
