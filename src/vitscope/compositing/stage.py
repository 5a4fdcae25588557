"""Stage: a photo taken apart into its background and its objects, and put together again otherwise."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
from jaxtyping import Float
from scipy.ndimage import binary_dilation, distance_transform_edt

from vitscope.compositing.backgrounds import BackgroundName, Hole, Values, at_size, background, filled, resized
from vitscope.compositing.object_masks import LEAST_SIDE, ObjectMask
from vitscope.errors import CallError
from vitscope.validation import number

MARGIN = 0.015  # of the shorter side: the fringe around an object that its hole takes with it
FEATHER = 0.01  # of the shorter side
MOST_SCALE = 1000  # of an object's sides: a pixel would be as large as an image
LEAST_BACKGROUND = 0.05  # of the photo: less is nothing to fill a hole from

Cut = Float[np.ndarray, "height width channel"]  # an object's own pixels, 0 … 255


@dataclass(frozen=True)
class Placement:
    """An object put somewhere.

    Attributes:
        name: of the object.
        centre: (x, y) of the middle of its box, in pixels of the photo; None: where it is.
        scale: of its sides, above 0.
        mirrored: left and right exchanged.
    """

    name: str
    centre: tuple[float, float] | None = None
    scale: float = 1.0
    mirrored: bool = False


@dataclass(frozen=True)
class EditedImage:
    """What an image is put together from.

    Attributes:
        name: of the image, in tables and figures.
        show: the objects that are there, back to front; others are left out and their holes filled.
        background: ``"own"``, ``"blank"``, ``"blurred"``, ``"shuffled"`` or ``"other"``.
        neutral: the model is asked with its position embeddings made equal, see
            :mod:`vitscope.interventions.positions`.
        test: what it belongs to: ``"original"``, ``"size"``, ``"location"``, ``"split"``, ``"controls"``, ``"free"``.
        subject: the object that is tested, where one is.
        place: (row, column) of the location grid, where the object stands on one.
    """

    name: str
    show: tuple[Placement, ...] = ()
    background: str = "own"
    neutral: bool = False
    test: str = "free"
    subject: str | None = None
    place: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class _Cutout:
    """An object at the stage's size: its pixels, how opaque they are, and the part of the photo that is its own."""

    outline: ObjectMask
    box: tuple[int, int, int, int]  # left, top, width, height, in pixels of the stage
    pixels: Cut
    alpha: Float[np.ndarray, "height width"]
    region: Hole
    mask: Hole
    scaled: dict[tuple[float, bool], tuple[Any, Any]] = field(default_factory=dict)


class Stage:
    """Makes the image of any :class:`EditedImage`.

    An object at its own place, at its own size and over its own background is the photo, pixel for pixel. One that is
    moved keeps its pixels where it is not scaled; its edge fades over ``feather`` pixels.

    Args:
        photo: (pixel height, pixel width, channel) in 0 … 255, bytes or floating point.
        outlines: the objects, none overlapping.
        size: (width, height) of the photo in which outlines and places count; it may be larger than ``photo``.
        fill: see :func:`~vitscope.compositing.backgrounds.filled`.
        other: see :func:`~vitscope.compositing.backgrounds.background`.
        feather: in pixels of ``photo``; 1 % of its shorter side by default.

    Raises:
        CallError: the objects leave no background, or an option is out of range.
    """

    def __init__(
        self,
        photo: Values,
        outlines: Sequence[ObjectMask],
        size: tuple[int, int],
        *,
        fill: Any = "inpaint",
        other: Any = None,
        feather: float | int | None = None,
        seed: int = 0,
    ) -> None:
        self.photo, self.size, self.outlines = photo, size, {one.name: one for one in outlines}
        self._other, self._seed = other, seed
        shorter = min(photo.shape[:2])
        self.feather = max(FEATHER * shorter, 1.0) if feather is None else number(feather, "feather")
        if not 0 <= self.feather <= shorter / 4:
            raise CallError(f"feather is {feather}, 0 to {shorter / 4:g} pixels are expected (a quarter of the image)")
        masks = [at_size(one.mask, photo.shape[:2]) for one in outlines]
        for one, mask in zip(outlines, masks, strict=True):
            if min(mask.any(0).sum(), mask.any(1).sum()) < LEAST_SIDE:
                raise CallError(f"{one.name} is too small in this image of {size[0]}×{size[1]} pixels")
        margin = max(round(MARGIN * shorter), 1)
        holes = [binary_dilation(mask, iterations=margin) for mask in masks]
        hole = np.any(holes, axis=0)
        if 1 - hole.mean() < LEAST_BACKGROUND:
            names = " and ".join(self.outlines)
            raise CallError(f"{names} with their edges cover {hole.mean():.0%} of the image: no background is left")
        self._backgrounds = {"own": filled(photo, hole, fill, seed)}
        self._things = {
            one.name: self._thing(one, mask, region)
            for one, mask, region in zip(outlines, masks, _regions(masks, holes), strict=True)
        }

    @property
    def factor(self) -> tuple[float, float]:
        """Pixels of the stage to a pixel of the photo, across and down."""
        return self.photo.shape[1] / self.size[0], self.photo.shape[0] / self.size[1]

    def known(self, name: str) -> ObjectMask:
        """The object of a name.

        Raises:
            CallError: there is none.
        """
        if name not in self.outlines:
            raise CallError(f"there is no object {name!r} in this image: it has {', '.join(self.outlines)}")
        return self.outlines[name]

    def size_of(self, name: str, scale: float = 1.0) -> tuple[float, float]:
        """(width, height) of an object's box, in pixels of the photo."""
        _, _, width, height = self.known(name).box
        return width * scale, height * scale

    def is_unmoved(self, placement: Placement) -> bool:
        """The object is where it was, as it was."""
        here = placement.centre in (None, self.known(placement.name).centre)
        return here and placement.scale == 1.0 and not placement.mirrored

    def prepare(self, composite: EditedImage) -> None:
        """Refuse what cannot be put together, and have its background ready.

        Raises:
            CallError: an unknown object or background, an object shown twice, or one that does not fit the image.
        """
        if composite.background not in get_args(BackgroundName):
            choices = ", ".join(get_args(BackgroundName))
            raise CallError(f"{composite.name}: unknown background {composite.background!r}: choose {choices}")
        names = [placement.name for placement in composite.show]
        if len(set(names)) < len(names):
            raise CallError(f"{composite.name}: an object is shown twice ({', '.join(names)}); once each is possible")
        for placement in composite.show:
            self._check_fits(composite.name, placement)
        self._background(composite.background)

    def _check_fits(self, name: str, placement: Placement) -> None:
        outline = self.known(placement.name)
        if not 0 < placement.scale <= MOST_SCALE:
            raise CallError(
                f"{name}: the scale of {placement.name} is {placement.scale}, above 0 and up to {MOST_SCALE:,} is "
                "expected"
            )
        width, height = self.size_of(placement.name, placement.scale)
        shown = f"{name}: {placement.name} at scale {placement.scale:g} is {width:.0f}×{height:.0f} pixels"
        if min(width * self.factor[0], height * self.factor[1]) < LEAST_SIDE:
            raise CallError(f"{shown}: too small to be seen, choose a larger scale")
        x, y = outline.centre if placement.centre is None else placement.centre
        if self.is_unmoved(placement):
            return
        beyond = max(width / 2 - x, x + width / 2 - self.size[0], height / 2 - y, y + height / 2 - self.size[1])
        if not (math.isfinite(x) and math.isfinite(y) and beyond <= 0.5):
            raise CallError(
                f"{shown} and does not fit around ({_pixels(x)}, {_pixels(y)}) in the image of "
                f"{self.size[0]}×{self.size[1]}: "
                "choose a smaller scale or another place"
            )

    def render(self, composite: EditedImage) -> Values:
        """The image, as large as the stage and of its dtype."""
        canvas = self._background(composite.background).copy()
        own = composite.background == "own"
        home = {placement.name for placement in composite.show if own and self.is_unmoved(placement)}
        for name in home:
            region = self._things[name].region
            canvas[region] = self.photo[region]
        covered = False
        for placement in composite.show:
            if placement.name in home and not covered:
                continue
            covered = True
            self._paste(canvas, placement)
        return canvas

    def shares(self, composite: EditedImage) -> Mapping[str, Float[np.ndarray, "pixel_height pixel_width"]]:
        """How much of each pixel is each object's, what stands before it taken off."""
        layers: dict[str, np.ndarray] = {}
        for placement in composite.show:
            thing = self._things[placement.name]
            layer = np.zeros(self.photo.shape[:2], dtype=np.float32)
            if self.is_unmoved(placement):
                layer[thing.mask] = 1.0
            else:
                place, inner, _, alpha = self._laid(placement)
                layer[place] = alpha[inner]
            for name in layers:
                layers[name] *= 1 - layer
            layers[placement.name] = layer
        return layers

    def _thing(self, outline: ObjectMask, mask: Hole, region: Hole) -> _Cutout:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        top, left = int(rows[0]), int(columns[0])
        part = (slice(top, int(rows[-1]) + 1), slice(left, int(columns[-1]) + 1))
        inside = distance_transform_edt(np.pad(mask[part], 1))[1:-1, 1:-1]
        alpha = (inside / (self.feather + 1)).clip(0, 1).astype(np.float32)
        pixels = self.photo[part].astype(np.float32)
        box = (left, top, part[1].stop - left, part[0].stop - top)
        return _Cutout(outline, box, pixels, alpha, region, mask)

    def _background(self, name: str) -> Values:
        if name not in self._backgrounds:
            self._backgrounds[name] = background(self._backgrounds["own"], name, self._other, self._seed)
        return self._backgrounds[name]

    def _paste(self, canvas: Values, placement: Placement) -> None:
        place, inner, pixels, alpha = self._laid(placement)
        shown = alpha[inner][..., None]
        mixed = shown * pixels[inner] + (1 - shown) * canvas[place]
        canvas[place] = mixed.round().clip(0, 255) if canvas.dtype == np.uint8 else mixed

    def _laid(self, placement: Placement) -> tuple[Any, Any, Cut, Float[np.ndarray, "height width"]]:
        """Where on the canvas which part of the object goes, and the object as it is shown."""
        thing = self._things[placement.name]
        pixels, alpha = self._scaled(thing, placement.scale, placement.mirrored)
        x, y = thing.outline.centre if placement.centre is None else placement.centre
        if placement.centre is None or placement.centre == thing.outline.centre:
            # The middle of the object's own pixels: the stage may be smaller than the photo.
            middle = (thing.box[0] + thing.box[2] / 2, thing.box[1] + thing.box[3] / 2)
        else:
            middle = (x * self.factor[0], y * self.factor[1])
        height, width = alpha.shape
        left, top = round(middle[0] - width / 2), round(middle[1] - height / 2)
        rows = slice(max(top, 0), min(top + height, self.photo.shape[0]))
        columns = slice(max(left, 0), min(left + width, self.photo.shape[1]))
        inner = (slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left))
        return (rows, columns), inner, pixels, alpha

    @staticmethod
    def _scaled(thing: _Cutout, scale: float, mirrored: bool) -> tuple[Cut, Float[np.ndarray, "height width"]]:
        if (scale, mirrored) not in thing.scaled:
            pixels, alpha = thing.pixels, thing.alpha
            if scale != 1.0:
                size = (max(round(thing.box[2] * scale), 1), max(round(thing.box[3] * scale), 1))
                # Colours are weighed by opacity, so that nothing of the old background is mixed in.
                premultiplied = np.stack(
                    [resized(plane * alpha, size) for plane in np.moveaxis(pixels, -1, 0)], axis=-1
                )
                alpha = resized(alpha, size).clip(0, 1)
                pixels = (premultiplied / np.maximum(alpha, 1e-4)[..., None]).clip(pixels.min(), pixels.max())
            if mirrored:
                pixels, alpha = pixels[:, ::-1], alpha[:, ::-1]
            thing.scaled[scale, mirrored] = pixels, alpha
        return thing.scaled[scale, mirrored]


def _pixels(value: float) -> str:
    """A number of pixels in a message, however large."""
    return f"{value:.0f}" if abs(value) < 1e9 else f"{value:g}"


def _regions(masks: Sequence[Hole], holes: Sequence[Hole]) -> list[Hole]:
    """Each hole without what is nearer to another object: what comes back with an object that stays."""
    if len(masks) == 1:
        return list(holes)
    nearest = np.argmin([distance_transform_edt(~mask) for mask in masks], axis=0)
    # A pixel of the union belongs to the object it is nearest to, whichever hole it lies in.
    return [np.any(holes, axis=0) & (nearest == at) for at in range(len(masks))]
