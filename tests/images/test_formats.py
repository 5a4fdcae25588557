"""Formats are recognized by content alone, and integer pixels of any depth are scaled by their header."""

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitscope.errors import CallError, ImageError, VitscopeError
from vitscope.images.reading import read_photo
from vitscope.images.sources import formats

RAMP = np.linspace(0, 255, 12 * 9 * 3).reshape(12, 9, 3).astype(np.uint8)


def refusal(source: Any, error: type[VitscopeError]) -> str:
    with pytest.raises(error) as caught:
        read_photo(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


def grey(source: Any) -> list[list[int]]:
    """Return the grey of each pixel, whose three channels are equal."""
    pixels = np.asarray(read_photo(source)[0])
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].tolist()


# Formats

DECODED = {
    "PNG": ("PNG", {}),
    "JPEG": ("JPEG", {"quality": 95}),
    "WebP": ("WEBP", {"lossless": True}),
    "GIF": ("GIF", {}),
    "BMP": ("BMP", {}),
    "TIFF": ("TIFF", {}),
    "PPM/PGM": ("PPM", {}),
    "JPEG 2000": ("JPEG2000", {}),
    "AVIF": ("AVIF", {"quality": 95}),
}


def test_the_documented_formats_are_the_decoded_ones() -> None:
    assert set(formats()) <= {*DECODED, "DICOM", "NIfTI"}
    text = (Path(__file__).parents[2] / "docs" / "images.md").read_text(encoding="utf-8")
    assert all(name in text for name in (*DECODED, "DICOM", "NIfTI"))


@pytest.mark.parametrize("suffix", [".png", ".xyz", ""])
@pytest.mark.parametrize("name", DECODED)
def test_a_format_is_decoded_whatever_the_name_of_the_file(tmp_path: Path, name: str, suffix: str) -> None:
    if name not in formats():
        pytest.skip(f"Pillow was built without {name}")
    pillow, options = DECODED[name]
    path = tmp_path / f"photo{suffix}"
    Image.fromarray(RAMP).save(path, format=pillow, **options)
    pixels = np.asarray(read_photo(path)[0]).astype(int)
    assert pixels.shape == RAMP.shape
    assert np.abs(pixels - RAMP).mean() < 12
    assert np.array_equal(np.asarray(read_photo(path.read_bytes())[0]), pixels)


def encoded(form: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(RAMP).save(stream, format=form)
    return stream.getvalue()


REFUSED = {
    "eps": (encoded("EPS"), "PostScript"),
    "ps": (b"%!PS-Adobe-3.0\n%%Pages: 1\nshowpage\n", "PostScript"),
    "dos-eps": (b"\xc5\xd0\xd3\xc6" + struct.pack("<LLLLLLH", 32, 10, 0, 0, 0, 0, 0xFFFF) + b"%!PS", "PostScript"),
    "pdf": (encoded("PDF"), "PDF"),
    "tga": (encoded("TGA"), None),
    "pcx": (encoded("PCX"), None),
    "ico": (encoded("ICO"), "icon"),
    "sgi": (encoded("SGI"), None),
    "dds": (encoded("DDS"), "DDS"),
    "icns": (encoded("ICNS"), "icon"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40), "HEIC"),
    "heif": (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(40), "HEIC"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
    "html": (b"\n<!DOCTYPE html><html><body>404</body></html>", "HTML"),
    "zip": (b"PK\3\4" + bytes(60), "ZIP"),
}


@pytest.mark.parametrize("suffix", [".jpg", ".png", ""])
@pytest.mark.parametrize("kind", REFUSED)
def test_other_formats_are_refused_by_content_before_a_decoder_sees_them(
    tmp_path: Path, kind: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, name = REFUSED[kind]
    monkeypatch.setattr("PIL.Image.open", lambda *_, **__: pytest.fail("a decoder saw it"))
    path = tmp_path / f"photo{suffix}"
    path.write_bytes(content)
    for source, error in ((path, ImageError), (content, CallError), (io.BytesIO(content), CallError)):
        message = refusal(source, error)
        assert name is None or f"is a {name} file" in message
        assert ", ".join(formats()) in message


def test_a_file_that_only_begins_like_an_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "photo.bmp"
    path.write_bytes(b"BM" + b"%!PS-Adobe-3.0 EPSF-3.0\n" * 20)
    assert refusal(path, ImageError).startswith(f"{path} is ")


# Depth


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, bits: int, colour: int, row: bytes, transparent: bytes = b"") -> bytes:
    """Return a PNG of two equal rows, written by hand."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 2, bits, colour, 0, 0, 0))
    hidden = chunk(b"tRNS", transparent) if transparent else b""
    data = chunk(b"IDAT", zlib.compress((b"\0" + row) * 2))
    return b"\x89PNG\r\n\x1a\n" + header + hidden + data + chunk(b"IEND", b"")


def tiff(
    bits: int, values: list[int], *, white_is_zero: bool = False, sample_format: int = 1, order: str = "<"
) -> bytes:
    """Return a grey TIFF of two equal rows, written by hand."""
    code = {8: "b", 12: "", 16: "h", 32: "i", 64: "q"}[bits]
    if bits == 12:
        row = b"".join(
            bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in zip(values[::2], values[1::2], strict=True)
        )
    else:
        code = "f" if sample_format == 3 else code if sample_format == 2 else code.upper()
        row = struct.pack(f"{order}{len(values)}{code}", *values)
    tags = [
        (256, 3, len(values)),
        (257, 3, 2),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, 0 if white_is_zero else 1),
        (273, 4, 8),
        (277, 3, 1),
        (278, 3, 2),
        (279, 4, 2 * len(row)),
        (339, 3, sample_format),
    ]
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, kind, 1)
        + struct.pack(f"{order}{'HH' if kind == 3 else 'I'}", *([value, 0] if kind == 3 else [value]))
        for tag, kind, value in tags
    )
    directory = struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", 0)
    magic = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + 2 * len(row))
    return magic + row * 2 + directory


WIDE = {
    # 16 bits with small values: they stay nearly black.
    "png small": (png(3, 16, 0, struct.pack(">HHH", 0, 100, 255)), [0, 0, 0]),
    "png": (png(3, 16, 0, struct.pack(">HHH", 0, 256, 65535)), [0, 1, 255]),
    "png 12 bits in 16": (png(3, 16, 0, struct.pack(">HHH", 0, 2048, 4095)), [0, 8, 15]),
    "pgm small": (b"P5 3 2 65535\n" + struct.pack(">HHH", 0, 100, 255) * 2, [0, 0, 0]),
    "pgm": (b"P5 3 2 65535\n" + struct.pack(">HHH", 0, 512, 65535) * 2, [0, 2, 255]),
    "pgm plain": (b"P2 3 2 65535\n" + b"0 100 255\n" * 2, [0, 0, 0]),
    "pgm 8": (b"P5 3 2 255\n" + bytes([0, 100, 255]) * 2, [0, 100, 255]),
    "pgm 8 small": (b"P5 3 2 255\n" + bytes([0, 1, 2]) * 2, [0, 1, 2]),
    # The largest value is 1000, so that 250 is a quarter of white.
    "pgm 1000": (b"P5 3 2 1000\n" + struct.pack(">HHH", 0, 250, 1000) * 2, [0, 64, 255]),
    "tiff small": (tiff(16, [0, 100, 255]), [0, 0, 0]),
    "tiff": (tiff(16, [0, 512, 65535]), [0, 2, 255]),
    "tiff big-endian": (tiff(16, [0, 512, 65535], order=">"), [0, 2, 255]),
    "tiff 12": (tiff(12, [0, 32, 2048, 4095]), [0, 2, 128, 255]),
    "tiff white is zero": (tiff(16, [65535, 65535 - 512, 0], white_is_zero=True), [0, 2, 255]),
    "tiff white is zero 8": (tiff(8, [255, 253, 0], white_is_zero=True), [0, 2, 255]),
}


@pytest.mark.filterwarnings("ignore:.* uses only the values")
@pytest.mark.parametrize("kind", WIDE)
def test_integer_pixels_are_scaled_by_the_depth_in_the_header(kind: str) -> None:
    content, expected = WIDE[kind]
    assert grey(content) == [expected] * 2
    with Image.open(io.BytesIO(content)) as image:
        assert grey(image) == [expected] * 2


def test_the_message_for_an_undecodable_tiff_names_both_possible_reasons() -> None:
    message = refusal(tiff(16, [65535, 0, 0], white_is_zero=True, order=">"), ImageError)
    assert message == "the data is damaged, or of a kind that Pillow does not decode: save it as PNG or JPEG"


UNKNOWN = {
    "32 bits, few": (tiff(32, [0, 100, 255]), "32-bit pixels"),
    "32 bits": (tiff(32, [0, 1000, 1023]), "32-bit pixels"),
    "32 bits, many": (tiff(32, [0, 1, 2**31]), "32-bit pixels"),
    "signed 8": (tiff(8, [-3, 0, 100], sample_format=2), "signed pixels"),
    "signed 16": (tiff(16, [-3, 0, 100], sample_format=2), "signed pixels"),
    "signed 16, none below 0": (tiff(16, [3, 0, 100], sample_format=2), "signed pixels"),
    "signed 32": (tiff(32, [3, 0, 100], sample_format=2), "signed pixels"),
    "floating point": (tiff(32, [0, 0, 1], sample_format=3), "floating-point pixels"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_pixels_of_unknown_range_are_refused(tmp_path: Path, kind: str) -> None:
    content, pixels = UNKNOWN[kind]
    path = tmp_path / "photo.tif"
    path.write_bytes(content)
    with Image.open(io.BytesIO(content)) as image:
        for source in (path, content, image):
            message = refusal(source, ImageError)
            assert f"{pixels} of unknown range: convert it to" in message


CLEAR = {
    "grey 16": (png(2, 16, 0, struct.pack(">HH", 300, 512), struct.pack(">H", 300)), [[255] * 3, [2] * 3]),
    "grey 16, only the exact value": (
        png(2, 16, 0, struct.pack(">HH", 301, 300), struct.pack(">H", 300)),
        [[1] * 3, [255] * 3],
    ),
    "grey 8": (png(2, 8, 0, bytes([7, 8]), struct.pack(">H", 7)), [[255] * 3, [8] * 3]),
    "grey 4": (png(2, 4, 0, bytes([0x5A]), struct.pack(">H", 5)), [[255] * 3, [170] * 3]),
    "grey 2": (png(4, 2, 0, bytes([0b00011011]), struct.pack(">H", 1)), [[0] * 3, [255] * 3, [170] * 3, [255] * 3]),
    "grey 1": (png(8, 1, 0, bytes([0b01111111]), struct.pack(">H", 0)), [[255] * 3] * 8),
    "colour 16": (
        png(
            2,
            16,
            2,
            struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 512, 256, 0),
            struct.pack(">3H", 0x1234, 0x5678, 0x9ABC),
        ),
        [[255] * 3, [2, 1, 0]],
    ),
    "colour 8": (png(2, 8, 2, bytes([1, 2, 3, 4, 5, 6]), struct.pack(">3H", 1, 2, 3)), [[255] * 3, [4, 5, 6]]),
}


@pytest.mark.filterwarnings("ignore:.* uses only the values")
@pytest.mark.parametrize("kind", CLEAR)
def test_a_transparent_colour_becomes_white_at_any_depth(kind: str) -> None:
    content, expected = CLEAR[kind]
    assert np.asarray(read_photo(content)[0]).tolist() == [expected] * 2
    with Image.open(io.BytesIO(content)) as image:
        before = dict(image.info)
        assert np.asarray(read_photo(image)[0]).tolist() == [expected] * 2
        assert image.info == before


@pytest.mark.filterwarnings("ignore:.* uses only the values")
def test_an_image_in_memory_of_mode_i16_counts_as_sixteen_bits() -> None:
    deep = Image.fromarray(np.array([[0, 100], [255, 255]], dtype=np.uint16))
    assert deep.mode == "I;16"
    assert grey(deep) == [[0, 0], [0, 0]]


# EXIF


def jpeg(exif: bytes) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(RAMP).save(stream, format="JPEG", exif=exif)
    return stream.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x0132] = 6, "a description of some length", "2024:01:01 00:00:00"
    return exif.tobytes()


DAMAGED = {
    **{f"random {seed}": b"Exif\0\0" + np.random.default_rng(seed).bytes(60) for seed in range(4)},
    "random with a TIFF header": b"Exif\0\0MM\0*\0\0\0\x08" + np.random.default_rng(5).bytes(80),
    "empty": b"Exif\0\0",
    "header alone": b"Exif\0\0MM\0*",
    "points beyond its end": b"Exif\0\0II*\0\xff\xff\xff\x7f",
    # The orientation is the first entry, so that nothing of it is left after the header.
    "cut": rotated()[:16],
}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_exif_leaves_the_photo_as_it_is_stored(tmp_path: Path, kind: str, form: str) -> None:
    path = tmp_path / "photo"
    options = {"lossless": True} if form == "WEBP" else {}
    Image.fromarray(RAMP).save(path, format=form, exif=DAMAGED[kind], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(path.read_bytes()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        photo, _ = read_photo(path)
        same, _ = read_photo(image)
    assert not caught
    assert photo.size == same.size == (9, 12)
    assert np.abs(np.asarray(photo).astype(int) - RAMP).mean() < 12


def test_intact_exif_still_rotates_the_photo() -> None:
    assert read_photo(jpeg(rotated()))[0].size == (12, 9)
