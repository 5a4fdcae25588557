"""The result of vs.explain: the maps of each photo, with everything that its figure and its report show."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vitscope.display import Drawn, Tabulated, counted, one_line, write
from vitscope.errors import CallError
from vitscope.files import require_file_path
from vitscope.images.image import InputImage
from vitscope.metrics.agreement import Agreement
from vitscope.models.prediction import Prediction
from vitscope.results.attribution import Attribution
from vitscope.validation import require_at_least, require_integer
from vitscope.window_tokens.window_cls import WindowCls

FORMATS = (".png", ".pdf", ".svg", ".html")
TOP_K = 5  # classes in reports and JSON


@dataclass(frozen=True, eq=False, repr=False)
class PhotoExplanation:
    """The explanation of one photo.

    Attributes:
        image: the photo, with the region that the model saw.
        predictions: all classes, the most probable first; empty if the model has none.
        results: the maps by their names: the methods, or the default maps.
        meanings: a sentence for each method, on what its map shows or why there is none.
        agreement: of the maps of the methods; None for the default maps, and if there is only one.
        heads: by default the maps of the heads of the last layer; empty if methods were chosen.
        window_cls: by default the attention of a CLS token in every window, for a model that classifies by them.
        no_classes: reason why there are no predictions; empty if there are, or if the model has no classifier.
        no_class_map: reason why the default maps have no map of a class; empty if there is one.
        interrupted: whether Ctrl-C ended the computation early.
    """

    image: InputImage
    predictions: Sequence[Prediction]
    results: Mapping[str, Attribution] = field(default_factory=dict)
    meanings: Mapping[str, str] = field(default_factory=dict)
    agreement: Agreement | None = None
    heads: Sequence[Attribution] = ()
    window_cls: WindowCls | None = None
    no_classes: str = ""
    no_class_map: str = ""
    interrupted: bool = False

    def __repr__(self) -> str:
        return one_line(f"PhotoExplanation of {self.name}: {', '.join(self.results)}")

    @property
    def name(self) -> str:
        """The path of the photo; "photo" if it was not read from a file."""
        return self.image.name or "photo"

    @property
    def is_default(self) -> bool:
        """Whether the maps are those without a choice of methods."""
        return bool(self.heads) or self.window_cls is not None

    @property
    def target(self) -> str | None:
        """The label of what was explained; None if no map has a target."""
        return next((result.target for result in self.results.values() if result.target), None)

    def as_json(self, top_k: int = TOP_K) -> dict[str, Any]:
        """Return predictions and maps as JSON values, see :meth:`Explanation.as_json`."""
        entries: dict[str, Any] = {"predictions": [vars(prediction) for prediction in self.predictions[:top_k]]}
        if self.no_classes:
            entries["no_classes"] = self.no_classes
        if not self.is_default:
            entries["results"] = {name: result.as_json() for name, result in self.results.items()}
            return entries if self.agreement is None else {**entries, "agreement": self.agreement.as_json()}
        entries["rollouts"] = [
            {"provenance": dict(result.provenance), "values": result.values[0].tolist()}
            for result in self.results.values()
            if not result.signed
        ]
        if self.no_class_map:
            entries["no_class_map"] = self.no_class_map
        for result in self.results.values():
            if result.signed:
                entries["class_map"] = {**result.as_json(), "values": result.values[0].tolist()}
        return entries


@dataclass(frozen=True, eq=False, repr=False)
class Explanation(Drawn, Tabulated):
    """The explanation of one or more photos, as ``vitscope explain`` computes and draws it.

    ``len(explanation)`` is the number of photos, ``explanation[0]`` the explanation of the first one, and iterating
    yields those of the photos one by one. The properties need the explanation of a single photo: use
    ``explanation[i]`` first. A notebook shows the figure, the classes and the agreement of the maps.

    Attributes:
        model: name of the model.
        photos: what was computed for each photo.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> photo = skimage.data.chelsea()
        >>> explanation = vs.explain(vs.load("vit-nano"), [photo, photo[:, ::-1]], methods=["libra", "grad_cam"])
        >>> len(explanation), explanation[1].target, list(explanation[1].results)
        (2, 'cat', ['libra', 'grad_cam'])
    """

    model: str
    photos: Sequence[PhotoExplanation]

    def __repr__(self) -> str:
        maps = "; ".join(self.photos[0].results) or "window CLS tokens"
        if len(self) > 1:
            return one_line(f"Explanation of {self.model}: {counted(len(self), 'image')}", maps)
        predictions, target = self.predictions, self.target
        return one_line(
            f"Explanation of {self.model}: {maps}",
            f"predicts {predictions[0].label}" if predictions else "no classes",
            "" if target is None else f"target {target}",
        )

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> "Explanation":
        """Return the explanation of one photo.

        Raises:
            CallError: there is no such photo.
        """
        number = require_integer(index, "image")
        if not -len(self) <= number < len(self):
            raise CallError(f"image {number} does not exist: this explanation has images 0 to {len(self) - 1}")
        return replace(self, photos=[self.photos[number]])

    def __iter__(self) -> Iterator["Explanation"]:
        return (self[index] for index in range(len(self)))

    @property
    def predictions(self) -> Sequence[Prediction]:
        """All classes of the photo, the most probable first; empty if the model has none."""
        return self._photo.predictions

    @property
    def results(self) -> Mapping[str, Attribution]:
        """The maps by their names: the methods, or by default "rollout, mean of heads" and so on."""
        return self._photo.results

    @property
    def meanings(self) -> Mapping[str, str]:
        """A sentence for each method, on what its map shows or why there is none."""
        return self._photo.meanings

    @property
    def agreement(self) -> Agreement | None:
        """The agreement of the maps of several methods; None for the default maps, and for a single method."""
        return self._photo.agreement

    @property
    def target(self) -> str | None:
        """The label of what was explained; None if no map has a target."""
        return self._photo.target

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended the computation early, for any photo."""
        return any(photo.interrupted for photo in self.photos)

    def as_json(self, top_k: int = TOP_K) -> dict[str, Any]:
        """Return predictions, maps and their provenance as JSON values.

        Args:
            top_k: maximum number of classes of each photo; by default 5.

        Returns:
            the ``model``, and in ``images`` for each photo what ``vitscope explain --json`` prints.

        Raises:
            CallError: ``top_k`` is below 1.

        Examples:
            >>> import skimage.data, vitscope as vs
            >>> explanation = vs.explain(vs.load("vit-nano"), skimage.data.chelsea(), methods="libra")
            >>> [entry] = explanation.as_json(top_k=1)["images"]
            >>> entry["predictions"][0]["label"], entry["results"]["libra"]["target"]
            ('cat', 'cat')
        """
        count = require_at_least(1, top_k, "top_k")
        return {
            "model": self.model,
            "images": [{"image": photo.name, **photo.as_json(count)} for photo in self.photos],
        }

    def save(self, path: str | Path, *, index: int = 0) -> Path:
        """Save the figure of a photo, or its report.

        ======================== ==========================================================================
        ``.png, .pdf, .svg``     the figure
        ``.html``                a page with photo, predictions, figure, numbers and provenance, in one file
        ======================== ==========================================================================

        Args:
            path: file to write; an existing file is replaced.
            index: index of the photo; by default the first.

        Returns:
            the path.

        Raises:
            CallError: the suffix is none of these, ``path`` is not a path or is a folder, or there is no such photo.
            SaveError: the file cannot be written; an older file at ``path`` is unchanged.

        Examples:
            >>> import skimage.data, tempfile, vitscope as vs
            >>> explanation = vs.explain(vs.load("vit-nano"), skimage.data.chelsea(), methods="libra")
            >>> explanation.save(f"{tempfile.mkdtemp()}/report.html").name
            'report.html'
        """
        path, photo = require_file_path(path), self[index]
        if path.suffix.lower() not in FORMATS:
            raise CallError(f"cannot save as {path.name!r}: end the name in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
        write(photo, path)
        return path

    @property
    def _photo(self) -> PhotoExplanation:
        if len(self.photos) != 1:
            raise CallError(f"this explanation holds {len(self)} images: take one, as in explanation[0]")
        return self.photos[0]
