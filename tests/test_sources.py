"""What counts as one image and as several, and what an image may be read from."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitscope.errors import CallError
from vitscope.picture import Preprocessing, photos

PIXELS = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)

SINGLE: list[Any] = [
    "cat.png",
    Path("cat.png"),
    Image.fromarray(PIXELS),
    PIXELS,
    PIXELS[..., 0],
    b"bytes",
    bytearray(b"bytes"),
    memoryview(b"bytes"),
    io.BytesIO(b"bytes"),
    None,
]


@pytest.mark.parametrize("source", SINGLE, ids=lambda source: type(source).__name__)
def test_one_source_is_a_list_of_itself(source: Any) -> None:
    assert len(photos(source)) == 1
    assert photos(source)[0] is source


@pytest.mark.parametrize("sequence", [list, tuple])
def test_a_sequence_is_its_items(sequence: Any) -> None:
    sources = photos(sequence(SINGLE))
    assert len(sources) == len(SINGLE)
    assert all(source is item for source, item in zip(sources, SINGLE, strict=True))


def test_an_array_of_four_dimensions_is_a_batch() -> None:
    batch = np.stack([PIXELS, 255 - PIXELS])
    sources = photos(batch)
    assert [source.shape for source in sources] == [(5, 7, 3)] * 2
    assert np.array_equal(sources[1], 255 - PIXELS)


@pytest.mark.parametrize("images", [[], (), np.zeros((0, 5, 7, 3), dtype=np.uint8)], ids=str)
def test_no_image_is_refused(images: Any) -> None:
    with pytest.raises(CallError, match=r"^no picture was given$"):
        photos(images)


def test_the_source_of_a_preprocessing_is_carried_and_not_compared() -> None:
    made = Preprocessing((224, 224), fit="crop", resize_to=(256, 256), round_half_even=True, source="config.json")
    larger = made.resized((448, 448))
    assert larger.source == "config.json"
    assert larger == Preprocessing((448, 448), fit="crop", resize_to=(512, 512), round_half_even=True)
