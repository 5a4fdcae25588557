"""Grey windows: which values become black and white, for every kind of grey pixel."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vitscope as vs
from tests.images.test_formats import png, tiff
from vitscope.images.grey_window import ImageFile
from vitscope.images.reading import read_photo

TWELVE = np.linspace(0, 4095, 12 * 10).round().reshape(10, 12).astype(np.uint16)
WINDOW = (1000.0, 3000.0)


def by_hand(values: np.ndarray, low: float, high: float) -> list[list[int]]:
    """Return each value's grey by the definition of a window, one pixel after another."""
    rows = []
    for row in values.tolist():
        shares = [min(max((float(value) - low) / (high - low), 0.0), 1.0) for value in row]
        rows.append([round(255 * share) for share in shares])
    return rows


def grey(image: Image.Image) -> list[list[int]]:
    pixels = np.asarray(image)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].tolist()


def saved(values: np.ndarray, kind: str) -> bytes:
    stream = io.BytesIO()
    if kind == "NPY":
        np.save(stream, values)
    else:
        Image.fromarray(values).save(stream, format=kind)
    return stream.getvalue()


@pytest.mark.parametrize("window", [WINDOW, [1000, 3000], np.array([1000, 3000])], ids=["tuple", "list", "array"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "NPY"])
def test_a_window_maps_its_ends_to_black_and_white(kind: str, window: Any) -> None:
    assert grey(vs.read_image(saved(TWELVE, kind), window=window)) == by_hand(TWELVE, *WINDOW)


@pytest.mark.parametrize(
    ("values", "window"),
    [
        (TWELVE, (0.0, 4095.0)),
        (TWELVE[..., None], (0.0, 4095.0)),
        (TWELVE.astype(np.float32) / 4095 - 0.5, (-0.25, 0.25)),
        (TWELVE.astype(np.int16) - 2000, (-160.0, 240.0)),
        (TWELVE.astype(np.int64) * 10**9, (0.0, 4095e9)),
        (TWELVE.astype(np.uint8), (10.0, 20.0)),
    ],
    ids=["uint16", "one channel", "float32", "int16", "int64", "uint8"],
)
def test_a_window_defines_the_range_of_any_grey_array(values: np.ndarray, window: tuple[float, float]) -> None:
    expected = by_hand(values.reshape(10, 12), *window)
    assert grey(vs.read_image(values, window=window)) == expected
    assert grey(vs.read_image(saved(values, "NPY"), window=window)) == expected


@pytest.mark.parametrize(
    ("content", "values"),
    [
        (tiff(16, [-300, 0, 100], sample_format=2), [-300, 0, 100]),
        (tiff(32, [-300, 0, 70000], sample_format=2), [-300, 0, 70000]),
        (tiff(32, [0, 0.25, 100.5], sample_format=3), [0, 0.25, 100.5]),
        (tiff(12, [0, 32, 100, 4095]), [0, 32, 100, 4095]),
        (tiff(8, [0, 50, 200]), [0, 50, 200]),
        (png(3, 16, 0, bytes([0, 0, 0, 60, 1, 1])), [0, 60, 257]),
    ],
    ids=["int16", "int32", "float32", "12 bits", "8 bits", "png"],
)
def test_a_window_is_in_the_units_of_the_file(content: bytes, values: list[float]) -> None:
    assert grey(vs.read_image(content, window=(-100, 150))) == by_hand(np.array([values] * 2), -100, 150)


def test_white_is_zero_is_inverted_after_the_window() -> None:
    content = tiff(16, [0, 1000, 2000, 4095], white_is_zero=True)
    assert grey(vs.read_image(content, window=(0, 2000)))[0] == [255, 255 - 128, 0, 0]


def test_a_transparent_grey_keeps_its_transparency() -> None:
    content = png(2, 16, 0, bytes([1, 44, 2, 0]), bytes([1, 44]))  # 300, which is transparent, and 512
    image = vs.read_image(content, window=(0, 512))
    assert image.mode == "RGBA"
    assert np.asarray(image)[0].tolist() == [[149, 149, 149, 0], [255, 255, 255, 255]]


def test_every_function_takes_the_image_and_results_name_the_window(tmp_path: Path) -> None:
    path = tmp_path / "scan.png"
    path.write_bytes(saved(TWELVE, "PNG"))
    image = vs.read_image(path, window=(0, 4095))
    model = vs.load("vit-nano")
    view = vs.rollout(vs.capture(model, image)).images[0]
    assert view.name == f"{path} (window 0 to 4095)"
    assert grey(view.photo) == by_hand(TWELVE, 0, 4095)
    file = ImageFile(path)
    file.window = (0.0, 4095.0)
    photo, name = read_photo(file)
    assert (grey(photo), name) == (grey(view.photo), view.name)
    assert read_photo(image)[1] == view.name


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ((5, 5), "window is (5, 5): two numbers are expected"),
        ((9, 5), "the values of black and white, smaller first"),
        ((1, 2, 3), "two numbers are expected"),
        ((0, float("inf")), "two numbers are expected"),
        ((0, True), "two numbers are expected"),
        ("12", "two numbers are expected"),
        (7, "two numbers are expected"),
    ],
    ids=str,
)
def test_a_window_that_is_no_pair_of_numbers_is_refused(window: Any, message: str) -> None:
    with pytest.raises(vs.CallError) as caught:
        vs.read_image(TWELVE, window=window)
    assert message in str(caught.value)


COLOURS = np.zeros((4, 4, 3), np.uint8)


@pytest.mark.parametrize("source", [COLOURS, Image.fromarray(COLOURS), saved(COLOURS, "PNG"), saved(COLOURS, "NPY")])
def test_a_window_is_refused_for_colours(source: Any) -> None:
    with pytest.raises(
        vs.CallError, match=r"^window is for grey pixels, and .* (3 channels|of mode RGB): leave it out$"
    ):
        vs.read_image(source, window=(0, 100))


@pytest.mark.parametrize("source", [TWELVE, Image.fromarray(COLOURS), saved(TWELVE, "PNG"), saved(TWELVE, "NPY")])
def test_a_slice_is_refused_for_a_single_image(source: Any) -> None:
    with pytest.raises(vs.CallError, match=r"^slice is 0, but .* is a single image: leave it out$"):
        vs.read_image(source, slice=0)


def test_nan_has_no_grey() -> None:
    with pytest.raises(vs.WorkError, match=r"^the array holds 2 pixels that are NaN"):
        vs.read_image(np.array([[0, np.nan], [np.nan, 1]]), window=(0, 1))


# Deep pixels that use little of their range

NARROW = r"uses only the values 100 to 4195 of 0 to 65535, so it is almost a single grey: .*--window low,high$"


@pytest.mark.parametrize("source", [TWELVE + 100, Image.fromarray(TWELVE + 100), saved(TWELVE + 100, "NPY")])
def test_twelve_bits_in_sixteen_are_announced_with_the_option(source: Any) -> None:
    with pytest.warns(vs.VitscopeWarning, match=NARROW):
        read_photo(source)


def test_the_warning_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "scan.png"
    path.write_bytes(saved(TWELVE + 100, "PNG"))
    with pytest.warns(vs.VitscopeWarning, match=f"^{path} {NARROW}"):
        read_photo(path)


@pytest.mark.parametrize(
    "values",
    [
        np.array([[0, 8192], [0, 0]], np.uint16),
        np.array([[40000, 48192], [0, 50000]], np.uint16),
        np.array([[7, 7], [7, 8]], np.uint8),
    ],
    ids=["an eighth", "wide", "8 bits"],
)
def test_no_warning_for_pixels_that_use_an_eighth_of_their_range_or_have_eight_bits(values: np.ndarray) -> None:
    read_photo(values)
    read_photo(saved(values, "PNG"))
