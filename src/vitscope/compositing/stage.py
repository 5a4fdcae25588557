"""The stage: a photo taken apart into its background and its objects, and reassembled differently."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
from jaxtyping import Float
from scipy.ndimage import binary_dilation, distance_transform_edt

from vitscope.compositing.backgrounds import (
    BackgroundName,
    Hole,
    Values,
    fill_hole,
    make_background,
    resize_channel,
    resize_mask,
)
from vitscope.compositing.object_masks import LEAST_SIDE, ObjectMask
from vitscope.errors import CallError
from vitscope.validation import require_number

MARGIN = 0.015  # share of the shorter side: width of the fringe that is removed with an object
FEATHER = 0.01  # share of the shorter side
MAX_SCALE = 1000  # of an object's sides: it makes a single pixel as large as an image
LEAST_BACKGROUND = 0.05  # share of the photo: a smaller one does not suffice to fill the holes

Pixels = Float[np.ndarray, "height width channel"]  # of one object, 0 … 255
Opacity = Float[np.ndarray, "height width"]  # of one object, 0 … 1


@dataclass(frozen=True)
class Placement:
    """The place, scale and orientation at which an object is pasted.

    Attributes:
        name: the name of the object.
        centre: (x, y) of the centre of its bounding box, in pixels of the photo; None for its original place.
        scale: the scale of its sides, above 0 and at most 1,000.
        mirrored: whether left and right are exchanged.

    Examples:
        >>> import vitscope as vs
        >>> vs.Placement("cat", centre=(150.0, 110.0), scale=0.5)
        Placement(name='cat', centre=(150.0, 110.0), scale=0.5, mirrored=False)
    """

    name: str
    centre: tuple[float, float] | None = None
    scale: float = 1.0
    mirrored: bool = False


@dataclass(frozen=True)
class EditedImage:
    """The description of an edited image: the objects it shows, and their background.

    Attributes:
        name: the name of the image in tables and figures.
        show: the objects, back to front. Objects that are not listed are removed, and their holes are filled.
        background: ``"own"``, ``"blank"``, ``"blurred"``, ``"shuffled"`` or ``"other"``.
        neutral: whether to evaluate the model with neutral position embeddings, see
            :mod:`vitscope.interventions.positions`.
        test: the test it belongs to: ``"original"``, ``"size"``, ``"location"``, ``"split"``, ``"controls"``, or
            ``"free"`` for an image of your own.
        subject: the object under test; None if there is none.
        place: (row, column) on the location grid; None if the object is not on it.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> image = vs.EditedImage("corner", (vs.Placement("cat", (150.0, 110.0), 0.5),), background="blurred")
        >>> boxes = {"cat": (105, 20, 235, 200)}
        >>> result = vs.compose(vs.load("vit-nano"), skimage.data.chelsea(), boxes, tests=(), edited_images=image)
        >>> result.names
        ['original', 'corner']
    """

    name: str
    show: tuple[Placement, ...] = ()
    background: str = "own"
    neutral: bool = False
    test: str = "free"
    subject: str | None = None
    place: tuple[int, int] | None = None


def place_and_centre(image: EditedImage) -> tuple[tuple[int, int], tuple[float, float]]:
    """Return the (row, column) of an image on the location grid, and the (x, y) of its object."""
    centre = image.show[-1].centre
    assert image.place is not None, "the image is on the location grid"
    assert centre is not None, "the image is on the location grid"
    return image.place, centre


@dataclass(frozen=True, eq=False)
class _Cutout:
    """An object at the resolution of the stage: its pixels, its opacity, and the region of the photo around it."""

    object_mask: ObjectMask
    box: tuple[int, int, int, int]  # left, top, width, height, in pixels of the stage
    pixels: Pixels
    alpha: Opacity
    region: Hole
    mask: Hole
    variants: dict[tuple[float, bool], tuple[Any, Any]] = field(default_factory=dict)  # by scale and mirroring


class Stage:
    """Render any :class:`EditedImage` of one photo.

    An object at its original place and size over its own background is the photo, pixel for pixel. An object that is
    moved without scaling keeps its inner pixels; its edge fades over ``feather`` pixels.

    Args:
        photo: (pixel height, pixel width, channel) in 0 … 255, bytes or floating point.
        objects: the objects; they must not overlap.
        size: (width, height) of the original photo, in whose pixels masks and places are measured; ``photo`` may be a
            smaller copy of it.
        fill: see :func:`~vitscope.compositing.backgrounds.fill_hole`.
        background_image: see :func:`~vitscope.compositing.backgrounds.make_background`.
        feather: width of the faded edge in pixels of ``photo``; by default 1 % of its shorter side, at least one pixel.
        seed: random seed of shuffled backgrounds and noise.

    Raises:
        CallError: the objects leave no background, or an option is out of range.
    """

    def __init__(
        self,
        photo: Values,
        objects: Sequence[ObjectMask],
        size: tuple[int, int],
        *,
        fill: Any = "inpaint",
        background_image: Any = None,
        feather: float | int | None = None,
        seed: int = 0,
    ) -> None:
        self.photo, self.size = photo, size
        self.objects = {item.name: item for item in objects}
        self._background_image, self._seed = background_image, seed
        shorter = min(photo.shape[:2])
        self.feather = max(FEATHER * shorter, 1.0) if feather is None else require_number(feather, "feather")
        if not 0 <= self.feather <= shorter / 4:
            raise CallError(f"feather is {feather}: pass 0 to {shorter / 4:g} pixels (a quarter of the shorter side)")
        masks = [resize_mask(item.mask, photo.shape[:2]) for item in objects]
        for item, mask in zip(objects, masks, strict=True):
            if min(mask.any(0).sum(), mask.any(1).sum()) < LEAST_SIDE:
                raise CallError(
                    f"{item.name} is too small in this image of {size[0]}×{size[1]} pixels: mark a larger object, or "
                    "crop the image"
                )
        margin = max(round(MARGIN * shorter), 1)
        holes = [binary_dilation(mask, iterations=margin) for mask in masks]
        hole = np.any(holes, axis=0)
        if 1 - hole.mean() < LEAST_BACKGROUND:
            names = " and ".join(self.objects)
            raise CallError(
                f"{names} and a margin cover {hole.mean():.0%} of the image, so no background is left: mark smaller "
                "objects"
            )
        self._backgrounds = {"own": fill_hole(photo, hole, fill, seed)}
        self._cutouts = {
            item.name: self._cut_out(item, mask, region)
            for item, mask, region in zip(objects, masks, _regions(masks, holes), strict=True)
        }

    @property
    def factor(self) -> tuple[float, float]:
        """Pixels of the stage per pixel of the photo, horizontally and vertically."""
        return self.photo.shape[1] / self.size[0], self.photo.shape[0] / self.size[1]

    def require_object(self, name: str) -> ObjectMask:
        """Return the object with this name.

        Raises:
            CallError: there is no object of that name.
        """
        if name not in self.objects:
            raise CallError(f"there is no object {name!r} in this image: choose {', '.join(self.objects)}")
        return self.objects[name]

    def size_of(self, name: str, scale: float = 1.0) -> tuple[float, float]:
        """Return the (width, height) of an object's bounding box, in pixels of the photo."""
        _, _, width, height = self.require_object(name).box
        return width * scale, height * scale

    def is_unmoved(self, placement: Placement) -> bool:
        """Return whether an object is at its original place and size, and not mirrored."""
        in_place = placement.centre in (None, self.require_object(placement.name).centre)
        return in_place and placement.scale == 1.0 and not placement.mirrored

    def prepare(self, edited_image: EditedImage) -> None:
        """Check that an edited image can be rendered, and render its background.

        Raises:
            CallError: an object or background is unknown, an object is shown twice, or one does not fit the image.
        """
        name = edited_image.name
        if edited_image.background not in get_args(BackgroundName):
            choices = ", ".join(get_args(BackgroundName))
            raise CallError(f"{name}: unknown background {edited_image.background!r}: choose {choices}")
        names = [placement.name for placement in edited_image.show]
        if len(set(names)) < len(names):
            raise CallError(f"{name}: an object is shown twice ({', '.join(names)}): show each at most once")
        for placement in edited_image.show:
            self._check_fits(name, placement)
        self._background(edited_image.background)

    def _check_fits(self, name: str, placement: Placement) -> None:
        object_mask = self.require_object(placement.name)
        if not 0 < placement.scale <= MAX_SCALE:
            raise CallError(
                f"{name}: the scale of {placement.name} is {placement.scale}, but must be above 0 and at most "
                f"{MAX_SCALE:,}"
            )
        width, height = self.size_of(placement.name, placement.scale)
        description = f"{name}: {placement.name} at scale {placement.scale:g} is {width:.0f}×{height:.0f} pixels"
        if min(width * self.factor[0], height * self.factor[1]) < LEAST_SIDE:
            raise CallError(f"{description}, which is too small to be seen: choose a larger scale")
        x, y = object_mask.centre if placement.centre is None else placement.centre
        if self.is_unmoved(placement):
            return
        excess = max(width / 2 - x, x + width / 2 - self.size[0], height / 2 - y, y + height / 2 - self.size[1])
        if not (math.isfinite(x) and math.isfinite(y) and excess <= 0.5):
            raise CallError(
                f"{description} and does not fit around ({_format_pixels(x)}, {_format_pixels(y)}) in the image of "
                f"{self.size[0]}×{self.size[1]}: choose a smaller scale or another place"
            )

    def render(self, edited_image: EditedImage) -> Values:
        """Return the pixels of an edited image, in the size and dtype of the stage."""
        canvas = self._background(edited_image.background).copy()
        over_own = edited_image.background == "own"
        unmoved = {placement.name for placement in edited_image.show if over_own and self.is_unmoved(placement)}
        for name in unmoved:
            region = self._cutouts[name].region
            canvas[region] = self.photo[region]
        # Unmoved objects are part of the canvas already; only those in front of a moved one are pasted again.
        behind_moved = False
        for placement in edited_image.show:
            if placement.name in unmoved and not behind_moved:
                continue
            behind_moved = True
            self._paste(canvas, placement)
        return canvas

    def shares(self, edited_image: EditedImage) -> Mapping[str, Float[np.ndarray, "pixel_height pixel_width"]]:
        """Return the share of each pixel that each object covers, without parts hidden by objects in front of it."""
        layers: dict[str, np.ndarray] = {}
        for placement in edited_image.show:
            cutout = self._cutouts[placement.name]
            layer = np.zeros(self.photo.shape[:2], dtype=np.float32)
            if self.is_unmoved(placement):
                layer[cutout.mask] = 1.0
            else:
                target, source, _, alpha = self._position(placement)
                layer[target] = alpha[source]
            for name in layers:
                layers[name] *= 1 - layer
            layers[placement.name] = layer
        return layers

    def _cut_out(self, object_mask: ObjectMask, mask: Hole, region: Hole) -> _Cutout:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        top, left = int(rows[0]), int(columns[0])
        crop = (slice(top, int(rows[-1]) + 1), slice(left, int(columns[-1]) + 1))
        distance_to_edge = distance_transform_edt(np.pad(mask[crop], 1))[1:-1, 1:-1]
        alpha = (distance_to_edge / (self.feather + 1)).clip(0, 1).astype(np.float32)
        pixels = self.photo[crop].astype(np.float32)
        box = (left, top, crop[1].stop - left, crop[0].stop - top)
        return _Cutout(object_mask, box, pixels, alpha, region, mask)

    def _background(self, name: str) -> Values:
        if name not in self._backgrounds:
            empty_photo = self._backgrounds["own"]
            self._backgrounds[name] = make_background(empty_photo, name, self._background_image, self._seed)
        return self._backgrounds[name]

    def _paste(self, canvas: Values, placement: Placement) -> None:
        target, source, pixels, alpha = self._position(placement)
        opacity = alpha[source][..., None]
        mixed = opacity * pixels[source] + (1 - opacity) * canvas[target]
        canvas[target] = mixed.round().clip(0, 255) if canvas.dtype == np.uint8 else mixed

    def _position(self, placement: Placement) -> tuple[Any, Any, Pixels, Opacity]:
        """Return the slices of the canvas and of the object that coincide, and the object's pixels and opacity."""
        cutout = self._cutouts[placement.name]
        pixels, alpha = self._variant(cutout, placement.scale, placement.mirrored)
        original_centre = cutout.object_mask.centre
        x, y = original_centre if placement.centre is None else placement.centre
        if placement.centre is None or placement.centre == original_centre:
            # The stage may be smaller than the photo: use the centre of the object's own pixels.
            centre = (cutout.box[0] + cutout.box[2] / 2, cutout.box[1] + cutout.box[3] / 2)
        else:
            centre = (x * self.factor[0], y * self.factor[1])
        height, width = alpha.shape
        left, top = round(centre[0] - width / 2), round(centre[1] - height / 2)
        rows = slice(max(top, 0), min(top + height, self.photo.shape[0]))
        columns = slice(max(left, 0), min(left + width, self.photo.shape[1]))
        source = (slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left))
        return (rows, columns), source, pixels, alpha

    @staticmethod
    def _variant(cutout: _Cutout, scale: float, mirrored: bool) -> tuple[Pixels, Opacity]:
        """Return the pixels and the opacity of an object, scaled and mirrored; each variant is computed once."""
        if (scale, mirrored) not in cutout.variants:
            pixels, alpha = cutout.pixels, cutout.alpha
            if scale != 1.0:
                size = (max(round(cutout.box[2] * scale), 1), max(round(cutout.box[3] * scale), 1))
                # Colours are weighted by opacity, so that nothing of the old background is mixed in.
                channels = [resize_channel(channel * alpha, size) for channel in np.moveaxis(pixels, -1, 0)]
                premultiplied = np.stack(channels, axis=-1)
                alpha = resize_channel(alpha, size).clip(0, 1)
                pixels = (premultiplied / np.maximum(alpha, 1e-4)[..., None]).clip(pixels.min(), pixels.max())
            if mirrored:
                pixels, alpha = pixels[:, ::-1], alpha[:, ::-1]
            cutout.variants[scale, mirrored] = pixels, alpha
        return cutout.variants[scale, mirrored]


def _format_pixels(value: float) -> str:
    """Return a number of pixels as short text, whatever its size."""
    return f"{value:.0f}" if abs(value) < 1e9 else f"{value:g}"


def _regions(masks: Sequence[Hole], holes: Sequence[Hole]) -> list[Hole]:
    """Return for each object the pixels that are restored with it if it does not move.

    Together, these regions are all holes. Every pixel belongs to the nearest object, even if it lies in another's hole.
    """
    if len(masks) == 1:
        return list(holes)
    nearest = np.argmin([distance_transform_edt(~mask) for mask in masks], axis=0)
    return [np.any(holes, axis=0) & (nearest == index) for index in range(len(masks))]
