"""The photos of one call: the path of each output, photos that cannot be read, and the summary."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import typer

from vitscope.cli.inputs import check_file_name
from vitscope.cli.output import check_format, reporting, shorten_stem, unused_path
from vitscope.cli.summary import NAME, Summary
from vitscope.cli.terminal import say
from vitscope.errors import CallError, ImageError, ImageNotFoundError, OutputExistsError, VitscopeError

if TYPE_CHECKING:
    from vitscope.interventions.artefacts import Artefacts
    from vitscope.models import VisionModel


class PhotoBatch:
    """The photos that a command explains one after another, with the paths of their figures.

    Iterating yields each photo with its path, and shows a progress bar if there are several. An error of one photo,
    inside :meth:`explaining`, does not end the batch. On leaving the context the summary is written, everything that
    was written is reported, and the failed photos are listed, even after an interruption.

    Args:
        photos: files or images.
        command: name of the command, which ends the names of the figures.
        out: the value of ``--out``: a file for one photo, or a folder; None for new names in this folder.
        overwrite: whether figures may replace files.
        skip_existing: leave out the photos whose figure exists.
        json_: print the results as JSON instead of the names of the written files.
        bar: False if explaining a photo already shows a bar.
        names: a name for each image; by default the paths.
        report: whether the command also writes reports as HTML.
        figures: False to write no file at all.

    Raises:
        CallError: an option needs figures, and there are none; ``out`` is one file for several photos, names no
            format, is the photo itself, or is in a folder of photos; a figure exists already; or two photos have the
            same name.
    """

    def __init__(
        self,
        photos: Sequence[Any],
        command: str,
        out: Path | None,
        *,
        overwrite: bool,
        skip_existing: bool = False,
        json_: bool = False,
        bar: bool = True,
        names: Sequence[str] | None = None,
        report: bool = False,
        figures: bool = True,
    ) -> None:
        if not figures and (out is not None or skip_existing):
            name = "--skip-existing" if out is None else "--out"
            raise CallError(f"--no-figure and {name} contradict each other: pass one of them")
        if overwrite and skip_existing:
            raise CallError("--overwrite and --skip-existing contradict each other: pass one of them")
        self._command, self._json, self._bar, self._takes_html, self._figures = command, json_, bar, report, figures
        self._names = (
            {id(photo): str(photo) for photo in photos}
            if names is None
            else dict(zip(map(id, photos), names, strict=True))
        )
        several = len(photos) > 1 or any(getattr(photo, "folder", None) for photo in photos)
        paths = [self._path(photo, out, several=several, reuse=skip_existing) for photo in photos]
        if len(set(paths)) < len(paths):
            raise CallError("two photos have the same name, so their figures would too: pass each photo once")
        if figures:
            self._check_folders(photos, paths)
        existing = [path for path in paths if path.exists()]
        if existing and not (overwrite or skip_existing):
            raise OutputExistsError(f"{existing[0]} exists already: pass --overwrite, --skip-existing or another --out")
        self._folder = paths[0].parent
        self.photos = list(photos)
        skipped = set(existing) if skip_existing else set()
        self._pairs = [pair for pair in zip(photos, paths, strict=True) if pair[1] not in skipped]
        self._skipped = len(skipped)
        self._summary = Summary(paths[0].parent / NAME, overwrite=overwrite) if figures and len(photos) > 1 else None
        self._failures: list[tuple[Any, VitscopeError]] = []
        self._report: list[dict[str, Any]] = []
        self._reporting = ExitStack()

    def _path(self, photo: Any, out: Path | None, *, several: bool, reuse: bool) -> Path:
        """Return the path of a photo's figure."""
        name = f"{shorten_stem(getattr(photo, 'output_name', '') or Path(self.name(photo)).stem)}-{self._command}"
        if out is None:
            return Path(f"{name}.png") if reuse else unused_path(name)
        check_file_name(out, "--out")
        if out.is_dir():
            return out / f"{name}.png"
        if several:
            if out.suffix or out.exists():
                raise CallError(f"--out is {out}, one file for {len(self._names)} photos: pass a folder")
            return out / f"{name}.png"
        check_format(out, report=self._takes_html)
        if out.exists() and isinstance(photo, Path) and photo.exists() and out.samefile(photo):
            raise CallError(f"--out is {out}, the photo itself: choose another name")
        return out

    @staticmethod
    def _check_folders(photos: Sequence[Any], paths: Sequence[Path]) -> None:
        """Refuse figures in a folder of photos, because the next call would take them for photos."""
        folder = paths[0].parent.resolve()
        for photos_folder in dict.fromkeys(getattr(photo, "folder", None) for photo in photos):
            if photos_folder is not None and folder.is_relative_to(photos_folder.resolve()):
                raise CallError(
                    f"the figures would be in {photos_folder}, the folder of the photos, and the next call would "
                    "explain them: pass --out with a folder outside it"
                )

    def name(self, photo: Any) -> str:
        """Return the name of a photo in tables and reports."""
        return self._names[id(photo)]

    def __enter__(self) -> "PhotoBatch":
        self._report = self._reporting.enter_context(reporting(self._command, self._json))
        return self

    def __iter__(self) -> Iterator[tuple[Any, Path]]:
        failed = {id(photo) for photo, _ in self._failures}
        pairs = [pair for pair in self._pairs if id(pair[0]) not in failed]
        if len(self.photos) == 1 or not self._bar:
            yield from pairs
            return
        from rich.console import Console
        from rich.progress import track

        console = Console(stderr=True)
        yield from track(pairs, description="photos", console=console, transient=True, disable=not console.is_terminal)

    def readable(self) -> list[Any]:
        """Return the photos that can be read, also those that are skipped, for computations over all photos."""
        from vitscope.images.reading import read_photo

        for photo in self.photos:
            with self.explaining(photo):
                read_photo(photo)
        failed = {id(photo) for photo, _ in self._failures}
        photos = [photo for photo in self.photos if id(photo) not in failed]
        if not photos:
            raise self._failures.pop(0)[1]
        return photos

    def artefacts_or_none(self, model: "VisionModel", drop_artefacts: bool) -> "Artefacts | None":
        """Return the artefacts of all photos, found together; None without ``--drop-artefacts``."""
        from vitscope.interventions.artefacts import artefact_tokens

        return artefact_tokens(model, self.readable()) if drop_artefacts else None

    @contextmanager
    def explaining(self, photo: Any) -> Iterator[None]:
        """Catch the errors of one photo, so that the others are explained.

        These are errors of reading it, and, as soon as another photo was explained, refusals of the call. All other
        errors would return for every photo.
        """
        try:
            yield
        except OutputExistsError:
            raise
        except (ImageError, ImageNotFoundError) as error:
            self._failures.append((photo, error))
        except CallError as error:
            if not self._report:
                raise
            self._failures.append((photo, error))

    def add(
        self,
        model: "VisionModel",
        photo: Any,
        path: Path,
        entries: Mapping[str, Any],
        *,
        target: str | None = None,
        method: str | None = None,
        numbers: Mapping[str, str] | None = None,
    ) -> None:
        """Report an explained photo.

        Args:
            model: the model that was explained.
            photo: the photo.
            path: its figure.
            entries: values of the JSON report.
            target: label of what was explained, for the summary; None for the whole prediction.
            method: names of the methods, for the summary; by default the command.
            numbers: further columns of the summary.
        """
        figure = str(path) if self._figures else None
        self._report.append({"image": self.name(photo), "model": model.name, "figure": figure, **entries})
        if self._summary is not None:
            method = method or self._command
            self._summary.add(model, photo, self.name(photo), target, method, path.name, numbers)

    def add_overview(self, path: Path | None, entries: Mapping[str, Any]) -> None:
        """Report a figure of all photos together, if there is one, with values of the JSON report."""
        self._report.append({"figure": None if path is None else str(path), **entries})

    def overview_path(self, name: str) -> Path:
        """Return the path of a figure of all photos, beside their own figures."""
        return self._folder / f"{self._command}-{name}.png"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._reporting.__exit__(kind, error, traceback)
        finally:
            written = None if self._summary is None else self._summary.write()
            if not self._json:
                if written is not None:
                    say(f"wrote {written}")
                if self._skipped:
                    say(f"skipped {self._skipped} of {len(self.photos)} photos, whose figures exist")
            if len(self.photos) > 1:
                for photo, failure in self._failures:
                    name, text = self.name(photo), str(failure)
                    say(f"vitscope: {text if name in text else f'{name}: {text}'}", err=True)
        if error is None and self._failures:
            raise self._failures[0][1] if len(self.photos) == 1 else typer.Exit(1)
