"""Composition: a model's outputs for edited versions of one image, as tables, location maps and size curves."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from vitscope.compositing.export import csv_text, json_entry, table_row, write_table
from vitscope.compositing.location_grid import LocationGrid
from vitscope.compositing.object_masks import ObjectMask
from vitscope.compositing.ranking import Ranked, Ranking, SizeCurve
from vitscope.compositing.stage import EditedImage, Stage
from vitscope.display import Drawn, counted, ends, one_line
from vitscope.errors import CallError
from vitscope.grid import Grid
from vitscope.images.image import InputImage, three_channels
from vitscope.perturb.segments import cell_labels
from vitscope.results.attribution import Attribution
from vitscope.typing import ClassTarget, Contrast
from vitscope.validation import (
    contrast_label,
    require_at_least,
    require_class_index,
    require_contrast,
    require_integer,
    short_text,
)

TOP_K = 3  # classes per edited image


@dataclass(frozen=True, eq=False)
class Composition(Drawn):
    """A model's outputs for edited versions of one image, as returned by :func:`vitscope.compose`.

    Methods accept an edited image by index or name, and a class by index or label.

    Attributes:
        original: the photo, and the box of it that the model sees.
        edited_images: the images that were evaluated; the first is the original.
        outputs: float64 (edited image, class), of the kind :attr:`output`; without classes, the cosine similarity of
            the features to those of the original. A target that is neither is the last column. NaN after Ctrl-C.
        labels: the labels of the columns.
        provenance: model, options and versions.
        stage: renders the images again.
        num_classes: number of columns, without that of a target that is no class.
        model_labels: the model's own labels, used to select classes; None if it has none.
        target: the column that was chosen as the target of :func:`vitscope.compose`; None if none was.
        target_output: the kind of the target's outputs; None if there is no target.
        rollouts: float32 (edited image, height, width), NaN for images that were left out; None without
            ``attention=True``.
        grid: the token grid of the rollouts.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> cat = {"cat": (105, 20, 235, 200)}
        >>> result = vs.compose(vs.load("vit-nano"), skimage.data.chelsea(), cat, tests="size", scales=[0.5, 1])
        >>> result.names
        ['original', 'cat × 0.5', 'cat × 1']
        >>> len(result.ranking("cat × 0.5").classes), result.image("cat × 0.5").size
        (3, (451, 300))
    """

    original: InputImage
    edited_images: Sequence[EditedImage]
    outputs: Float[np.ndarray, "image label"]
    labels: Sequence[str]
    provenance: Mapping[str, Any]
    stage: Stage = field(repr=False)
    num_classes: int
    model_labels: Sequence[str] | None = None
    target: int | None = None
    target_output: str | None = None
    rollouts: Float[np.ndarray, "image height width"] | None = None
    grid: Grid | None = None

    def __repr__(self) -> str:
        model, size = self.provenance.get("model"), counted(len(self), "edited image")
        facts = (f"objects {', '.join(self.objects)[:40]}", f"{self.output} {ends(self.outputs)}")
        return one_line(f"Composition of {short_text(model, 'no model')[:60]}: {size}", *facts)

    def __len__(self) -> int:
        return len(self.edited_images)

    @property
    def objects(self) -> Mapping[str, ObjectMask]:
        """The objects by name."""
        return self.stage.objects

    @property
    def output(self) -> str:
        """The kind of the outputs: probability, log_probability, logit, log_odds, value or similarity."""
        return str(self.provenance["parameters"]["output"])

    def output_of(self, column: int) -> str:
        """Return the kind of the outputs in a column; ``"custom"`` for a target that is a function."""
        return self.target_output if self.target_output and column == self.target else self.output

    @property
    def names(self) -> list[str]:
        """The names of all edited images."""
        return [image.name for image in self.edited_images]

    @property
    def evaluated(self) -> list[int]:
        """The indices of the images that the model was evaluated on: all of them, unless Ctrl-C came first."""
        return [index for index, output in enumerate(self.outputs) if not np.isnan(output).any()]

    def index_of(self, name: str) -> int:
        """Return the index of an edited image.

        Raises:
            CallError: there is no edited image of that name.
        """
        names = self.names
        if name not in names:
            raise CallError(f"there is no edited image {name!r}: the first are {', '.join(names[:8])}")
        return names.index(name)

    def image(self, image: int | str) -> Image.Image:
        """Return the pixels of an edited image."""
        values = np.asarray(self.stage.render(self.edited_images[self._index(image)])).round().clip(0, 255)
        return Image.fromarray(three_channels(values, -1).astype(np.uint8))

    def view_of(self, image: int | str) -> InputImage:
        """Return an edited image with the box of it that the model sees."""
        pixels = self.image(image)
        across, down = self.stage.factor
        left, top, right, bottom = self.original.box
        return InputImage(pixels, (left * across, top * down, right * across, bottom * down), self.original.name)

    def column(self, target: ClassTarget | Contrast | None = None, name: str | None = None) -> int:
        """Return the column of the class that is explained.

        Args:
            target: the class; or the target of :func:`vitscope.compose`, by its label or its pair of classes. The
                default is that target, else the class of the object if the model has it, else the most probable class
                of the original.
            name: the name of the object.

        Raises:
            CallError: there is no such class, and the message lists the nearest labels; or another contrast.
        """
        if self.target is not None and target in (None, self.labels[self.target]):
            return self.target
        if self.output == "similarity":
            if target in (None, "similarity"):
                return 0
            raise CallError(
                f"{self.provenance['model']} has no classes, so {target!r} cannot be its target: its output is "
                "'similarity', the similarity of its features to those of the original"
            )
        if isinstance(target, tuple):
            return self._contrast_column(target)
        if target is not None:
            return require_class_index(target, self.model_labels, self.num_classes)
        object_mask = self.objects[name] if name is not None else None
        if object_mask is not None and object_mask.label is not None:
            return require_class_index(object_mask.label, self.model_labels, self.num_classes)
        if object_mask is not None and self.model_labels is not None and not object_mask.name.isdecimal():
            try:
                return require_class_index(object_mask.name, self.model_labels, self.num_classes)
            except CallError:
                pass  # the name of an object need not be a class of the model
        return self._most_probable

    @property
    def _most_probable(self) -> int:
        """The column of the most probable class of the original."""
        return int(np.argmax(self.outputs[0, : self.num_classes]))

    def _contrast_column(self, target: Contrast) -> int:
        """Return the column of a contrast, which is that of the target of :func:`vitscope.compose`."""
        first, second = require_contrast(target, self.labels[: self.num_classes], self._most_probable)
        label = contrast_label(self.labels[first], self.labels[second])
        if self.target is None or self.labels[self.target] != label:
            raise CallError(f"the contrast {label!r} was not evaluated: pass it as target= to compose")
        return self.target

    def value(self, image: int | str, target: ClassTarget | Contrast | None = None, name: str | None = None) -> float:
        """Return the output for an edited image and a class; arguments as for :meth:`column`."""
        return float(self.outputs[self._index(image), self.column(target, name)])

    def ranking(self, image: int | str, top_k: int = TOP_K) -> Ranking:
        """Return the ``top_k`` most probable classes of an edited image, with their changes from the original."""
        index = self._index(image)
        description, output = self.edited_images[index], self.outputs[index, : self.num_classes]
        order = np.argsort(-output, kind="stable")[: require_at_least(1, top_k, "top_k")].tolist()
        ranked = (Ranked(self.labels[i], i, float(output[i]), float(output[i] - self.outputs[0, i])) for i in order)
        return Ranking(description.name, description.test, tuple(ranked))

    def table(self, top_k: int = TOP_K) -> list[Ranking]:
        """Return the ranking of every evaluated image."""
        return [self.ranking(index, top_k) for index in self.evaluated]

    def select(
        self,
        test: str,
        name: str | None = None,
        *,
        background: str | None = None,
        neutral: bool = False,
        placed: bool | None = None,
    ) -> list[int]:
        """Return the indices of the edited images of a test.

        Args:
            test: ``"original"``, ``"size"``, ``"location"``, ``"split"``, ``"controls"`` or ``"free"``.
            name: the name of the object under test; None for any.
            background: the name of the background; None for any.
            neutral: whether the position embeddings are neutral.
            placed: on the location grid (True), not on it (False), or either (None).
        """
        return [
            index
            for index, image in enumerate(self.edited_images)
            if image.test == test
            and name in (None, image.subject)
            and background in (None, image.background)
            and image.neutral is neutral
            and placed in (None, image.place is not None)
        ]

    def tested(self, test: str) -> list[str]:
        """Return the names of the objects under test."""
        images = (image for image in self.edited_images if image.test == test)
        return list(dict.fromkeys(image.subject for image in images if image.subject))

    def location_map(
        self,
        name: str | None = None,
        target: ClassTarget | Contrast | None = None,
        *,
        test: str = "location",
        background: str = "own",
        neutral: bool = False,
    ) -> Attribution:
        """Return a map of the output for a class, by the place of an object.

        Args:
            name: the name of the object; by default the first.
            target: the class; the default is that of :meth:`column`.
            test, background, neutral: the images to use. ``test="controls"`` shows the object alone, over background
                ``"own"`` or ``"blank"``; ``neutral=True`` uses neutral position embeddings.

        Returns:
            Values (1, row, column): each place is a cell around the centre of the object's bounding box. The box of
            the image is the region that these centres cover, so an overlay is grey where the object does not fit.

        Raises:
            CallError: the test is not in the result, or it was interrupted.
        """
        name = self._require_tested(test, name)
        indices = self.select(test, name, background=background, neutral=neutral, placed=True)
        if not indices:
            raise CallError(f"test {test!r} has no places of {name} over background {background!r}")
        column = self.column(target, name)
        outputs = self.outputs[indices, column]
        if np.isnan(outputs).any():
            raise CallError(f"the location test of {name} was interrupted, so its map is incomplete: run compose again")
        locations = LocationGrid.of([self.edited_images[index] for index in indices], self.stage.size_of(name))
        provenance = {
            **self.provenance,
            "method": "location map",
            "object": name,
            "class_index": column,
            "background": background,
            "positions": "neutral" if neutral else "as they are",
        }
        view = InputImage(self.original.photo, locations.box, self.original.name)
        return Attribution(locations.map(outputs), locations.grid, [view], provenance, self.labels[column])

    def size_curve(self, name: str | None = None, target: ClassTarget | None = None) -> SizeCurve:
        """Return the output for a class, by the size of an object; arguments as for :meth:`location_map`.

        Raises:
            CallError: the test is not in the result, or it was interrupted before its first image.
        """
        name = self._require_tested("size", name)
        column = self.column(target, name)
        points = sorted(
            (self.edited_images[index].show[-1].scale, float(self.outputs[index, column]))
            for index in self.select("size", name)
            if not np.isnan(self.outputs[index, column])
        )
        if not points:
            raise CallError(f"the size test of {name} was interrupted before its first image: run compose again")
        scales, values = (np.array(numbers) for numbers in zip(*points, strict=True))
        return SizeCurve(name, self.labels[column], scales, self.objects[name].area * scales**2, values)

    def visible_fraction(self, name: str) -> float:
        """Return the share of an object at its original place that the model sees; below 1 if the object is cropped."""
        mask = self.stage.require_object(name).mask
        left, top, right, bottom = (round(side) for side in self.original.box)
        inside = mask[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
        return float(inside.sum() / mask.sum())

    def rollout_mass(self, image: int | str, name: str) -> tuple[float, float]:
        """Return the share of an image's rollout on an object, and the share of the model's view that it covers.

        Raises:
            CallError: no rollouts were kept, or the edited image does not show the object.
        """
        index = self._index(image)
        if self.rollouts is None or self.grid is None:
            raise CallError("the result has no rollouts: pass attention=True to compose")
        description = self.edited_images[index]
        shares = self.stage.shares(description)
        if name not in shares:
            names = ", ".join(shares) or "no object"
            raise CallError(f"the edited image {description.name!r} does not show {name}: it shows {names}")
        cells = self._cells
        inside = cells >= 0
        counts = np.bincount(cells[inside], minlength=self.grid.num_patches)
        covered = np.bincount(cells[inside], weights=shares[name][inside], minlength=self.grid.num_patches)
        rollout = self.rollouts[index].ravel()
        mass = rollout @ (covered / np.maximum(counts, 1)) / max(float(rollout.sum()), 1e-12)
        return float(mass), float(covered.sum() / max(int(inside.sum()), 1))

    def save(self, path: str | Path) -> Path:
        """Write all outputs to a ``.csv`` file (a row for each edited image) or a ``.json`` file (see :meth:`as_json`).

        Raises:
            CallError: the path has another suffix.
            SaveError: the file cannot be written; an older file at ``path`` is not changed.
        """
        as_json = lambda: json.dumps(self.as_json(), indent=2, allow_nan=False)  # noqa: E731
        return write_table(Path(path), {".csv": self.as_csv, ".json": as_json})

    def as_csv(self, top_k: int = TOP_K) -> str:
        """Return a CSV table: a row for each edited image, with its ``top_k`` most probable classes and changes."""
        rows = [
            table_row(
                self.edited_images[index],
                self.ranking(index, top_k),
                self.objects,
                self.output,
                self._rollout_masses(index),
            )
            for index in self.evaluated
        ]
        return csv_text(rows)

    def as_json(self) -> dict[str, Any]:
        """Return everything but the pixels, in types that JSON supports."""
        return {
            "image": self.original.name,
            "provenance": dict(self.provenance),
            "objects": [
                {
                    "name": item.name,
                    "box": list(item.box),
                    "area": item.area,
                    "visible_fraction": self.visible_fraction(name),
                    "class": self.labels[self.column(None, name)],
                }
                for name, item in self.objects.items()
            ],
            "labels": list(self.labels),
            "edited_images": [
                json_entry(image, self.outputs[index], self._rollout_masses(index))
                for index, image in enumerate(self.edited_images)
            ],
        }

    def _rollout_masses(self, index: int) -> dict[str, float] | None:
        """Return the share of an image's rollout on each object that it shows; None if it has no rollout."""
        if self.rollouts is None or np.isnan(self.rollouts[index]).any():
            return None
        names = [placement.name for placement in self.edited_images[index].show]
        return {name: self.rollout_mass(index, name)[0] for name in names}

    @cached_property
    def _cells(self) -> Int[np.ndarray, "pixel_height pixel_width"]:
        """The cell of the rollout grid that contains each pixel; negative outside what the model sees."""
        assert self.grid is not None
        return cell_labels(self.stage.photo.shape[:2], self.original, self.grid)

    def _index(self, image: int | str) -> int:
        index = self.index_of(image) if isinstance(image, str) else require_integer(image, "the edited image")
        if not -len(self) <= index < len(self):
            raise CallError(f"there is no edited image {index}: there are {len(self)}")
        return index % len(self)

    def _require_tested(self, test: str, name: str | None) -> str:
        """Return the name of an object under test; the first if None."""
        tested = self.tested(test)
        if not tested:
            raise CallError(f"the result has no {test} test: pass tests=({test!r},) to compose")
        if name is not None and name not in tested:
            raise CallError(f"there is no object {name!r} in the {test} test: choose {', '.join(tested)}")
        return tested[0] if name is None else name
