"""Photos of the command line: files, folders and globs, with the window and slice, and the names of their outputs."""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from vitscope.cli.inputs import check_file_name, parse_numbers
from vitscope.errors import CallError
from vitscope.images.grey_window import ImageFile, require_window
from vitscope.images.sources import check_no_url, require_regular_file
from vitscope.tune.image_folders import image_files


class PhotoFile(ImageFile):
    """The path of a photo.

    Attributes:
        folder: the folder that was passed and contains the photo; None if the photo itself was passed.
        output_name: the beginning of the names of its outputs.
    """

    folder: Path | None = None
    output_name: str = ""


def photo_files(arguments: Sequence[Path] | None, window: str | None, index: int | None) -> list[PhotoFile] | None:
    """Return the photos of the command line. A folder or glob adds no photo that came before.

    Args:
        arguments: photos; folders, which are searched recursively; and globs that no shell has expanded. Hidden files
            and folders in a folder are skipped. None if there are no arguments.
        window: the value of ``--window``.
        index: the value of ``--slice``.

    Raises:
        CallError: there is no such photo, a folder or glob has none, there are no photos to which the options apply, or
            the window is not two numbers.
    """
    if not arguments and (window is not None or index is not None):
        raise CallError("--window and --slice apply to the photos of the command line: pass one")
    if arguments is None:
        return None
    pair = None if window is None else require_window(parse_numbers(window, "--window"))
    files: list[PhotoFile] = []
    for argument in arguments:
        earlier = {file.absolute() for file in files}
        # A photo that is passed twice stays twice, so that the command can refuse it.
        files += [file for file in _expanded(argument) if file == argument or file.absolute() not in earlier]
    for file, name in zip(files, _output_names(files), strict=True):
        file.window, file.slice, file.output_name = pair, index, name
    return files


def _expanded(argument: Path) -> Iterator[PhotoFile]:
    """Yield the photos of one argument."""
    check_file_name(argument, "a photo")
    if argument.is_dir():
        yield from _photos_in(argument)
    elif os.path.lexists(argument) or not glob.has_magic(str(argument)):
        yield PhotoFile(require_regular_file(argument))
    else:
        check_no_url(str(argument))
        matches = sorted(Path(match) for match in glob.glob(str(argument), recursive=True))  # noqa: PTH207 (absolute patterns)
        if not matches:
            raise CallError(f"{argument} matches no file: pass photos, a folder, or another pattern in quotes")
        for match in matches:
            yield from _photos_in(match) if match.is_dir() else [PhotoFile(match)]


def _photos_in(folder: Path) -> list[PhotoFile]:
    """Return the photos below a folder, sorted.

    Raises:
        CallError: there are none.
    """
    paths = [path for path in image_files(folder) if not _is_hidden(path.relative_to(folder))]
    if not paths:
        raise CallError(f"{folder} holds no images: pass a folder with image files in it or in its subfolders")
    photos = [PhotoFile(path) for path in paths]
    for photo in photos:
        photo.folder = folder
    return photos


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _output_names(photos: Sequence[PhotoFile]) -> list[str]:
    """Return a name for each photo that no other has.

    A photo that was passed is named by its stem; a photo in a folder that was passed by its path in this folder, such
    as ``cats_a``. If two would have the same name, all are named by their paths in the folder that holds them all, and
    if that is not enough, also by their suffixes.
    """
    names = [_joined(photo.relative_to(photo.folder or photo.parent).with_suffix("")) for photo in photos]
    if len(set(names)) == len(names):
        return names
    files = [photo.absolute() for photo in photos]
    common = os.path.commonpath([file.parent for file in files])
    names = [_joined(file.relative_to(common).with_suffix("")) for file in files]
    if len(set(names)) == len(names):
        return names
    return [_joined(file.relative_to(common)).replace(".", "_") for file in files]


def _joined(path: Path) -> str:
    return "_".join(path.parts)
