"""Reading: photos become upright RGB or are refused in one line. Painting: maps return to the correct pixels."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitscope.errors import CallError, ImageError, ImageNotFoundError, VitscopeError
from vitscope.images.image import InputImage, repeats_patches
from vitscope.images.preprocessing import Preprocessing
from vitscope.images.reading import read_photo


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def pixels(source: Any) -> np.ndarray:
    photo, _ = read_photo(source)
    assert photo.mode == "RGB"
    return np.asarray(photo)


def refusal(source: Any, error: type[VitscopeError], **options: Any) -> str:
    """Return the message of the error, which is one line."""
    with pytest.raises(error) as caught:
        read_photo(source, **options)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


# Reading


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_in_exif_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = np.asarray(noise(5, 3))
    # The pixels that a camera stores for each of the eight orientations, from the table of the EXIF standard.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(Image.fromarray(np.ascontiguousarray(stored)), tmp_path / "photo.png", exif=exif)
    photo, _ = read_photo(path)
    assert np.array_equal(np.asarray(photo), upright)
    assert photo.getexif().get(0x0112) in (None, 1)


def test_grey_becomes_three_equal_channels(tmp_path: Path) -> None:
    grey = np.asarray(noise(6, 4).convert("L"))
    for source in (saved(Image.fromarray(grey), tmp_path / "grey.png"), Image.fromarray(grey), grey, grey[..., None]):
        assert np.array_equal(pixels(source), np.repeat(grey[..., None], 3, axis=2))


def test_one_bit_becomes_black_and_white(tmp_path: Path) -> None:
    path = saved(Image.fromarray(np.eye(4, dtype=np.uint8) * 255).convert("1"), tmp_path / "bits.png")
    assert np.array_equal(pixels(path)[..., 1], np.eye(4) * 255)


def test_transparent_pixels_become_white(tmp_path: Path) -> None:
    array = np.zeros((2, 3, 4), dtype=np.uint8)
    array[..., 0] = 200
    array[:, 1, 3], array[:, 2, 3] = 128, 255
    for source in (saved(Image.fromarray(array), tmp_path / "clear.png"), array):
        result = pixels(source)
        assert (result[:, 0] == 255).all()
        assert (result[:, 2] == (200, 0, 0)).all()
        # Red with an opacity of 128 / 255 over white.
        assert np.abs(result[0, 1].astype(int) - [227, 127, 127]).max() <= 1


def test_transparent_grey_becomes_white() -> None:
    array = np.zeros((2, 2, 2), dtype=np.uint8)
    array[:, 1, 1] = 255
    assert pixels(array)[0].tolist() == [[255] * 3, [0] * 3]


def test_the_transparent_colour_of_a_palette_becomes_white(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1, 2], [2, 1, 0]], dtype=np.uint8))
    image = image.convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    path = saved(image, tmp_path / "palette.png", transparency=1)
    white = [255, 255, 255]
    assert pixels(path).tolist() == [[[10, 20, 30], white, [70, 80, 90]], [[70, 80, 90], white, [10, 20, 30]]]


def test_sixteen_bits_become_eight(tmp_path: Path) -> None:
    deep = np.array([[0, 255, 256, 257], [32768, 65535, 40000, 12345]], dtype=np.uint16)
    expected = (deep // 256).astype(np.uint8)
    path = saved(Image.fromarray(deep), tmp_path / "deep.png")
    with Image.open(path) as image:
        assert image.mode.startswith("I")
    for source in (path, deep):
        assert np.array_equal(pixels(source), np.repeat(expected[..., None], 3, axis=2))
    colour = np.stack([deep, deep[::-1], deep], axis=2)
    assert np.array_equal(pixels(colour), colour // 256)


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    red = Image.new("RGB", (16, 16), (220, 30, 40))
    path = saved(red.convert("CMYK"), tmp_path / "print.jpg", quality=100)
    assert np.abs(pixels(path).astype(int) - (220, 30, 40)).max() <= 6


def test_a_very_long_strip_is_read(tmp_path: Path) -> None:
    strip = noise(3000, 2)
    assert np.array_equal(pixels(saved(strip, tmp_path / "strip.png")), np.asarray(strip))


def test_the_name_is_the_path_and_the_callers_image_is_unchanged(tmp_path: Path) -> None:
    path = saved(noise(4, 4), tmp_path / "photo.png")
    assert read_photo(path)[1] == read_photo(str(path))[1] == str(path)
    image = noise(4, 4).convert("RGBA")
    before = image.copy()
    read_photo(image)
    assert image == before


# Refusing


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1)], ids=str)
def test_a_single_row_or_column_is_refused(tmp_path: Path, shape: tuple[int, int]) -> None:
    width, height = shape
    for source in (saved(noise(*shape), tmp_path / "dot.png"), noise(*shape), np.asarray(noise(*shape))):
        assert f"{width}×{height} pixels: at least 2×2 are needed" in refusal(source, ImageError)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp"])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = saved(noise(64, 64), tmp_path / f"photo.{suffix}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = refusal(path, ImageError)
    assert message.startswith(f"{path} is ")


def test_an_opened_image_whose_file_is_truncated_is_refused(tmp_path: Path) -> None:
    path = saved(noise(64, 64), tmp_path / "photo.jpg")
    path.write_bytes(path.read_bytes()[:-2000])
    with Image.open(path) as image:
        assert refusal(image, ImageError).startswith(f"{path} is damaged")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged metadata
@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF"])
def test_a_file_with_changed_bytes_gives_a_photo_or_one_line(tmp_path: Path, form: str) -> None:
    """Decoders raise errors of any class for broken data; the caller sees only vitscope's own errors."""
    random = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "hello"
    path = saved(noise(12, 9), tmp_path / "photo", format=form, **({} if form == "GIF" else {"exif": exif}))
    original = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    messages = []
    for _ in range(100):
        broken = original.copy()
        positions = random.integers(0, min(len(broken), 120), size=2)
        broken[positions] = random.integers(0, 256, size=2)
        path.write_bytes(broken.tobytes())
        try:
            assert read_photo(path)[0].mode == "RGB"
        except VitscopeError as error:
            messages.append(str(error))
    assert messages
    assert not any("\n" in message for message in messages)


def test_errors_of_decoders_become_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(noise(4, 4), tmp_path / "photo.png")
    for error in (struct.error("bad\nformat"), KeyError("tag"), OSError(), MemoryError(), zlib.error("Error -3")):
        monkeypatch.setattr("vitscope.images.reading._to_rgb", lambda *_, error=error: _raise(error))
        assert refusal(path, ImageError).startswith(f"{path} is damaged: ")
        assert refusal(noise(4, 4), ImageError).startswith("the image is damaged: ")


def test_damaged_exif_loses_only_the_orientation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = noise(6, 4)
    monkeypatch.setattr("vitscope.images.reading.ImageOps.exif_transpose", lambda _: _raise(struct.error("bad")))
    photo, _ = read_photo(saved(original, tmp_path / "photo.png"))
    assert np.array_equal(np.asarray(photo), np.asarray(original))


def test_int32_pixels_up_to_255_count_as_eight_bits() -> None:
    eight, sixteen = np.array([[0, 255], [7, 80]]), np.array([[0, 65535], [1799, 20560]])
    for values in (eight, sixteen):
        photo, _ = read_photo(Image.fromarray(values.astype(np.int32)))
        assert np.array_equal(np.asarray(photo)[..., 0], eight)


def _raise(error: Exception) -> None:
    raise error


def test_a_text_file_named_png_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    path.write_text("not an image\nat all\n")
    assert refusal(path, ImageError) == f"{path} is not an image in any format that Pillow reads"


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nothing.jpg"
    path.touch()
    assert refusal(path, ImageError) == f"{path} is an empty file"


def test_a_folder_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path, ImageNotFoundError)
    assert refusal(tmp_path / "no.png", ImageNotFoundError) == f"{tmp_path / 'no.png'} does not exist"
    assert "does not exist" in refusal("", ImageNotFoundError) or "folder" in refusal("", ImageNotFoundError)
    assert "File name too long" in refusal("n" * 5000, ImageNotFoundError)
    with pytest.raises(FileNotFoundError):
        read_photo(tmp_path / "no.png")


def test_a_file_without_read_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(noise(4, 4), tmp_path / "secret.png")

    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("vitscope.images.reading.Image.open", refuse)
    assert refusal(path, ImageError) == f"{path} cannot be read: permission denied"


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((4, 4, 3)), "float64"),
        (np.zeros((4, 4, 3), dtype=np.float32), "float32"),
        (np.zeros((4, 4, 3), dtype=np.int64), "int64"),
        (np.zeros((4, 4), dtype=bool), "bool"),
        (np.zeros(4, dtype=np.uint8), "(4,)"),
        (np.zeros((4, 4, 5), dtype=np.uint8), "(4, 4, 5)"),
        (np.zeros((2, 4, 4, 3), dtype=np.uint8), "(2, 4, 4, 3)"),
        (np.zeros((3, 4, 4), dtype=np.uint8)[..., :0], "(3, 4, 0)"),
        (np.zeros((0, 4, 3), dtype=np.uint8), "(0, 4, 3)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_array_that_is_not_an_image_is_refused_with_its_dtype_or_shape(array: np.ndarray, reason: str) -> None:
    assert reason in refusal(array, CallError)


@pytest.mark.parametrize("source", [5, None, b"photo.png", ["photo.png"], {}], ids=repr)
def test_other_values_are_refused_with_a_list_of_sources(source: Any) -> None:
    assert "pass a path, a PIL image, a uint8 array" in refusal(source, CallError)


def test_pixels_of_unknown_range_are_refused() -> None:
    assert "floating-point pixels" in refusal(Image.new("F", (4, 4)), ImageError)
    assert "32-bit pixels" in refusal(Image.new("I", (4, 4), 70000), ImageError)


# The limit


def png_of_size(path: Path, width: int, height: int) -> Path:
    """Write a PNG of a hundred bytes that claims any size. Its pixels are missing, so decoding must fail."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    return path


def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VITSCOPE_MAX_PIXELS", raising=False)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    before = Image.MAX_IMAGE_PIXELS
    message = refusal(png_of_size(tmp_path / "bomb.png", 30_000, 30_000), ImageError)
    assert "30000×30000 pixels, more than the limit of 100,000,000" in message
    assert "VITSCOPE_MAX_PIXELS" in message
    assert before == Image.MAX_IMAGE_PIXELS


def test_the_limit_can_be_raised_and_lowered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = png_of_size(tmp_path / "bomb.png", 30_000, 30_000)
    small = saved(noise(20, 10), tmp_path / "small.png")
    before = Image.MAX_IMAGE_PIXELS
    # A file below the limit is decoded; only then is the damage detected.
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: _raise(OSError("decoded")))
    assert "decoded" in refusal(huge, ImageError, max_pixels=10**9)
    monkeypatch.setenv("VITSCOPE_MAX_PIXELS", "1e9")
    assert "decoded" in refusal(huge, ImageError)
    assert "the limit of 100" in refusal(huge, ImageError, max_pixels=100)
    monkeypatch.undo()
    assert read_photo(small, max_pixels=200)[0].size == (20, 10)
    assert "the limit of 199" in refusal(small, ImageError, max_pixels=199)
    monkeypatch.setenv("VITSCOPE_MAX_PIXELS", "199")
    assert "the limit of 199" in refusal(small, ImageError)
    assert read_photo(small, max_pixels=200)[0].size == (20, 10)
    assert before == Image.MAX_IMAGE_PIXELS


def test_a_limit_that_is_not_a_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITSCOPE_MAX_PIXELS", "plenty")
    assert "'plenty'" in refusal(saved(noise(4, 4), tmp_path / "small.png"), CallError)


def test_pillows_own_limit_is_ignored_and_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's limit has no effect and keeps its value, even if the file is not an image."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    assert read_photo(saved(noise(20, 10), tmp_path / "small.png"))[0].size == (20, 10)
    assert Image.MAX_IMAGE_PIXELS == 50
    (tmp_path / "notes.png").write_text("text")
    refusal(tmp_path / "notes.png", ImageError)
    assert Image.MAX_IMAGE_PIXELS == 50


def test_a_strip_too_thin_for_a_crop_is_refused_before_it_is_stretched() -> None:
    with pytest.raises(ImageError, match="30000×2 pixels, too thin a strip for a crop of 224×224") as caught:
        Preprocessing((224, 224), fit="crop")(noise(30_000, 2))
    assert "\n" not in str(caught.value)
    values, _ = Preprocessing((16, 16), fit="squash")(noise(30_000, 2))
    assert values.shape == (3, 16, 16)


# Painting


def test_each_patch_is_a_block_of_one_value_over_its_pixels() -> None:
    image = InputImage(noise(12, 8), (0.0, 0.0, 12.0, 8.0))
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    painted = image.paint(values, smooth=False)
    assert painted.dtype == np.float32
    assert np.array_equal(painted, values.repeat(4, axis=0).repeat(4, axis=1))


def test_smooth_maps_have_the_patch_values_at_the_centres_and_stay_in_range() -> None:
    image = InputImage(noise(27, 27), (0.0, 0.0, 27.0, 27.0))
    values = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0.5]], dtype=np.float32)
    painted = image.paint(values)
    centres = painted[4::9, 4::9]
    np.testing.assert_allclose(centres, values, atol=1e-6)
    assert painted.min() >= 0
    assert painted.max() <= 1
    assert len(np.unique(painted)) > len(np.unique(image.paint(values, smooth=False))) == 3


@pytest.mark.parametrize(("height", "width"), [(4, 6), (3, 5), (1, 2), (8, 8)])
def test_maps_of_coarser_patches_are_recognised(height: int, width: int) -> None:
    coarse = np.arange(-(-height // 2) * -(-width // 2), dtype=np.float32).reshape(-(-height // 2), -1)
    repeated = coarse.repeat(2, axis=0).repeat(2, axis=1)[:height, :width]
    assert repeats_patches(repeated)
    assert repeats_patches(np.zeros((height, width)))
    repeated[0, 1] += 1
    assert not repeats_patches(repeated)


@pytest.mark.parametrize("smooth", [True, False])
def test_pixels_outside_the_region_are_nan(smooth: bool) -> None:
    painted = InputImage(noise(10, 6), (2.0, 1.0, 8.0, 4.0)).paint(np.ones((3, 6)), smooth=smooth)
    inside = np.zeros((6, 10), dtype=bool)
    inside[1:4, 2:8] = True
    assert (painted[inside] == 1).all()
    assert np.isnan(painted[~inside]).all()


def test_a_given_size_scales_the_box() -> None:
    image = InputImage(noise(10, 6), (2.0, 1.0, 8.0, 4.0))
    painted = image.paint(np.arange(18).reshape(3, 6), size=(20, 12), smooth=False)
    assert painted.shape == (12, 20)
    expected = image.paint(np.arange(18).reshape(3, 6), smooth=False).repeat(2, axis=0).repeat(2, axis=1)
    np.testing.assert_array_equal(painted, expected)


def test_values_on_padding_are_dropped() -> None:
    """With a crop larger than the photo, the outer ring of patches lies on padding and the inner ones on the photo."""
    image = InputImage(noise(8, 4), (-2.0, -2.0, 10.0, 6.0))
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    painted = image.paint(values, smooth=False)
    assert np.array_equal(painted, values[1:-1, 1:-1].repeat(2, axis=0).repeat(2, axis=1))


def test_uncropped_has_the_whole_photo_as_its_region() -> None:
    image = InputImage(noise(10, 6), (2.0, 1.0, 8.0, 4.0), "cat.png")
    full = image.uncropped()
    assert full.photo is image.photo
    assert full.box == (0.0, 0.0, 10.0, 6.0)
    assert full.name == "cat.png"
    assert full == InputImage.from_photo(image.photo, "cat.png")
    assert not np.isnan(full.paint(np.ones((3, 5)))).any()
    assert image.box == (2.0, 1.0, 8.0, 4.0)
