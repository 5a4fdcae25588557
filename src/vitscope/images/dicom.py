"""DICOM files: a frame as 8-bit pixels, by the rescaling and the window in the file or by a window of the caller."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vitscope.errors import CallError, ImageError
from vitscope.images.arrays import check_size
from vitscope.images.grey_window import HOW_TO_SLICE, GreyWindow, require_slice, windowed

_RGB = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")  # pydicom returns all of them as RGB


def read_dicom(
    file: Any, name: str, max_pixels: int, window: GreyWindow | None = None, index: int | None = None
) -> tuple[np.ndarray, tuple[np.ndarray, GreyWindow] | None]:
    """Return a frame of a DICOM file.

    Grey values are rescaled (to Hounsfield units in CT) before a window is applied. Without ``window``, the file's
    first VOI lookup table or window is used, and without these the full range of the stored bits. MONOCHROME1 is
    inverted.

    Reference: DICOM PS3.3, C.11.1 (modality), C.11.2 (VOI).

    Args:
        file: the open binary file, at its start.
        name: name of the file, for messages.
        max_pixels: maximum number of pixels; a larger frame is refused before it is decoded.
        window: the rescaled values of black and white.
        index: index of the frame, from 0; None if there is only one.

    Returns:
        uint8 (H, W) or (H, W, 3); and the values with the range of the stored bits, if that range was used and the
        values have more than 8 bits, otherwise None.

    Raises:
        CallError: there is no such frame, or a window for colours.
        ImageError: pydicom is not installed, the file holds no image, it has several frames and none was chosen, or
            pydicom cannot decode it.
    """
    try:
        import pydicom
        from pydicom.pixels import pixel_array
    except ModuleNotFoundError:
        raise ImageError(f'{name} is a DICOM file: pip install "vitscope[medical]" to read it') from None
    header = pydicom.dcmread(file, stop_before_pixels=True)
    if "Rows" not in header or "Columns" not in header:
        kind = getattr(header.get("SOPClassUID"), "name", "unknown kind")
        raise ImageError(f"{name} is a DICOM file without an image ({kind}): pass a file that holds one")
    check_size(int(header.Columns), int(header.Rows), name, max_pixels)
    count = int(header.get("NumberOfFrames") or 1)
    if index is None and count > 1:
        raise ImageError(f"{name} holds {count} frames: choose one, 0 to {count - 1}, with {HOW_TO_SLICE}")
    frame = 0 if index is None else require_slice(index, count, name, "frames" if count > 1 else "frame")
    _check_decoder(header, name)
    file.seek(0)
    values = pixel_array(file, index=frame)
    photometric = str(header.PhotometricInterpretation)
    if not photometric.startswith("MONOCHROME"):
        if window is not None:
            raise CallError(f"window is for grey pixels, and {name} holds colours ({photometric}): leave it out")
        return _colours(values, header, photometric, name), None
    groups = list(_groups(header, frame))
    values = _rescaled(values, groups)
    grey, unused_range = _grey(values, header, groups, window, name)
    return (255 - grey if photometric == "MONOCHROME1" else grey), unused_range


def _check_decoder(header: Any, name: str) -> None:
    """Refuse a compression that needs packages which are not installed.

    Raises:
        ImageError: pydicom cannot decode it.
    """
    from pydicom.pixels import get_decoder

    syntax = header.file_meta.TransferSyntaxUID
    if not syntax.is_compressed or syntax.is_deflated:
        return
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise ImageError(
            f"{name} is compressed as {syntax.name!r}, which pydicom does not decode: save it uncompressed"
        ) from None
    if not decoder.is_available:
        needed = "; or ".join(decoder.missing_dependencies)
        raise ImageError(
            f"{name} is compressed as {syntax.name!r}, for which pydicom lacks a package ({needed}): install it, or "
            "save the file uncompressed"
        )


def _groups(header: Any, frame: int) -> Iterator[Any]:
    """Yield the places where the values of a frame are described: those of the frame, those of all, the file itself."""
    for name, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        for group in list(header.get(name) or ())[index : index + 1]:
            for macro in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
                yield from list(group.get(macro) or ())[:1]
    yield header


def _first(groups: Sequence[Any], *names: str) -> Any:
    """Return the first group that has all of these elements with a value; None if no group has."""
    return next((group for group in groups if all(group.get(name) not in (None, "") for name in names)), None)


def _rescaled(values: np.ndarray, groups: Sequence[Any]) -> np.ndarray:
    """Return stored values in the units of the modality, such as Hounsfield units."""
    group = _first(groups, "ModalityLUTSequence")
    if group is not None and len(group.ModalityLUTSequence):
        return _looked_up(values, group.ModalityLUTSequence[0])[0]
    group = _first(groups, "RescaleSlope", "RescaleIntercept")
    if group is None:
        return values
    return values.astype(np.float64) * float(group.RescaleSlope) + float(group.RescaleIntercept)


def _grey(
    values: np.ndarray, header: Any, groups: Sequence[Any], window: GreyWindow | None, name: str
) -> tuple[np.ndarray, tuple[np.ndarray, GreyWindow] | None]:
    """Return rescaled values as uint8, and the values with the range of the stored bits if that range was used."""
    if window is not None:
        return windowed(values, window, name), None
    group = _first(groups, "VOILUTSequence")
    if group is not None and len(group.VOILUTSequence):
        shades, bits = _looked_up(values, group.VOILUTSequence[0])
        return windowed(shades, (0.0, float((1 << bits) - 1)), name), None
    group = _first(groups, "WindowCenter", "WindowWidth")
    if group is not None:
        return (_voi_window(values, group, name) * 255).round().astype(np.uint8), None
    full_range = _stored_range(header, groups)
    deep = int(header.BitsStored) > 8
    return windowed(values, full_range, name), (values, full_range) if deep else None


def _voi_window(values: np.ndarray, group: Any, name: str) -> np.ndarray:
    """Return the grey from 0 to 1 of the first window of a group: DICOM PS3.3, C.11.2.1.2.1 and C.11.2.1.3."""
    centre, width = (_number(group[key].value) for key in ("WindowCenter", "WindowWidth"))
    function = str(group.get("VOILUTFunction") or "LINEAR").upper()
    if function == "LINEAR":
        if width < 1:
            raise ImageError(f"{name} has a window of width {width:g}: choose another with window=(low, high)")
        # A width of 1 is a threshold.
        if width == 1:
            return (values > centre - 0.5).astype(np.float64)
        return ((values - (centre - 0.5)) / (width - 1) + 0.5).clip(0, 1)
    if width <= 0 or function not in ("LINEAR_EXACT", "SIGMOID"):
        raise ImageError(
            f"{name} has a window {function} of width {width:g}, which DICOM does not define: choose another with "
            "window=(low, high)"
        )
    if function == "LINEAR_EXACT":
        return ((values - centre) / width + 0.5).clip(0, 1)
    return 1 / (1 + np.exp((-4 * (values - centre) / width).clip(-700, 700)))


def _stored_range(header: Any, groups: Sequence[Any]) -> GreyWindow:
    """Return the rescaled values of the lowest and the highest number that the stored bits can hold."""
    group = _first(groups, "ModalityLUTSequence")
    if group is not None and len(group.ModalityLUTSequence):
        return 0.0, float((1 << int(group.ModalityLUTSequence[0].LUTDescriptor[2])) - 1)
    bits, signed = int(header.BitsStored), int(header.get("PixelRepresentation") or 0)
    ends = np.array([-(1 << bits - 1), (1 << bits - 1) - 1] if signed else [0, (1 << bits) - 1], dtype=np.float64)
    low, high = sorted(_rescaled(ends, groups).tolist())
    return low, high


def _looked_up(values: np.ndarray, item: Any) -> tuple[np.ndarray, int]:
    """Return the entries of a lookup table for the values, and the bits of an entry: DICOM PS3.3, C.11.1.1.1."""
    count, first, bits = (int(number) for number in item.LUTDescriptor)
    data = item.LUTData
    if isinstance(data, bytes):
        little = item.original_encoding[1] is not False
        data = np.frombuffer(data, dtype="<u2" if little else ">u2")
    entries = np.asarray(data, dtype=np.int64)[: count or 1 << 16]
    positions = np.floor(values).astype(np.int64) - first
    return entries[positions.clip(0, len(entries) - 1)], bits


def _number(value: Any) -> float:
    """Return a decimal string, or the first of several, as a finite number."""
    number = float(value if isinstance(value, str | int | float) else next(iter(value), math.nan))
    if not math.isfinite(number):
        raise ValueError("its window is not a number")
    return number


def _colours(values: np.ndarray, header: Any, photometric: str, name: str) -> np.ndarray:
    """Return colours as RGB, uint8 (H, W, 3)."""
    from pydicom.pixels import apply_color_lut

    if photometric == "PALETTE COLOR":
        values, bits = apply_color_lut(values, header)[..., :3], int(header.RedPaletteColorLookupTableDescriptor[2])
    elif photometric in _RGB:
        bits = int(header.BitsStored)
    else:
        raise ImageError(f"{name} holds colours as {photometric}, which is not supported: save it as RGB")
    return (values >> max(bits - 8, 0)).astype(np.uint8)
