"""Composition: what a model said to the composites of one image, as tables, maps and curves."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image

from vitscope.compositing.object_masks import ObjectMask
from vitscope.compositing.stage import EditedImage, Stage
from vitscope.errors import CallError
from vitscope.files import atomic_write
from vitscope.grid import Grid
from vitscope.images.image import InputImage, three_channels
from vitscope.perturb.segments import cell_labels
from vitscope.results.attribution import Attribution
from vitscope.validation import at_least, class_index, whole_number

TOP_K = 3  # classes to an image, as in the report's table


@dataclass(frozen=True)
class Ranked:
    """One class of a composite: its answer, and what it is more or less than for the original."""

    label: str
    index: int
    value: float
    change: float


@dataclass(frozen=True)
class Ranking:
    """A row of the table: the likeliest classes of one composite, likeliest first."""

    name: str
    test: str
    classes: tuple[Ranked, ...]


@dataclass(frozen=True, eq=False)
class SizeCurve:
    """The answer for a class by the size of an object.

    Attributes:
        name, target: the object and the class.
        scales: of the object's sides, rising.
        areas: the share of the photo that it covers at each.
        values: the answer at each.
    """

    name: str
    target: str
    scales: Float[np.ndarray, " size"]
    areas: Float[np.ndarray, " size"]
    values: Float[np.ndarray, " size"]


@dataclass(frozen=True, eq=False)
class Composition:
    """The answers to composites of one image. Made by :func:`vitscope.compose`.

    Attributes:
        original: the photo, with what of it the model sees.
        composites: what was shown; the first is the original.
        outputs: float64 (composite, class): probabilities or logits, or in one column the similarity to the original
            of a model that has no classes. NaN where Ctrl-C came first.
        labels: of the columns.
        provenance: model, options, versions.
        stage: puts the images together again.
        known: the model's own labels, by which classes are asked for; None where it has none.
        target: the column that was asked for, if one was.
        rollouts: float32 (composite, height, width), NaN where there is none; None if they were not asked for.
        grid: of the rollouts.
    """

    original: InputImage
    composites: Sequence[EditedImage]
    outputs: Float[np.ndarray, "composite label"]
    labels: Sequence[str]
    provenance: Mapping[str, Any]
    stage: Stage = field(repr=False)
    known: Sequence[str] | None = None
    target: int | None = None
    rollouts: Float[np.ndarray, "composite height width"] | None = None
    grid: Grid | None = None

    def __len__(self) -> int:
        return len(self.composites)

    @property
    def outlines(self) -> Mapping[str, ObjectMask]:
        """The objects by name."""
        return self.stage.outlines

    @property
    def output(self) -> str:
        """What the answers are: probability, logit or similarity."""
        return str(self.provenance["parameters"]["output"])

    def at(self, name: str) -> int:
        """The number of a composite.

        Raises:
            CallError: there is none of that name.
        """
        for number, one in enumerate(self.composites):
            if one.name == name:
                return number
        raise CallError(f"there is no composite {name!r}: the first are {', '.join(self.names[:8])}")

    @property
    def names(self) -> list[str]:
        """Of all composites."""
        return [one.name for one in self.composites]

    def image(self, which: int | str) -> Image.Image:
        """The image of a composite, by number or name, as it was put together."""
        values = np.asarray(self.stage.render(self.composites[self._number(which)])).round().clip(0, 255)
        return Image.fromarray(three_channels(values, -1).astype(np.uint8))

    def shown(self, which: int | str) -> InputImage:
        """The same, with what of it the model sees."""
        image = self.image(which)
        across, down = self.stage.factor
        left, top, right, bottom = self.original.box
        return InputImage(image, (left * across, top * down, right * across, bottom * down), self.original.name)

    def column(self, target: int | str | None = None, name: str | None = None) -> int:
        """The column that is explained: ``target``; else of the object's class, if the model has it; else the
        likeliest of the original.

        Raises:
            CallError: there is no such class; the nearest are named.
        """
        if self.output == "similarity":
            if target in (None, "similarity"):
                return 0
            raise CallError(
                f"{self.provenance['model']} has no classes, {target!r} cannot be asked for: its answer is "
                "'similarity', how alike its features stay to those of the original"
            )
        if target is not None:
            return class_index(target, self.known, self.outputs.shape[1])
        if self.target is not None:
            return self.target
        outline = self.outlines[name] if name is not None else None
        if outline is not None and outline.label is not None:
            return class_index(outline.label, self.known, self.outputs.shape[1])
        if outline is not None and self.known is not None and not outline.name.isdecimal():
            try:
                return class_index(outline.name, self.known, self.outputs.shape[1])
            except CallError:
                pass  # its name says what it is to people, not to this model
        return int(np.argmax(self.outputs[0]))

    def value(self, which: int | str, target: int | str | None = None, name: str | None = None) -> float:
        """The answer to a composite for a class."""
        return float(self.outputs[self._number(which), self.column(target, name)])

    def ranking(self, which: int | str, top_k: int = TOP_K) -> Ranking:
        """The likeliest classes of a composite, with their changes against the original."""
        at = self._number(which)
        composite, output = self.composites[at], self.outputs[at]
        order = np.argsort(-output, kind="stable")[: at_least(1, top_k, "top_k")].tolist()
        ranked = (Ranked(self.labels[i], i, float(output[i]), float(output[i] - self.outputs[0, i])) for i in order)
        return Ranking(composite.name, composite.test, tuple(ranked))

    @property
    def asked(self) -> list[int]:
        """The numbers of the composites that were asked about: all, unless Ctrl-C came."""
        return [at for at, output in enumerate(self.outputs) if not np.isnan(output).any()]

    def table(self, top_k: int = TOP_K) -> list[Ranking]:
        """The ranking of every composite that was asked about."""
        return [self.ranking(at, top_k) for at in self.asked]

    def select(
        self,
        test: str,
        name: str | None = None,
        *,
        background: str | None = None,
        neutral: bool = False,
        placed: bool | None = None,
    ) -> list[int]:
        """The numbers of a test's composites: of one object, over one background, on a grid of places or not."""
        return [
            at
            for at, one in enumerate(self.composites)
            if one.test == test
            and name in (None, one.subject)
            and background in (None, one.background)
            and one.neutral is neutral
            and placed in (None, one.place is not None)
        ]

    def tested(self, test: str) -> list[str]:
        """The objects of a test."""
        return list(dict.fromkeys(one.subject for one in self.composites if one.test == test and one.subject))

    def location_map(
        self,
        name: str | None = None,
        target: int | str | None = None,
        *,
        test: str = "location",
        background: str = "own",
        neutral: bool = False,
    ) -> Attribution:
        """The answer for a class by the place of an object.

        Args:
            name: the object; the first by default.
            target: the class; by default as :meth:`column` says.
            test, background, neutral: ``test="controls"`` for the object alone, over ``"own"`` or ``"blank"``.

        Returns:
            values (1, row, column): each place is a cell around the middle of the object's box. Its image's box is
            the part of the photo that these middles cover, so an overlay is grey where the object could not be put.

        Raises:
            CallError: no such test was made, or it was interrupted.
        """
        name = self._tested(test, name)
        found = self.select(test, name, background=background, neutral=neutral, placed=True)
        if not found:
            raise CallError(f"no places of {name} over background {background!r} were asked about in test {test!r}")
        column = self.column(target, name)
        spots = [(self._spot(self.composites[at]), self.outputs[at, column]) for at in found]
        if np.isnan([value for _, value in spots]).any():
            raise CallError(f"the location test of {name} was interrupted: its map is not whole")
        grid = Grid(*(max(place[axis] for (place, _), _ in spots) + 1 for axis in (0, 1)))
        values = torch.zeros(1, grid.height, grid.width, dtype=torch.float32, device="cpu")
        for (place, _), value in spots:
            values[0, place[0], place[1]] = value
        centres = np.array([centre for (_, centre), _ in spots])
        about = {
            **self.provenance,
            "method": "location map",
            "object": name,
            "class_index": column,
            "background": background,
            "positions": "neutral" if neutral else "as they are",
        }
        view = InputImage(self.original.photo, self._extent(name, centres, grid), self.original.name)
        return Attribution(values, grid, [view], about, self.labels[column])

    def size_curve(self, name: str | None = None, target: int | str | None = None) -> SizeCurve:
        """The answer for a class by the size of an object; arguments as for :meth:`location_map`."""
        name = self._tested("size", name)
        column = self.column(target, name)
        points = sorted(
            (one.show[-1].scale, float(self.outputs[at, column]))
            for at in self.select("size", name)
            if not np.isnan(self.outputs[at, column])
            for one in [self.composites[at]]
        )
        if not points:
            raise CallError(f"the size test of {name} was interrupted before it began")
        scales, values = (np.array(part) for part in zip(*points, strict=True))
        return SizeCurve(name, self.labels[column], scales, self.outlines[name].area * scales**2, values)

    def seen(self, name: str) -> float:
        """The share of an object, where it is in the photo, that the model sees: less than 1 where it is cropped."""
        mask = self.stage.known(name).mask
        left, top, right, bottom = (round(side) for side in self.original.box)
        inside = mask[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
        return float(inside.sum() / mask.sum())

    def looked(self, which: int | str, name: str) -> tuple[float, float]:
        """The share of a composite's rollout that lies on an object, and the share of the model's view it covers.

        Raises:
            CallError: no rollouts were kept, or the object is not in this composite.
        """
        at = self._number(which)
        if self.rollouts is None or self.grid is None:
            raise CallError("no rollouts were kept: pass attention=True to compose")
        shares = self.stage.shares(self.composites[at])
        if name not in shares:
            raise CallError(f"{name} is not in {self.composites[at].name!r}")
        cells = self._cells
        inside = cells >= 0
        counts = np.bincount(cells[inside], minlength=self.grid.num_patches)
        covered = np.bincount(cells[inside], weights=shares[name][inside], minlength=self.grid.num_patches)
        rollout = self.rollouts[at].ravel()
        on_it = rollout @ (covered / np.maximum(counts, 1)) / max(float(rollout.sum()), 1e-12)
        return float(on_it), float(covered.sum() / max(int(inside.sum()), 1))

    def save(self, path: str | Path) -> Path:
        """Write all answers: ``.csv``, a row for each composite, or ``.json``, :meth:`as_json`.

        Raises:
            SaveError: it cannot be written; an older file at ``path`` is untouched.
        """
        path = Path(path)
        writers: dict[str, Callable[[], str]] = {
            ".csv": self.as_csv,
            ".json": lambda: json.dumps(self.as_json(), indent=2, allow_nan=False),
        }
        if path.suffix not in writers:
            raise CallError(f"cannot save as {path.name!r}: end the name in .csv or .json; images are image(…).save")
        text = writers[path.suffix]()
        with atomic_write(path) as beside:
            beside.write_text(text, encoding="utf-8", newline="")
        return path

    def as_csv(self, top_k: int = TOP_K) -> str:
        """A row for each composite: what it shows, and its likeliest classes with their changes."""
        rows = list(self._rows(top_k))
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def as_json(self) -> dict[str, Any]:
        """Everything but the images, as what JSON has."""
        return {
            "image": self.original.name,
            "provenance": dict(self.provenance),
            "objects": [
                {
                    "name": one.name,
                    "box": list(one.box),
                    "area": one.area,
                    "seen": self.seen(name),
                    "class": self.labels[self.column(None, name)],
                }
                for name, one in self.outlines.items()
            ],
            "labels": list(self.labels),
            "composites": [
                {**asdict(one), "outputs": None if np.isnan(output).any() else output.tolist(), **self._attention(at)}
                for at, (one, output) in enumerate(zip(self.composites, self.outputs, strict=True))
            ],
        }

    def _rows(self, top_k: int) -> Iterator[dict[str, Any]]:
        for at in self.asked:
            one, row = self.composites[at], self.ranking(at, top_k)
            tested = next((placed for placed in one.show if placed.name == one.subject), None)
            x, y = (None, None) if tested is None else (tested.centre or self.outlines[tested.name].centre)
            area = None if tested is None else self.outlines[tested.name].area * tested.scale**2
            yield {
                "composite": row.name,
                "test": row.test,
                "object": one.subject,
                "background": one.background,
                "positions": "neutral" if one.neutral else "as they are",
                "x": x,
                "y": y,
                "scale": None if tested is None else tested.scale,
                "area": area,
                **{
                    f"{what} {rank}": value
                    for rank, ranked in enumerate(row.classes, 1)
                    for what, value in (("class", ranked.label), (self.output, ranked.value), ("change", ranked.change))
                },
                **{f"attention on {name}": share for name, share in self._attention(at).get("attention", {}).items()},
            }

    def _attention(self, at: int) -> dict[str, Any]:
        if self.rollouts is None or np.isnan(self.rollouts[at]).any():
            return {}
        shown = [placement.name for placement in self.composites[at].show]
        return {"attention": {name: self.looked(at, name)[0] for name in shown}}

    @cached_property
    def _cells(self) -> np.ndarray:
        assert self.grid is not None
        return cell_labels(self.stage.photo.shape[:2], self.original, self.grid)

    def _number(self, which: int | str) -> int:
        at = self.at(which) if isinstance(which, str) else whole_number(which, "the composite")
        if not -len(self) <= at < len(self):
            raise CallError(f"composite {at} is not there: there are {len(self)}")
        return at % len(self)

    def _tested(self, test: str, name: str | None) -> str:
        tested = self.tested(test)
        if not tested:
            raise CallError(f"the {test} test was not made: pass tests=({test!r},) to compose")
        if name is not None and name not in tested:
            raise CallError(f"there is no object {name!r} in the {test} test: it has {', '.join(tested)}")
        return tested[0] if name is None else name

    def _spot(self, composite: EditedImage) -> tuple[tuple[int, int], tuple[float, float]]:
        assert composite.place is not None
        centre = composite.show[-1].centre
        assert centre is not None
        return composite.place, centre

    def _extent(self, name: str, centres: np.ndarray, grid: Grid) -> tuple[float, float, float, float]:
        """The cells' edges: half a step beyond the outermost middles."""
        (left, top), (right, bottom) = centres.min(0), centres.max(0)
        width, height = self.stage.size_of(name)
        half_x = (right - left) / (2 * (grid.width - 1)) if grid.width > 1 else width / 2
        half_y = (bottom - top) / (2 * (grid.height - 1)) if grid.height > 1 else height / 2
        return left - half_x, top - half_y, right + half_x, bottom + half_y
