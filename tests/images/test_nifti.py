"""NIfTI: one slice of a volume, in its units and upright, whatever the order and direction of its axes."""

import gzip
import io
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vitscope as vs
from tests.images.test_grey_window import by_hand
from vitscope.errors import ImageError
from vitscope.images.reading import read_photo

nibabel = pytest.importorskip("nibabel")

VOLUME = np.random.default_rng(0).integers(-1000, 1000, (5, 6, 4), dtype=np.int16)
WINDOW = (-160.0, 240.0)


def nifti(values: np.ndarray, axes: str = "LPS", *, version: int = 1, **header: Any) -> bytes:
    """Return a file of a volume whose axes increase in these directions."""
    orientation = nibabel.orientations.axcodes2ornt(axes)
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for axis, (world, sign) in enumerate(orientation.astype(int)):
        affine[world, axis] = sign * (2 + axis)
    image = (nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image)(values, affine)
    for name, value in header.items():
        image.header[name] = value
    return image.to_bytes()


def grey(source: Any, **options: Any) -> list[list[int]]:
    pixels = np.asarray(vs.read_image(source, **options))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].tolist()


def refusal(source: Any, **options: Any) -> str:
    with pytest.raises(vs.VitscopeError) as caught:
        vs.read_image(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".anything"])
def test_a_slice_is_read_from_plain_and_compressed_files(tmp_path: Path, suffix: str, version: int) -> None:
    content = nifti(VOLUME, version=version)
    content = gzip.compress(content) if suffix == ".nii.gz" else content
    path = tmp_path / f"brain{suffix}"
    path.write_bytes(content)
    for source in (path, content, io.BytesIO(content)):
        for index in (0, 3):
            # The axes of this file are those of DICOM: columns run to the left, rows to the back.
            assert grey(source, window=WINDOW, slice=index) == by_hand(VOLUME[:, :, index].T, *WINDOW)
    image = vs.read_image(path, window=WINDOW, slice=3)
    assert read_photo(image)[1] == f"{path} (slice 3, window -160 to 240)"


AXES = [
    "".join(ends)
    for order in itertools.permutations(("LR", "AP", "SI"))
    for ends in itertools.product(*order)
    if order[2] == "SI" or ends in {("A", "S", "R"), ("P", "I", "L"), ("S", "L", "P"), ("I", "R", "A")}
]


@pytest.mark.parametrize("axes", AXES)
def test_a_slice_is_upright_whatever_the_axes(axes: str) -> None:
    """Each voxel's position in the patient gives its place: left and down are the patient's left, back and feet."""
    volume = nibabel.Nifti1Image.from_bytes(nifti(VOLUME, axes))
    index = 2
    places = {}
    for i, j in itertools.product(range(5), range(6)):
        x, y, z = (volume.affine @ [i, j, index, 1])[:3]
        varying = {"S": (-x, -y), "I": (-x, -y), "A": (-x, -z), "P": (-x, -z), "L": (-y, -z), "R": (-y, -z)}[axes[2]]
        places[varying[::-1]] = VOLUME[i, j, index]
    rows = sorted({row for row, _ in places})
    columns = sorted({column for _, column in places})
    expected = np.array([[places[row, column] for column in columns] for row in rows])
    assert grey(volume.to_bytes(), window=WINDOW, slice=index) == by_hand(expected, *WINDOW)


def test_an_oblique_volume_is_turned_to_the_nearest_view() -> None:
    angle = np.deg2rad(20)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-1, -1, 1])
    content = nibabel.Nifti1Image(VOLUME, affine).to_bytes()
    assert grey(content, window=WINDOW, slice=1) == by_hand(VOLUME[:, :, 1].T, *WINDOW)


def test_a_file_without_an_orientation_is_announced() -> None:
    content = bytearray(nifti(VOLUME))
    for codes in ([1, 0, 0, 0], [0, 0, 1, 0]):  # one of the two transformations is enough
        content[252:256] = bytes(codes)
        vs.read_image(bytes(content), window=WINDOW, slice=0)
    content[252:256] = bytes(4)
    with pytest.warns(vs.VitscopeWarning, match=r"^the data does not state its orientation: left and right may be"):
        vs.read_image(bytes(content), window=WINDOW, slice=0)


def test_scaled_values_are_windowed_in_their_units() -> None:
    image = nibabel.Nifti1Image(VOLUME, np.diag([-1, -1, 1, 1]))
    image.header.set_slope_inter(0.5, 100)
    stored = nibabel.Nifti1Image.from_bytes(image.to_bytes())
    expected = np.asarray(stored.get_fdata())[:, :, 0].T
    assert grey(image.to_bytes(), window=WINDOW, slice=0) == by_hand(expected, *WINDOW)


def test_the_range_of_the_header_is_the_default() -> None:
    content = nifti(VOLUME, cal_min=WINDOW[0], cal_max=WINDOW[1])
    assert grey(content, slice=1) == by_hand(VOLUME[:, :, 1].T, *WINDOW)
    assert grey(content, slice=1, window=(0, 10)) == by_hand(VOLUME[:, :, 1].T, 0, 10)


def test_bytes_need_no_window_and_a_single_slice_no_choice() -> None:
    values = np.arange(240, dtype=np.uint8).reshape(12, 20)
    for shape in ((12, 20), (12, 20, 1), (12, 20, 1, 1)):
        assert grey(nifti(values.reshape(shape))) == values.T.tolist()
    assert grey(nifti(values.reshape(12, 20, 1)), slice=0) == values.T.tolist()
    assert grey(nifti(values.reshape(12, 10, 2, 1)), slice=1) == values.reshape(12, 10, 2)[:, :, 1].T.tolist()


COLOURS = np.zeros((5, 6), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
NAN = np.full((4, 4), np.nan, dtype=np.float32)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (nifti(VOLUME), {}, "is a volume of 4 slices: choose one, 0 to 3 from inferior to superior, with vitscope."),
        (nifti(VOLUME, "LSP"), {}, "choose one, 0 to 3 from anterior to posterior, with vitscope."),
        (nifti(VOLUME), {"window": WINDOW}, "is a volume of 4 slices"),
        (nifti(VOLUME), {"slice": 4}, "slice is 4, but the data has 4 slices: pass 0 to 3"),
        (nifti(VOLUME), {"slice": -1}, "slice is -1, but the data has 4 slices: pass 0 to 3"),
        (nifti(VOLUME[:, :, 0]), {"slice": 1}, "slice is 1, but the data has 1 slice: pass 0 to 0"),
        (nifti(VOLUME), {"slice": 0}, f"unknown range, in this slice {VOLUME[..., 0].min()} to {VOLUME[..., 0].max()}"),
        (nifti(NAN), {}, "holds 16 pixels that are NaN"),
        (nifti(NAN), {"window": (0, 1)}, "holds 16 pixels that are NaN"),
        (nifti(np.stack([VOLUME] * 3, -1)), {"slice": 0}, "holds 5×6×4×3 values: save one volume of it"),
        (nifti(COLOURS), {}, "only grey values are supported"),
        (nifti(VOLUME.astype(np.complex64)), {"slice": 0}, "holds values of type complex64"),
        (nifti(VOLUME)[:400], {"slice": 3, "window": WINDOW}, "the data is damaged: "),
        (gzip.compress(nifti(VOLUME))[:-60], {"slice": 3, "window": WINDOW}, "the data is damaged: "),
        (nifti(np.zeros((2, 20000, 1), np.uint8)), {"max_pixels": 30000}, "has 2×20000 pixels, more than the limit"),
        (gzip.compress(b"text" * 1000), {}, "the data is a gzip file"),
    ],
    ids=[
        *("no slice", "coronal", "no slice but a window", "beyond", "negative", "one slice", "no window", "nan"),
        *("nan with a window", "series", "colours", "complex", "cut", "cut gzip", "large", "other gzip"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(content: bytes, options: dict[str, Any], message: str) -> None:
    if "max_pixels" in options:
        with pytest.raises(ImageError, match=message):
            read_photo(content, **options)
    else:
        assert message in refusal(content, **options)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    content = nifti(VOLUME)
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(ImageError, match=r'is a NIfTI file: pip install "vitscope\[medical\]" to read it$'):
        read_photo(content)
