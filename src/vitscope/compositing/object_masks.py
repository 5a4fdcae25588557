"""Object masks: the pixels of a photo that belong to an object."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image
from skimage.draw import polygon2mask

from vitscope.compositing.grabcut import refine_mask
from vitscope.display import one_line
from vitscope.errors import CallError, first_line
from vitscope.images.image import InputImage
from vitscope.images.reading import read_photo
from vitscope.images.sources import require_regular_file
from vitscope.perturb.segments import segment
from vitscope.validation import require_integer, require_number

LEAST_SIDE = 2  # pixels: a smaller object has no shape

Mask = Bool[np.ndarray, "pixel_height pixel_width"]


@dataclass(frozen=True, eq=False)
class ObjectMask:
    """An object in a photo.

    Attributes:
        name: the name in tables and figures.
        mask: bool (pixel height, pixel width) of the whole photo, True on the object.
        label: the class that is explained; None to use the name, if it is a class of the model.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> cat = vs.object_mask(skimage.data.chelsea(), box=(105, 20, 235, 200), name="cat")
        >>> cat.box, cat.centre, round(cat.area, 3)
        ((105, 20, 235, 200), (222.5, 120.0), 0.347)
    """

    name: str
    mask: Mask
    label: str | None = None

    def __repr__(self) -> str:
        label = "" if self.label is None else f"class {self.label}"
        return one_line(f"ObjectMask {self.name}: {self.area:.1%} of the photo", f"box {self.box}", label)

    @cached_property
    def box(self) -> tuple[int, int, int, int]:
        """(left, top, width, height) of the bounding box, in pixels."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        left, top = int(columns[0]), int(rows[0])
        return left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) of the centre of the bounding box, in pixels of the photo."""
        left, top, width, height = self.box
        return left + width / 2, top + height / 2

    @cached_property
    def area(self) -> float:
        """The share of the photo that the object covers, from 0 to 1."""
        return float(self.mask.mean())


def object_mask(
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
    """Mark an object in a photo by exactly one of ``box``, ``polygon``, ``mask`` and ``segments``.

    Args:
        image: a path, PIL image or uint8 array (H, W, 3).
        box: (left, top, width, height) in pixels, inside the photo.
        polygon: three or more corners (x, y) in pixels.
        mask: an array of the photo's size, True or above half of its maximum on the object; or an image or the path of
            an image or ``.npy`` file.
        segments: labels of segments, as ``vitscope lime`` lists them.
        cut: the segmentation that ``segments`` refers to: ``"quickshift"``, ``"slic"``, or labels (H, W).
        refine: fit a rough mask to the borders of the object by GrabCut (Rother, Kolmogorov & Blake, 2004). Requires
            ``pip install 'vitscope[opencv]'``.
        name: the name in tables and figures.
        label: the class that is explained; by default the name, if the model has a class of that name.

    Returns:
        The mask of the object, at the size of the photo.

    Raises:
        CallError: the mask is empty, covers the whole photo, reaches outside it, or has another size.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> face = [(135, 60), (295, 70), (340, 130), (290, 240), (165, 250), (105, 110)]
        >>> vs.object_mask(skimage.data.chelsea(), polygon=face, name="cat").box
        (105, 60, 235, 190)
    """
    photo = read_photo(image)[0]
    options = {"box": box, "polygon": polygon, "mask": mask, "segments": segments}
    passed = {option: value for option, value in options.items() if value is not None}
    if len(passed) != 1:
        raise CallError(
            f"{name} is marked by {' and '.join(passed) or 'nothing'}: pass exactly one of box, polygon, mask or "
            "segments"
        )
    pixels = mask_pixels(photo, passed, name, cut)
    _check_mask(pixels, name)
    if refine:
        pixels = refine_mask(np.asarray(photo), pixels, name)
        _check_mask(pixels, name)
    return ObjectMask(name, pixels, label)


def object_masks(image: Any, objects: Any) -> list[ObjectMask]:
    """Return the masks of the objects of one photo, given in any form that :func:`vitscope.compose` takes.

    Raises:
        CallError: there are no objects, two have the same name or overlap, or one belongs to another photo.
    """
    specifications: Any = objects
    if _is_single_object(objects):
        specifications = [objects]
    if not isinstance(specifications, Mapping):
        specifications = _by_name(specifications)
    if not specifications:
        raise CallError("no object was marked: pass a box (left, top, width, height), a mask or a polygon")
    masks = [_convert(image, str(name), specification) for name, specification in specifications.items()]
    photo = read_photo(image)[0]
    for mask in masks:
        _check_size(mask.mask, photo, mask.name)
    _check_no_overlap(masks)
    return masks


def _by_name(objects: Any) -> dict[str, Any]:
    """Return a list of objects as a mapping from their names; objects without a name are numbered."""
    try:
        objects = list(objects)
    except TypeError:
        raise CallError(
            f"cannot use {objects!r} as objects: pass boxes, masks, polygons or vitscope.object_mask(…)"
        ) from None
    names = [
        item.name if isinstance(item, ObjectMask) else f"object {number}" for number, item in enumerate(objects, 1)
    ]
    if len(objects) == 1 and not isinstance(objects[0], ObjectMask):
        names = ["object"]
    if len(set(names)) < len(names):
        raise CallError(f"two objects have the same name ({', '.join(names)}): give each its own name")
    return dict(zip(names, objects, strict=True))


def _is_single_object(objects: Any) -> bool:
    return (
        isinstance(objects, ObjectMask | np.ndarray | str | Path | Image.Image)
        or is_box(objects)
        or is_polygon(objects)
    )


def _convert(image: Any, name: str, specification: Any) -> ObjectMask:
    """Return one object as an :class:`ObjectMask`."""
    if isinstance(specification, ObjectMask):
        return ObjectMask(name, specification.mask, specification.label)
    return object_mask(image, **mask_option(specification), name=name)


def mask_option(specification: Any) -> dict[str, Any]:
    """Return a box, polygon or mask as the keyword argument of :func:`object_mask` that takes it."""
    if is_box(specification):
        return {"box": specification}
    if not is_polygon(specification) and isinstance(specification, np.ndarray | str | Path | Image.Image):
        return {"mask": specification}
    return {"polygon": specification}


def mask_pixels(photo: Image.Image, option: Mapping[str, Any], name: str, cut: Any = "quickshift") -> Mask:
    """Return the mask of an object or a region, which may be empty or cover the whole photo.

    Args:
        photo: upright RGB.
        option: one of the keyword arguments box, polygon, mask and segments of :func:`object_mask`, with its value.
        name: of the object, for errors.
        cut: the segmentation that segments refer to.

    Raises:
        CallError: the object reaches outside the photo, has another size, or is described by something else.
    """
    ((kind, value),) = option.items()
    if kind == "box":
        return _mask_of_box(value, photo, name)
    if kind == "polygon":
        return _mask_of_polygon(value, photo, name)
    if kind == "segments":
        return _mask_of_segments(value, cut, photo, name)
    return _mask_of_image(value, photo, name)


def is_box(value: Any) -> bool:
    """Return whether a value is four numbers."""
    flat = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str) and len(value) == 4
    return flat and all(isinstance(side, int | float | np.number) for side in value)


def is_polygon(value: Any) -> bool:
    """Return whether a value is three or more pairs of numbers."""
    if isinstance(value, np.ndarray):
        return value.ndim == 2 and value.shape[1] == 2 and len(value) > 2
    is_sequence = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 2
    return is_sequence and all(
        isinstance(corner, Sequence | np.ndarray)
        and len(corner) == 2
        and all(isinstance(coordinate, int | float | np.number) for coordinate in corner)
        for corner in value
    )


def _mask_of_box(box: Any, photo: Image.Image, name: str) -> Mask:
    if isinstance(box, str) or np.ndim(box) != 1:
        raise CallError(f"the box of {name} is {box!r}: pass left, top, width, height")
    if len(box) != 4:
        raise CallError(f"the box of {name} has {len(box)} numbers: pass left, top, width, height")
    left, top, width, height = (require_number(side, f"the box of {name}") for side in box)
    description = f"the box of {name} is {left:g},{top:g},{width:g},{height:g} (left, top, width, height)"
    if width < LEAST_SIDE or height < LEAST_SIDE:
        raise CallError(f"{description}, which is empty: make it at least {LEAST_SIDE}×{LEAST_SIDE} pixels")
    if left < 0 or top < 0 or left + width > photo.width or top + height > photo.height:
        raise CallError(f"{description}: it reaches outside the image of {photo.width}×{photo.height} pixels")
    pixels = np.zeros((photo.height, photo.width), dtype=bool)
    pixels[round(top) : round(top + height), round(left) : round(left + width)] = True
    return pixels


def _mask_of_polygon(polygon: Any, photo: Image.Image, name: str) -> Mask:
    try:
        corners = np.asarray(polygon, dtype=np.float64)
    except (TypeError, ValueError):
        corners = np.zeros(0)
    if corners.ndim != 2 or corners.shape[1:] != (2,) or len(corners) < 3 or not np.isfinite(corners).all():
        raise CallError(f"the outline of {name} is not a polygon: pass three or more corners (x, y)")
    (left, top), (right, bottom) = corners.min(0), corners.max(0)
    if left < 0 or top < 0 or right > photo.width or bottom > photo.height:
        raise CallError(
            f"the outline of {name} extends from ({left:g}, {top:g}) to ({right:g}, {bottom:g}): it reaches outside "
            f"the image of {photo.width}×{photo.height} pixels"
        )
    # Corners are measured from the edge of the image; the centre of a pixel is half a pixel further in.
    return polygon2mask((photo.height, photo.width), corners[:, ::-1] - 0.5)


def _mask_of_image(mask: Any, photo: Image.Image, name: str) -> Mask:
    if isinstance(mask, str | Path):
        mask = _read_mask(Path(mask))
    if isinstance(mask, Image.Image):
        mask = mask.convert("L")
    array = np.asarray(mask)
    if array.ndim == 3:
        array = array[..., :3].mean(-1)
    if array.dtype == object or array.ndim != 2:
        raise CallError(f"the mask of {name} is not a mask: pass an array of the size of the image")
    _check_size(array, photo, name)
    if array.dtype == bool:
        return array
    return array > (array.max() / 2 if array.max() > 0 else 0)


def _read_mask(path: Path) -> Any:
    """Return the image or the array in a file."""
    if path.suffix != ".npy":
        return read_photo(path)[0]
    require_regular_file(path)
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = first_line(error) if str(error) else "it ends early"
        raise CallError(f"cannot read a mask from {path}: {reason}") from None


def _mask_of_segments(labels: Any, cut: Any, photo: Image.Image, name: str) -> Mask:
    image = InputImage(photo, (0.0, 0.0, float(photo.width), float(photo.height)))
    segments = segment(np.asarray(photo), cut, image, None)
    chosen = [require_integer(label, f"a segment of {name}") for label in np.atleast_1d(labels).tolist()]
    available = set(np.unique(segments.labels).tolist())
    missing = [label for label in chosen if label not in available]
    if missing:
        raise CallError(
            f"segment {missing[0]} of {name} does not exist: {segments.name} cut the image into {len(available)} "
            f"segments, {min(available)} to {max(available)}"
        )
    return np.isin(segments.labels, chosen)


def _check_size(mask: np.ndarray, photo: Image.Image, name: str) -> None:
    if mask.shape != (photo.height, photo.width):
        raise CallError(
            f"the mask of {name} is {'×'.join(map(str, mask.shape))} (height×width), the image is "
            f"{photo.height}×{photo.width}: pass a mask of the size of the image"
        )


def _check_mask(pixels: Mask, name: str) -> None:
    if not pixels.any():
        raise CallError(f"the mask of {name} is empty: mark at least {LEAST_SIDE}×{LEAST_SIDE} pixels")
    if pixels.all():
        raise CallError(f"{name} is the whole image: mark a part of it, so that the object can be moved")
    if min(pixels.any(0).sum(), pixels.any(1).sum()) < LEAST_SIDE:
        raise CallError(f"{name} is thinner than {LEAST_SIDE} pixels: mark a larger object")


def _check_no_overlap(masks: Sequence[ObjectMask]) -> None:
    for first, second in combinations(masks, 2):
        shared = int((first.mask & second.mask).sum())
        if shared:
            raise CallError(
                f"{first.name} and {second.name} overlap in {shared:,} pixels: mark them by polygons or masks that do "
                "not overlap, or make rough boxes narrower"
            )
