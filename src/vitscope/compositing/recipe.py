"""Recipes: photos, the outlines of their objects and composites of them, written down in a TOML file."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from vitscope.compositing.object_masks import ObjectMask, outline
from vitscope.compositing.stage import EditedImage, Placement
from vitscope.errors import CallError
from vitscope.images.reading import check_file, read_photo
from vitscope.images.sources import check_no_url

PICTURE = {"photo", "object", "composite"}
OBJECT = {"name", "class", "outline", "box", "mask", "segments", "cut", "refine"}
COMPOSITE = {"name", "show", "background", "neutral"}
PLACEMENT = {"name", "centre", "scale", "mirrored"}


@dataclass(frozen=True)
class ImageRecipe:
    """One photo of a recipe, with its objects and the composites made of them."""

    photo: Path
    objects: tuple[ObjectMask, ...]
    composites: tuple[EditedImage, ...]


def read_recipe(path: str | Path, photos: Sequence[Path] = ()) -> list[ImageRecipe]:
    """The photos of a recipe file, in its order.

    .. code-block:: toml

        [[image]]
        photo = "dog-and-cat.png"       # beside the recipe, unless it is given

        [[image.object]]
        name = "dog"
        class = "bull mastiff"          # what is asked about; the name by default
        outline = [[80, 12], [96, 10]]  # three corners or more; or box = [x, y, width, height], or mask = "dog.png",
        refine = false                  # or segments = [3, 4] with cut = "slic"

        [[image.composite]]           # any number of these, or none
        name = "dog smaller"
        show = [{ name = "dog", scale = 0.5, centre = [120, 80], mirrored = false }, { name = "cat" }]
        background = "own"

    Args:
        photos: where the photos are; each is known by its file's name. By default beside the recipe.

    Raises:
        CallError: no TOML, something missing, or a key that means nothing.
    """
    path = Path(path)
    check_file(path)
    try:
        read = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CallError(f"{path} is no recipe: {error}") from None
    _check_keys(read, {"image"}, f"{path}")
    images = _tables(read, "image", f"{path}")
    if not images:
        raise CallError(f"{path} names no image: begin one with [[image]]")
    given = {photo.name: photo for photo in photos}
    made = [_image(path, table, given) for table in images]
    unused = set(given) - {one.photo.name for one in made}
    if unused:
        raise CallError(f"{path} has no image called {min(unused)}: it has {', '.join(p.photo.name for p in made)}")
    return made


def _image(path: Path, table: Mapping[str, Any], given: Mapping[str, Path]) -> ImageRecipe:
    _check_keys(table, PICTURE, f"{path}: an image")
    name = _text(table, "photo", f"{path}: an image")
    photo = given.get(Path(name).name, _beside(path, name))
    check_file(photo)
    image, _ = read_photo(photo)
    where = f"{path}: {name}"
    objects = tuple(_object(path, one, image, where) for one in _tables(table, "object", where))
    return ImageRecipe(photo, objects, tuple(_composite(one, where) for one in _tables(table, "composite", where)))


def _beside(path: Path, name: str) -> Path:
    """The path of a file that a recipe names."""
    check_no_url(name)
    return path.parent / name


def _object(path: Path, table: Mapping[str, Any], image: Any, where: str) -> ObjectMask:
    _check_keys(table, OBJECT, f"{where}: an object")
    name = _text(table, "name", f"{where}: an object")
    mask = table.get("mask")
    return outline(
        image,
        box=table.get("box"),
        polygon=table.get("outline"),
        mask=None if mask is None else _beside(path, str(mask)),
        segments=table.get("segments"),
        cut=table.get("cut", "quickshift"),
        refine=_flag(table, "refine", where),
        name=name,
        label=_text(table, "class", f"{where}: {name}") if "class" in table else None,
    )


def _composite(table: Mapping[str, Any], where: str) -> EditedImage:
    _check_keys(table, COMPOSITE, f"{where}: a composite")
    name = _text(table, "name", f"{where}: a composite")
    show = tuple(_placement(one, f"{where}: {name}") for one in _tables(table, "show", f"{where}: {name}"))
    background = _text(table, "background", f"{where}: {name}") if "background" in table else "own"
    return EditedImage(name, show, background, _flag(table, "neutral", where))


def _placement(table: Mapping[str, Any], where: str) -> Placement:
    _check_keys(table, PLACEMENT, where)
    centre = table.get("centre")
    numbers = (*(centre if isinstance(centre, list) else [centre] if centre is not None else []), table.get("scale", 1))
    whole = all(isinstance(part, int | float) and not isinstance(part, bool) and isfinite(part) for part in numbers)
    if not whole or (centre is not None and len(numbers) != 3):
        raise CallError(
            f"{where}: centre is {centre!r} and scale {table.get('scale', 1)!r}; [x, y] and a number are expected"
        )
    return Placement(
        _text(table, "name", where),
        None if centre is None else (float(numbers[0]), float(numbers[1])),
        float(numbers[-1]),
        _flag(table, "mirrored", where),
    )


def _tables(table: Mapping[str, Any], key: str, where: str) -> list[Mapping[str, Any]]:
    found = table.get(key, [])
    if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
        raise CallError(f"{where}: {key} is {found!r}, tables are expected")
    return found


def _text(table: Mapping[str, Any], key: str, where: str) -> str:
    if not isinstance(table.get(key), str) or not table[key]:
        raise CallError(f"{where} has no {key}: text is expected")
    return table[key]


def _flag(table: Mapping[str, Any], key: str, where: str) -> bool:
    if not isinstance(table.get(key, False), bool):
        raise CallError(f"{where}: {key} is {table[key]!r}, true or false is expected")
    return bool(table.get(key, False))


def _check_keys(table: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise CallError(f"{where}: {key!r} means nothing here: {', '.join(sorted(known))} do")
