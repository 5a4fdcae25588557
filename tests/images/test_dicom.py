"""DICOM: rescaling, windows, inversion, colours and frames, compared with pydicom's own functions."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vitscope as vs
from tests.images.test_grey_window import by_hand
from vitscope.errors import ImageError
from vitscope.images.reading import read_photo

pydicom = pytest.importorskip("pydicom")

CT = np.linspace(0, 4095, 16 * 12).round().reshape(12, 16).astype(np.uint16)
HOUNSFIELD = {"RescaleSlope": 1, "RescaleIntercept": -1024}


def dataset(values: np.ndarray, **elements: Any) -> Any:
    """Return a data set of one frame (H, W), colours (H, W, 3), or frames (N, H, W)."""
    header = pydicom.Dataset()
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    colours = values.ndim == 3 and values.shape[-1] == 3
    frames = values.ndim == 3 and not colours
    header.Rows, header.Columns = values.shape[1:] if frames else values.shape[:2]
    if frames:
        header.NumberOfFrames = len(values)
    header.SamplesPerPixel, header.PhotometricInterpretation = (3, "RGB") if colours else (1, "MONOCHROME2")
    if colours:
        header.PlanarConfiguration = 0
    bits = values.dtype.itemsize * 8
    header.BitsAllocated, header.BitsStored, header.HighBit = (
        bits,
        12 if bits == 16 else 8,
        (12 if bits == 16 else 8) - 1,
    )
    header.PixelRepresentation = int(values.dtype.kind == "i")
    header.PixelData = values.tobytes()
    for name, value in elements.items():
        setattr(header, name, value)
    return header


def encoded(header: Any) -> bytes:
    stream = io.BytesIO()
    header.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def dicom(values: np.ndarray, **elements: Any) -> bytes:
    return encoded(dataset(values, **elements))


def grey(source: Any, **options: Any) -> np.ndarray:
    pixels = np.asarray(vs.read_image(source, **options)).astype(int)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def table(entries: list[int], first: int, bits: int, kind: str = "OW") -> Any:
    """Return a lookup table whose entries are written as words or as numbers."""
    item = pydicom.Dataset()
    item.LUTDescriptor = [len(entries), first, bits]
    item.add_new("LUTData", kind, entries if kind == "US" else np.array(entries, dtype=np.uint16).tobytes())
    return [item]


# Grey values

VIEWS: dict[str, dict[str, Any]] = {
    "linear": {**HOUNSFIELD, "WindowCenter": 40, "WindowWidth": 400},
    "first of two": {**HOUNSFIELD, "WindowCenter": [40, 600], "WindowWidth": [400, 2000]},
    "exact": {**HOUNSFIELD, "WindowCenter": 40, "WindowWidth": 400, "VOILUTFunction": "LINEAR_EXACT"},
    "sigmoid": {**HOUNSFIELD, "WindowCenter": 40, "WindowWidth": 400, "VOILUTFunction": "SIGMOID"},
    "narrow": {**HOUNSFIELD, "WindowCenter": 40, "WindowWidth": 2},
    "no rescaling": {"WindowCenter": 2048, "WindowWidth": 3000},
    "slope": {"RescaleSlope": 0.25, "RescaleIntercept": 7.5, "WindowCenter": 500, "WindowWidth": 300},
    "voi table": {"VOILUTSequence": table([entry * 8 for entry in range(512)], 1000, 12)},
    "voi table before window": {
        "VOILUTSequence": table([4095 - entry for entry in range(4096)], 0, 12),
        "WindowCenter": 40,
        "WindowWidth": 400,
    },
    "modality table": {
        "ModalityLUTSequence": table([entry * 2 for entry in range(2048)], 1024, 16, "US"),
        "WindowCenter": 1500,
        "WindowWidth": 2000,
    },
    "full range": HOUNSFIELD,
}


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("view", VIEWS)
def test_grey_values_are_those_of_pydicom(view: str, inverted: bool) -> None:
    header = dataset(CT, **VIEWS[view], PhotometricInterpretation="MONOCHROME1" if inverted else "MONOCHROME2")
    values = pydicom.pixels.apply_voi_lut(pydicom.pixels.apply_modality_lut(CT, header), header)
    low, high = float(values.min()), float(values.max())
    if "VOILUTSequence" in header:
        low, high = 0.0, 4095.0
    expected = (values - low) / (high - low) * 255
    expected = 255 - expected if inverted else expected
    assert np.abs(grey(encoded(header)) - expected).max() <= 0.5 + 1e-9
    assert grey(encoded(header)).std() > 10


def test_signed_values_are_windowed_in_the_units_of_the_modality() -> None:
    values = CT.astype(np.int16) - 2048
    content = dicom(values, RescaleSlope=2, RescaleIntercept=10)
    assert grey(content, window=(-160, 240)).tolist() == by_hand(values.astype(float) * 2 + 10, -160, 240)
    assert grey(content).tolist() == by_hand(values.astype(float), -2048, 2047)


def test_a_window_of_the_caller_replaces_that_of_the_file() -> None:
    content = dicom(CT, **VIEWS["linear"], PhotometricInterpretation="MONOCHROME1")
    expected = 255 - np.array(by_hand(CT.astype(float) - 1024, 0, 1000))
    assert grey(content, window=(0, 1000)).tolist() == expected.tolist()


def test_a_width_of_one_is_a_threshold() -> None:
    assert (grey(dicom(CT, WindowCenter=2000, WindowWidth=1)) == np.where(CT > 1999.5, 255, 0)).all()


def test_eight_bits_are_read_as_they_are() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert grey(dicom(values)).tolist() == values.tolist()


def test_a_file_without_a_window_that_uses_little_of_its_range_is_announced() -> None:
    content = dicom(CT // 16)
    with pytest.warns(vs.VitscopeWarning, match=r"the data uses only the values 0 to 255 of 0 to 4095"):
        read_photo(content)
    assert grey(content, window=(0, 255)).max() == 255


# Frames

FRAMES = np.stack([CT, CT[::-1], CT // 2])


def test_a_frame_is_read_and_named(tmp_path: Path) -> None:
    path = tmp_path / "cine.dcm"
    path.write_bytes(dicom(FRAMES, **HOUNSFIELD))
    for index in range(3):
        assert grey(path, slice=index, window=(-1024, 3071)).tolist() == by_hand(FRAMES[index], 0, 4095)
    image = vs.read_image(path, slice=1)
    assert read_photo(image)[1] == f"{path} (slice 1)"


def test_a_frame_has_its_own_rescaling_and_window() -> None:
    per_frame, shared = [], pydicom.Dataset()
    for offset in (0, -1000, -2000):
        group, rescaling = pydicom.Dataset(), pydicom.Dataset()
        rescaling.RescaleSlope, rescaling.RescaleIntercept = 1, offset
        group.PixelValueTransformationSequence = [rescaling]
        per_frame.append(group)
    voi = pydicom.Dataset()
    voi.WindowCenter, voi.WindowWidth, voi.VOILUTFunction = 500, 1000, "LINEAR_EXACT"
    shared.FrameVOILUTSequence = [voi]
    content = dicom(FRAMES, PerFrameFunctionalGroupsSequence=per_frame, SharedFunctionalGroupsSequence=[shared])
    for index, offset in enumerate((0, -1000, -2000)):
        assert grey(content, slice=index).tolist() == by_hand(FRAMES[index].astype(float) + offset, 0, 1000)


# Colours


def test_colours_are_read_and_have_no_window() -> None:
    values = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(vs.read_image(dicom(values))), values)
    assert refusal(dicom(values), window=(0, 9)).startswith(
        "window is for grey pixels, and the data holds colours (RGB)"
    )
    planes = dicom(values, PlanarConfiguration=1, PixelData=values.transpose(2, 0, 1).tobytes())
    assert np.array_equal(np.asarray(vs.read_image(planes)), values)


def test_a_palette_becomes_colours() -> None:
    palette = {
        f"{colour}PaletteColorLookupTable{part}": ([4, 0, 16] if part == "Descriptor" else data.tobytes())
        for colour, data in zip(
            ("Red", "Green", "Blue"), np.arange(12, dtype=np.uint16).reshape(3, 4) * 256 * 20, strict=True
        )
        for part in ("Descriptor", "Data")
    }
    values = np.array([[0, 1], [2, 3]], dtype=np.uint8)
    content = dicom(values, PhotometricInterpretation="PALETTE COLOR", **palette)
    assert np.asarray(vs.read_image(content))[1, 0].tolist() == [40, 120, 200]


# Refusals


def refusal(source: Any, **options: Any) -> str:
    with pytest.raises(vs.VitscopeError) as caught:
        vs.read_image(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def compressed(syntax: str) -> bytes:
    header = dataset(CT)
    header.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
    header.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8" + bytes(20)])
    header["PixelData"].VR = "OB"
    return encoded(header)


def no_image() -> bytes:
    header = dataset(CT, SOPClassUID=pydicom.uid.RTStructureSetStorage)
    for name in ("Rows", "Columns", "PixelData"):
        delattr(header, name)
    return encoded(header)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (
            dicom(FRAMES),
            {},
            "holds 3 frames: choose one, 0 to 2, with vitscope.read_image(image, slice=N) or --slice N",
        ),
        (dicom(FRAMES), {"slice": 3}, "slice is 3, but the data has 3 frames: pass 0 to 2"),
        (dicom(FRAMES), {"slice": -1}, "slice is -1, but the data has 3 frames: pass 0 to 2"),
        (dicom(CT), {"slice": 1}, "slice is 1, but the data has 1 frame: pass 0 to 0"),
        (compressed("MPEG4HP41"), {}, "which pydicom does not decode: save it uncompressed"),
        (no_image(), {}, "is a DICOM file without an image (RT Structure Set Storage)"),
        (dicom(CT, WindowCenter=1, WindowWidth=0), {}, "has a window of width 0: choose another with window="),
        (dicom(CT, PhotometricInterpretation="HSV"), {}, "holds colours as HSV, which is not supported"),
        (dicom(CT, Rows=60000, Columns=60000), {}, "has 60000×60000 pixels, more than the limit"),
        (dicom(CT, PixelData=b"\0\0"), {}, "the data is damaged: "),
        (dicom(CT)[:200], {}, "the data "),
        (dicom(CT)[:-100], {}, "the data is damaged: "),
    ],
    ids=[
        *("frames", "beyond", "negative", "one frame", "mpeg", "no image", "no width", "hsv"),
        *("large", "few pixels", "header alone", "cut"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(content: bytes, options: dict[str, Any], message: str) -> None:
    assert message in refusal(content, **options)


def test_a_compression_without_its_package_is_named() -> None:
    content = compressed("JPEGLosslessSV1")
    if pydicom.pixels.get_decoder(pydicom.uid.JPEGLosslessSV1).is_available:
        pytest.skip("a package that decodes it is installed")
    message = refusal(content)
    assert "is compressed as 'JPEG Lossless" in message
    assert "pylibjpeg" in message


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ImageError, match=r'is a DICOM file: pip install "vitscope\[medical\]" to read it$'):
        read_photo(dicom_content)


dicom_content = dicom(CT)
