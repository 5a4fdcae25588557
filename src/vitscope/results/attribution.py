"""The one kind of result: a value for every place, and how it came about."""

import json
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vitscope.errors import CallError, WorkError, first_line
from vitscope.files import atomic_write
from vitscope.grid import Grid
from vitscope.images.image import InputImage
from vitscope.typing import Maps
from vitscope.validation import number, path_of, require_mapping, require_tensor, text_of, whole_number

Own = TypeVar("Own", bound="Attribution")

COLORMAP = "inferno"  # perceptually uniform: equal steps of value look like equal steps
ROUNDING = 2e-6  # of the largest value: a few units in the last place of float32, summed up
SIGNED_COLORMAP = "RdBu_r"  # red below zero, white at zero, blue above: told apart by most colour-blind eyes too


def stretch(values: np.ndarray, limits: tuple[float, float] | None = None) -> np.ndarray:
    """Values moved to [0, 1], from their own ends or from ``limits``; NaN stays NaN, a constant map becomes 0."""
    if not np.isfinite(values).any():
        return values
    low, high = (np.nanmin(values), np.nanmax(values)) if limits is None else limits
    return ((values - low) / (high - low)).clip(0, 1) if high > low else values * 0


def stretch_signed(values: np.ndarray) -> np.ndarray:
    """Values moved to [0, 1] with zero at a half, by the largest magnitude; NaN stays NaN."""
    if not np.isfinite(values).any():
        return values
    most = np.nanmax(np.abs(values))
    return 0.5 + values / (2 * most) if most > 0 else values * 0 + 0.5


def blend(photo: Image.Image, heat: np.ndarray, alpha: float, *, colormap: str = COLORMAP) -> Image.Image:
    """A photo under a heat map of its own size in [0, 1]; where the heat is NaN the photo is greyed."""
    base = np.asarray(photo, dtype=np.float32)
    if colormap == SIGNED_COLORMAP:
        base = base.mean(-1, keepdims=True).repeat(3, -1)  # colours of the photo would be taken for signs
    colours = matplotlib.colormaps[colormap](np.nan_to_num(heat, nan=0.5))[..., :3].astype(np.float32) * 255
    mixed = (1 - alpha) * base + alpha * colours
    unseen = np.isnan(heat)
    mixed[unseen] = base[unseen].mean(-1, keepdims=True) * 0.35 + 160
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def coloured(
    photo: Image.Image,
    heat: np.ndarray,
    alpha: float,
    *,
    signed: bool = False,
    limits: tuple[float, float] | None = None,
) -> Image.Image:
    """Return the photo under its map; a map without contrast shows no colours, but the photo greyed."""
    colormap = SIGNED_COLORMAP if signed else COLORMAP
    if limits is None and is_flat(heat):
        # At the ends of alpha the photo or the map is alone, and the map is one colour that says nothing.
        nothing = np.full_like(heat, np.nan if 0 < alpha < 1 else 0.5 if signed else 0.0)
        return blend(photo, np.where(np.isnan(heat), np.nan, nothing), alpha, colormap=colormap)
    stretched = stretch_signed(heat) if signed else stretch(heat, limits)
    return blend(photo, stretched, alpha, colormap=colormap)


def is_flat(values: np.ndarray) -> bool:
    """Return whether finite values differ by no more than rounding in float32."""
    finite = values[np.isfinite(values)]
    return not finite.size or float(np.ptp(finite)) <= ROUNDING * float(np.abs(finite).max())


@dataclass(frozen=True, eq=False, repr=False)
class Attribution:
    """A map of each image of a batch.

    Attributes:
        values: float32 (batch, height, width) on the token grid.
        grid: the token grid.
        images: the photos, with the way back to their pixels.
        provenance: method, parameters, model, versions, and what is to be known about the normalisation.
        target: what was explained; None for methods that look at attention alone.
        signed: values speak for the target above zero and against it below.
    """

    values: Maps
    grid: Grid
    images: Sequence[InputImage] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    target: str | None = None
    signed: bool = False

    def __repr__(self) -> str:
        height, width = self.values.shape[1:]
        lines = [
            f"{type(self).__name__}: {text_of(self.provenance.get('method'), 'no method')} of "
            f"{text_of(self.provenance.get('model'), 'no model')}",
            f"  target: {text_of(self.target, 'none')}{', signed' if self.signed else ''}",
            f"  values: {len(self)} image{'s' if len(self) != 1 else ''} of {height}×{width}, grid of "
            f"{self.grid.height}×{self.grid.width}, {'with' if self.images else 'without'} photos",
        ]
        return "\n".join([*lines, *self._more_lines()])

    def _more_lines(self) -> list[str]:
        """What a subclass adds to the few lines that stand for a result in a notebook."""
        return []

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self: Own, index: int) -> Own:
        """The result of one image of the batch, a batch of one."""
        return replace(self, **self._one(self._place(index)))

    def __iter__(self: Own) -> Iterator[Own]:
        return (self[index] for index in range(len(self)))

    @classmethod
    def joined(cls: type[Own], results: Sequence[Own]) -> Own:
        """Results of single images as that of a batch.

        Raises:
            CallError: there are none, or their maps are of different sizes.
        """
        if not isinstance(results, Sequence) or not results or not all(isinstance(result, cls) for result in results):
            raise CallError(f"joined takes a list of at least one {cls.__name__}: pass results of single images")
        sizes = dict.fromkeys(f"{result.grid.height}×{result.grid.width}" for result in results)
        if len(sizes) > 1:
            raise CallError(f"results of {' and '.join(sizes)} make no batch: explain images of different size apart")
        return replace(results[0], **cls._together(results))

    def overlay(self, alpha: float = 0.6, *, index: int = 0) -> Image.Image:
        """One photo under its map, at the photo's own size.

        Args:
            alpha: opacity of the map, 0 (photo alone) to 1 (map alone). The map's colours run from its own
                smallest to its largest value; signed ones from red (against) over white to blue (for). What the model
                did not see is grey, and so is the whole photo under a map that is the same everywhere.
            index: which image of the batch.

        Raises:
            CallError: ``alpha`` or ``index`` is out of range, or the images were not kept.
        """
        opacity = _opacity(alpha)
        index = self._place(index)
        if not self.images:
            raise CallError("this result was loaded from a file and holds no photos to draw on")
        image = self.images[index]
        heat = image.paint(self.values[index].cpu().numpy())
        return coloured(image.photo, heat, opacity, signed=self.signed)

    def save(self, path: str | Path, *, index: int = 0) -> Path:
        """Write the result; the suffix says what.

        ``.png`` is the overlay of image ``index``; ``.safetensors`` and ``.npz`` hold the arrays of the whole
        batch with the provenance, and ``.safetensors`` can be read back with :meth:`load`. ``.json`` is for people
        and other programs: :meth:`as_json`.

        Raises:
            SaveError: it cannot be written; an older file at ``path`` is untouched.
        """
        path = path_of(path)
        if path.suffix.lower() == ".png":
            image = self.overlay(index=index)
            with atomic_write(path) as beside:
                image.save(beside)
        elif path.suffix == ".npz":
            with atomic_write(path) as beside:
                arrays = {name: tensor.cpu().numpy() for name, tensor in self._tensors().items()}
                np.savez(beside, allow_pickle=False, about=np.array(json.dumps(self._about())), **arrays)
        elif path.suffix == ".json":
            with atomic_write(path) as beside:
                beside.write_text(json.dumps(self.as_json(), indent=2, allow_nan=False), encoding="utf-8")
        elif path.suffix == ".safetensors":
            with atomic_write(path) as beside:
                try:
                    tensors = {name: tensor.cpu().contiguous() for name, tensor in self._tensors().items()}
                    save_file(tensors, beside, {"about": json.dumps(self._about())})
                except SafetensorError as error:
                    raise OSError(str(error)) from error
        else:
            raise CallError(f"cannot save as {path.name!r}: end the name in .png, .safetensors, .npz or .json")
        return path

    @classmethod
    def load(cls: type[Own], path: str | Path) -> Own:
        """Read what :meth:`save` wrote as ``.safetensors``; the photos are not in it.

        Raises:
            CallError: there is no such file.
            WorkError: it is no saved result, or its parts contradict each other.
        """
        path = path_of(path)
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise ValueError("it is no regular file")
            with torch.device("cpu"), safe_open(str(path), framework="pt", device="cpu") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                about = json.loads((file.metadata() or {})["about"])
            return cls(**cls._fields(tensors, require_mapping(about, "about")))
        except FileNotFoundError:
            raise CallError(f"{path} does not exist") from None
        except KeyError as error:
            raise WorkError(f"{path} is no saved result: {error} is missing") from None
        except (SafetensorError, TypeError, ValueError, OSError, RecursionError) as error:
            raise WorkError(f"{path} is no saved result: {text_of(first_line(error), '')}") from None

    def as_json(self) -> dict[str, Any]:
        """Everything but the photos, as what JSON has: numbers, text, lists and mappings."""
        return {**self._about(), "values": self.values.tolist()}

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {"values": self.values}

    def _about(self) -> dict[str, Any]:
        grid = {"height": self.grid.height, "width": self.grid.width, "prefix": self.grid.prefix}
        return {"grid": grid, "provenance": dict(self.provenance), "target": self.target, "signed": self.signed}

    @classmethod
    def _fields(cls, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> dict[str, Any]:
        """What :meth:`_tensors` and :meth:`_about` were made of.

        Raises:
            KeyError, TypeError, ValueError: a part is missing, or does not fit the others.
        """
        grid = Grid(**require_mapping(about["grid"], "grid"))
        signed, target = about.get("signed", False), about["target"]
        provenance = require_mapping(about["provenance"], "provenance")
        values = require_tensor(tensors, "values", torch.float32, (None, grid.height, grid.width))
        if not len(values):
            raise ValueError("it holds no images")
        if not isinstance(signed, bool) or not (target is None or isinstance(target, str)):
            raise ValueError("its target is not text, or signed is not true or false")
        if "images" in provenance:
            entries = provenance["images"]
            if not isinstance(entries, list) or len(entries) != len(values):
                raise ValueError(f"its provenance does not list {len(values)} images")
            for entry in entries:
                if not isinstance(require_mapping(entry, "provenance of an image")["target"], str | None):
                    raise ValueError("the target of an image is not text")
        return {"values": values, "grid": grid, "signed": signed, "provenance": provenance, "target": target}

    def _place(self, index: Any) -> int:
        """The place of an image in the batch, counted from the start."""
        place = whole_number(index, "image")
        if not -len(self) <= place < len(self):
            raise CallError(f"image {place} is not there: this result holds {len(self)}")
        return place % len(self)

    def _one(self, at: int) -> dict[str, Any]:
        """What differs in the result of one image of the batch."""
        own = {"values": self.values[at : at + 1], "images": self.images[at : at + 1]}
        if "images" not in self.provenance:
            return own
        about = dict(self.provenance["images"][at])
        return {**own, "target": about.pop("target"), "provenance": about}

    @classmethod
    def _together(cls: type[Own], results: Sequence[Own]) -> dict[str, Any]:
        """What differs in the result of a batch from that of its first image."""
        targets = {result.target for result in results}
        about = dict(results[0].provenance)
        if len(targets) > 1 or any(result.provenance != about for result in results):
            about["images"] = [{**result.provenance, "target": result.target} for result in results]
            for what in ("interrupted", "samples"):
                if what in about:
                    about[what] = type(about[what])(sum(result.provenance[what] for result in results))
        return {
            "provenance": about,
            "values": torch.cat([result.values for result in results]),
            "images": [image for result in results for image in result.images],
            "target": targets.pop() if len(targets) == 1 else None,
        }


def _opacity(alpha: Any) -> float:
    """The opacity of a map, between 0 and 1."""
    try:
        opacity = number(alpha, "alpha")
    except CallError:
        opacity = -1.0
    if not 0 <= opacity <= 1:
        raise CallError(f"alpha is {text_of(alpha, 'None')}, an opacity between 0 and 1 is expected")
    return opacity
