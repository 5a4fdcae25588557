"""PNG files whose data end early although the file is complete, and properties that only the header tells."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitscope.errors import ImageError
from vitscope.images.reading import read_photo

SIDE = 40
ROWS = np.random.default_rng(0).integers(1, 255, (SIDE, SIDE, 3), dtype=np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(path: Path, size: tuple[int, int], depth: int, colour: int, data: bytes, key: bytes = b"") -> Path:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    transparent = chunk(b"tRNS", key) if key else b""
    body = header + transparent + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def scanlines(rows: np.ndarray) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in rows)


@pytest.mark.parametrize("count", [1, SIDE // 2, SIDE - 1])
def test_data_that_end_before_the_last_row_are_reported_as_damage(tmp_path: Path, count: int) -> None:
    """The stream and every chunk are complete. Pillow alone would show the missing rows as black."""
    path = png(tmp_path / "short.png", (SIDE, SIDE), 8, 2, scanlines(ROWS[:count]))
    with Image.open(path) as image:
        assert not np.asarray(image)[count:].any()
    with pytest.raises(ImageError, match="is damaged: its data end before the last row"):
        read_photo(path)
    with pytest.raises(ImageError, match="its data end before the last row"):
        read_photo(path.read_bytes())


def test_a_black_last_row_is_not_damage(tmp_path: Path) -> None:
    rows = ROWS.copy()
    rows[-2:] = 0
    path = png(tmp_path / "dark.png", (SIDE, SIDE), 8, 2, scanlines(rows))
    assert np.array_equal(np.asarray(read_photo(path)[0]), rows)


@pytest.mark.parametrize(("depth", "data", "step"), [(2, b"\0\x1b" * 2, 85), (4, b"\0\x01\x23" * 2, 17)])
def test_the_transparent_grey_of_few_bits_becomes_white(tmp_path: Path, depth: int, data: bytes, step: int) -> None:
    path = png(tmp_path / "key.png", (4, 2), depth, 0, data, struct.pack(">H", 1))
    assert np.asarray(read_photo(path)[0])[0, :, 0].tolist() == [0, 255, 2 * step, 3 * step]


def test_an_image_in_cielab_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lab.tif"
    Image.new("LAB", (4, 4)).save(path)
    with pytest.raises(ImageError, match="holds colours in CIELAB: convert it to RGB"):
        read_photo(path)
