"""Outlines: which pixels of a photo are an object."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image
from skimage.draw import polygon2mask

from vitscope.compositing.grabcut import refined
from vitscope.errors import CallError
from vitscope.images.image import InputImage
from vitscope.images.reading import check_file, read_photo
from vitscope.perturb.segments import segment
from vitscope.validation import number, whole_number

LEAST_SIDE = 2  # pixels: less has no shape that could be seen smaller


@dataclass(frozen=True, eq=False)
class ObjectMask:
    """An object of a photo.

    Attributes:
        name: what it is called in tables and figures.
        mask: (pixel height, pixel width) of the whole photo, True on the object.
        label: the class that is asked about, where it is not the name.
    """

    name: str
    mask: Bool[np.ndarray, "pixel_height pixel_width"]
    label: str | None = None

    @cached_property
    def box(self) -> tuple[int, int, int, int]:
        """(left, top, width, height) of the pixels it covers."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        left, top = int(columns[0]), int(rows[0])
        return left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) of the middle of its box, in pixels of the photo."""
        left, top, width, height = self.box
        return left + width / 2, top + height / 2

    @cached_property
    def area(self) -> float:
        """The share of the photo that it covers."""
        return float(self.mask.mean())


def outline(
    image: Any,
    *,
    box: Any = None,
    polygon: Any = None,
    mask: Any = None,
    segments: Any = None,
    cut: Any = "quickshift",
    refine: bool = False,
    name: str = "object",
    label: str | None = None,
) -> ObjectMask:
    """Mark an object in a photo, by exactly one of ``box``, ``polygon``, ``mask`` and ``segments``.

    Args:
        image: a path, PIL image or uint8 array (H, W, 3).
        box: (left, top, width, height) in pixels, inside the photo.
        polygon: its corners (x, y) in pixels, three or more.
        mask: as large as the photo: an array, True or above half its range on the object; or an image file.
        segments: labels of segments, as ``vitscope lime`` lists them.
        cut: how the photo is cut into segments: ``"quickshift"``, ``"slic"``, or labels (H, W).
        refine: move a rough outline to the object's borders with GrabCut (Rother, Kolmogorov & Blake, 2004); needs
            ``pip install 'vitscope[opencv]'``.
        name: what it is called in tables and figures.
        label: the class that is asked about; by default the name, if the model has such a class.

    Raises:
        CallError: outside the image, empty, all of it, or of another size.
    """
    photo = read_photo(image)[0]
    ways = {"box": box, "polygon": polygon, "mask": mask, "segments": segments}
    given = [way for way, value in ways.items() if value is not None]
    if len(given) != 1:
        raise CallError(
            f"an object is marked by one of box, polygon, mask or segments; {', '.join(given) or 'nothing'} came"
        )
    if box is not None:
        marked = _boxed(box, photo, name)
    elif polygon is not None:
        marked = _enclosed(polygon, photo, name)
    elif segments is not None:
        marked = _picked(segments, cut, photo, name)
    else:
        marked = _masked(mask, photo, name)
    _check(marked, name)
    if refine:
        marked = refined(np.asarray(photo), marked, name)
        _check(marked, name)
    return ObjectMask(name, marked, label)


def outlined(image: Any, objects: Any) -> list[ObjectMask]:
    """The objects of one photo, however they were named: :func:`vitscope.compose` takes these.

    Raises:
        CallError: none, two of one name, of another photo, or two that overlap.
    """
    named: Any = objects
    if (
        isinstance(objects, ObjectMask | np.ndarray | str | Path | Image.Image)
        or _is_box(objects)
        or _is_polygon(objects)
    ):
        named = [objects]
    if not isinstance(named, Mapping):
        try:
            named = list(named)
        except TypeError:
            raise CallError(f"objects is {objects!r}: pass boxes, masks, polygons or vitscope.outline(…)") from None
        names = [one.name if isinstance(one, ObjectMask) else f"object {i + 1}" for i, one in enumerate(named)]
        if len(named) == 1 and not isinstance(named[0], ObjectMask):
            names = ["object"]
        if len(set(names)) < len(names):
            raise CallError(f"the objects are called {', '.join(names)}: give each a name of its own")
        named = dict(zip(names, named, strict=True))
    if not named:
        raise CallError("no object was marked: pass a box (left, top, width, height), a mask or a polygon")
    found = [_outlined(image, str(name), one) for name, one in named.items()]
    photo = read_photo(image)[0]
    for one in found:
        _check_size(one.mask, photo, one.name)
    _check_apart(found)
    return found


def _outlined(image: Any, name: str, given: Any) -> ObjectMask:
    if isinstance(given, ObjectMask):
        return ObjectMask(name, given.mask, given.label)
    if _is_box(given):
        return outline(image, box=given, name=name)
    if _is_polygon(given):
        return outline(image, polygon=given, name=name)
    if isinstance(given, np.ndarray | str | Path | Image.Image):
        return outline(image, mask=given, name=name)
    return outline(image, polygon=given, name=name)


def _is_box(given: Any) -> bool:
    flat = isinstance(given, Sequence | np.ndarray) and not isinstance(given, str) and len(given) == 4
    return flat and all(isinstance(part, int | float | np.number) for part in given)


def _is_polygon(given: Any) -> bool:
    if isinstance(given, np.ndarray):
        return given.ndim == 2 and given.shape[1] == 2 and len(given) > 2
    pairs = isinstance(given, Sequence) and not isinstance(given, str) and len(given) > 2
    return pairs and all(
        isinstance(corner, Sequence | np.ndarray)
        and len(corner) == 2
        and all(isinstance(part, int | float | np.number) for part in corner)
        for corner in given
    )


def _boxed(box: Any, photo: Image.Image, name: str) -> np.ndarray:
    if isinstance(box, str) or np.ndim(box) != 1:
        raise CallError(f"the box of {name} is {box!r}: left, top, width, height are expected")
    if len(box) != 4:
        raise CallError(f"the box of {name} has {len(box)} numbers: left, top, width, height are expected")
    left, top, width, height = (number(part, f"the box of {name}") for part in box)
    shown = f"the box of {name} is {left:g},{top:g},{width:g},{height:g} (left, top, width, height)"
    if width < LEAST_SIDE or height < LEAST_SIDE:
        raise CallError(f"{shown}: it is empty, {LEAST_SIDE} pixels a side are the least")
    if left < 0 or top < 0 or left + width > photo.width or top + height > photo.height:
        raise CallError(f"{shown}: it reaches outside the image of {photo.width}×{photo.height} pixels")
    marked = np.zeros((photo.height, photo.width), dtype=bool)
    marked[round(top) : round(top + height), round(left) : round(left + width)] = True
    return marked


def _enclosed(polygon: Any, photo: Image.Image, name: str) -> np.ndarray:
    try:
        corners = np.asarray(polygon, dtype=np.float64)
    except (TypeError, ValueError):
        corners = np.zeros(0)
    if corners.ndim != 2 or corners.shape[1:] != (2,) or len(corners) < 3 or not np.isfinite(corners).all():
        raise CallError(f"the outline of {name} is no polygon: three or more corners (x, y) are expected")
    (left, top), (right, bottom) = corners.min(0), corners.max(0)
    if left < 0 or top < 0 or right > photo.width or bottom > photo.height:
        raise CallError(
            f"the outline of {name} runs from ({left:g}, {top:g}) to ({right:g}, {bottom:g}): it reaches outside the "
            f"image of {photo.width}×{photo.height} pixels"
        )
    # Corners count from the image's edge, pixels' centres lie half a pixel further.
    return polygon2mask((photo.height, photo.width), corners[:, ::-1] - 0.5)


def _masked(mask: Any, photo: Image.Image, name: str) -> np.ndarray:
    if isinstance(mask, str | Path):
        mask = _read_mask(Path(mask))
    if isinstance(mask, Image.Image):
        mask = mask.convert("L")
    array = np.asarray(mask)
    if array.ndim == 3:
        array = array[..., :3].mean(-1)
    if array.dtype == object or array.ndim != 2:
        raise CallError(f"the mask of {name} is no mask: an array as large as the image is expected")
    _check_size(array, photo, name)
    if array.dtype == bool:
        return array
    return array > (array.max() / 2 if array.max() > 0 else 0)


def _read_mask(path: Path) -> Any:
    if path.suffix != ".npy":
        return read_photo(path)[0]
    check_file(path)
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it ends early"
        raise CallError(f"{path} holds no mask: {reason}") from None


def _picked(labels: Any, cut: Any, photo: Image.Image, name: str) -> np.ndarray:
    pixels = np.asarray(photo)
    segments = segment(pixels, cut, InputImage(photo, (0.0, 0.0, float(photo.width), float(photo.height))), None)
    wanted = [whole_number(label, f"a segment of {name}") for label in np.atleast_1d(labels).tolist()]
    known = set(np.unique(segments.labels).tolist())
    missing = [label for label in wanted if label not in known]
    if missing:
        raise CallError(
            f"{name}: segment {missing[0]} is not there: {segments.name} cut the image into {len(known)}, "
            f"{min(known)} to {max(known)}"
        )
    return np.isin(segments.labels, wanted)


def _check_size(mask: np.ndarray, photo: Image.Image, name: str) -> None:
    if mask.shape != (photo.height, photo.width):
        raise CallError(
            f"the mask of {name} is {'×'.join(map(str, mask.shape))} where the image is {photo.height}×{photo.width} "
            "(height×width): make it of the image's size"
        )


def _check(marked: np.ndarray, name: str) -> None:
    if not marked.any():
        raise CallError(f"the mask of {name} is empty: nothing is marked as the object")
    if marked.all():
        raise CallError(f"{name} is the whole image: mark a part of it, so that there is somewhere to move it")
    if min(marked.any(0).sum(), marked.any(1).sum()) < LEAST_SIDE:
        raise CallError(f"{name} is thinner than {LEAST_SIDE} pixels: mark an object that can be seen")


def _check_apart(found: Sequence[ObjectMask]) -> None:
    for i, one in enumerate(found):
        for other in found[i + 1 :]:
            shared = int((one.mask & other.mask).sum())
            if shared:
                raise CallError(
                    f"{one.name} and {other.name} overlap in {shared:,} pixels: draw outlines that do not, or make "
                    "rough boxes narrower"
                )
