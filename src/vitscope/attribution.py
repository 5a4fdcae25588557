"""The one kind of result: a value for every place, and how it came about."""

import json
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

from vitscope.errors import CallError, WorkError
from vitscope.grid import Grid
from vitscope.picture import Picture
from vitscope.saving import replacing
from vitscope.shapes import Maps

Own = TypeVar("Own", bound="Attribution")

COLORMAP = "inferno"  # perceptually uniform: equal steps of value look like equal steps
SIGNED_COLORMAP = "RdBu"  # red below zero, white at zero, blue above: told apart by most colour-blind eyes too


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


@dataclass(frozen=True, eq=False)
class Attribution:
    """A map of each picture of a batch.

    Attributes:
        values: float32 (batch, height, width) on the token grid.
        grid: the token grid.
        pictures: the photos, with the way back to their pixels.
        provenance: method, parameters, model, versions, and what is to be known about the normalisation.
        target: what was explained; None for methods that look at attention alone.
        signed: values speak for the target above zero and against it below.
    """

    values: Maps
    grid: Grid
    pictures: Sequence[Picture] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    target: str | None = None
    signed: bool = False

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self: Own, index: int) -> Own:
        """The result of one picture of the batch, a batch of one."""
        if not -len(self) <= index < len(self):
            raise CallError(f"picture {index} is not there: this result holds {len(self)}")
        return replace(self, **self._one(index % len(self)))

    def __iter__(self: Own) -> Iterator[Own]:
        return (self[index] for index in range(len(self)))

    @classmethod
    def joined(cls: type[Own], results: Sequence[Own]) -> Own:
        """Results of single pictures as that of a batch.

        Raises:
            CallError: their maps are of different sizes.
        """
        sizes = dict.fromkeys(f"{result.grid.height}×{result.grid.width}" for result in results)
        if len(sizes) > 1:
            raise CallError(f"results of {' and '.join(sizes)} make no batch: explain pictures of different size apart")
        return replace(results[0], **cls._together(results))

    def overlay(self, alpha: float = 0.6, *, index: int = 0) -> Image.Image:
        """One photo under its map, at the photo's own size.

        Args:
            alpha: opacity of the map, 0 (photo alone) to 1 (map alone). The map's colours run from its own
                smallest to its largest value; signed ones from red (against) over white to blue (for). What the model
                did not see is grey.
            index: which picture of the batch.

        Raises:
            CallError: ``alpha`` or ``index`` is out of range, or the pictures were not kept.
        """
        if not 0 <= alpha <= 1:
            raise CallError(f"alpha is {alpha}, an opacity between 0 and 1 is expected")
        if not -len(self) <= index < len(self):
            raise CallError(f"picture {index} is not there: this result holds {len(self)}")
        if not self.pictures:
            raise CallError("this result was loaded from a file and holds no photos to draw on")
        picture = self.pictures[index]
        heat = picture.paint(self.values[index].cpu().numpy())
        if self.signed:
            return blend(picture.photo, stretch_signed(heat), alpha, colormap=SIGNED_COLORMAP)
        return blend(picture.photo, stretch(heat), alpha)

    def save(self, path: str | Path, *, index: int = 0) -> Path:
        """Write the result; the suffix says what.

        ``.png`` is the overlay of picture ``index``; ``.safetensors`` and ``.npz`` hold the arrays of the whole
        batch with the provenance, and ``.safetensors`` can be read back with :meth:`load`. ``.json`` is for people
        and other programs: :meth:`as_json`.

        Raises:
            SaveError: it cannot be written; an older file at ``path`` is untouched.
        """
        path = Path(path)
        if path.suffix.lower() == ".png":
            image = self.overlay(index=index)
            with replacing(path) as beside:
                image.save(beside)
        elif path.suffix == ".npz":
            with replacing(path) as beside:
                arrays = {name: tensor.cpu().numpy() for name, tensor in self._tensors().items()}
                np.savez(beside, allow_pickle=False, about=np.array(json.dumps(self._about())), **arrays)
        elif path.suffix == ".json":
            with replacing(path) as beside:
                beside.write_text(json.dumps(self.as_json(), indent=2, allow_nan=False), encoding="utf-8")
        elif path.suffix == ".safetensors":
            with replacing(path) as beside:
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
        """Read what :meth:`save` wrote as ``.safetensors``; the photos are not in it."""
        try:
            with safe_open(str(path), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                about = dict(json.loads(file.metadata()["about"]))
            return cls(**cls._fields(tensors, about))
        except FileNotFoundError:
            raise CallError(f"{path} does not exist") from None
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise WorkError(f"{path} is no saved result: {error}") from None

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
        """What :meth:`_tensors` and :meth:`_about` were made of."""
        grid, signed = Grid(**about["grid"]), about.get("signed", False)
        kept = {"provenance": about["provenance"], "target": about["target"]}
        return {"values": tensors["values"], "grid": grid, "signed": signed, **kept}

    def _one(self, at: int) -> dict[str, Any]:
        """What differs in the result of one picture of the batch."""
        own = {"values": self.values[at : at + 1], "pictures": self.pictures[at : at + 1]}
        if "pictures" not in self.provenance:
            return own
        about = dict(self.provenance["pictures"][at])
        return {**own, "target": about.pop("target"), "provenance": about}

    @classmethod
    def _together(cls: type[Own], results: Sequence[Own]) -> dict[str, Any]:
        """What differs in the result of a batch from that of its first picture."""
        targets = {result.target for result in results}
        about = dict(results[0].provenance)
        if len(targets) > 1 or any(result.provenance != about for result in results):
            about["pictures"] = [{**result.provenance, "target": result.target} for result in results]
            for what in ("interrupted", "samples"):
                if what in about:
                    about[what] = type(about[what])(sum(result.provenance[what] for result in results))
        return {
            "provenance": about,
            "values": torch.cat([result.values for result in results]),
            "pictures": [picture for result in results for picture in result.pictures],
            "target": targets.pop() if len(targets) == 1 else None,
        }


def only_finite(values: torch.Tensor, what: str) -> torch.Tensor:
    """The values, or a clear line when the model produced NaN or infinity."""
    if not bool(torch.isfinite(values).all()):
        raise WorkError(f"{what} came out as NaN or infinity: check the model's weights and its dtype")
    return values
