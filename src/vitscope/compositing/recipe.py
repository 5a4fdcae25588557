"""Recipes: TOML files of photos, the objects in them, and edited images."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from PIL import Image

from vitscope.compositing.object_masks import ObjectMask, object_mask
from vitscope.compositing.stage import EditedImage, Placement
from vitscope.errors import CallError, first_line
from vitscope.images.reading import read_photo
from vitscope.images.sources import check_no_url, require_regular_file

IMAGE_KEYS = {"photo", "object", "edited_image"}
OBJECT_KEYS = {"name", "class", "outline", "box", "mask", "segments", "cut", "refine"}
EDITED_IMAGE_KEYS = {"name", "show", "background", "neutral"}
PLACEMENT_KEYS = {"name", "centre", "scale", "mirrored"}

Table = Mapping[str, Any]


@dataclass(frozen=True)
class ImageRecipe:
    """One photo of a recipe, with its objects and the edited images made from them."""

    photo: Path
    objects: tuple[ObjectMask, ...]
    edited_images: tuple[EditedImage, ...]


def read_recipe(path: str | Path, photos: Sequence[Path] = ()) -> list[ImageRecipe]:
    """Return the photos of a recipe file, in the order of the file.

    .. code-block:: toml

        [[image]]
        photo = "dog-and-cat.png"       # in the folder of the recipe, unless ``photos`` contains a file of this name

        [[image.object]]
        name = "dog"
        class = "bull mastiff"          # the class that is explained; by default the name
        outline = [[80, 12], [96, 10]]  # three or more corners; or box = [x, y, width, height], or mask = "dog.png",
        refine = false                  # or segments = [3, 4] with cut = "slic"

        [[image.edited_image]]          # any number of these, or none
        name = "dog smaller"
        show = [{ name = "dog", scale = 0.5, centre = [120, 80], mirrored = false }, { name = "cat" }]
        background = "own"

    Args:
        path: the path of the recipe.
        photos: paths of the photos, matched by file name. Other photos are read from the folder of the recipe.

    Raises:
        CallError: the file is not TOML, a value is missing or of the wrong type, or a key is unknown.
    """
    path = Path(path)
    require_regular_file(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CallError(f"{path} is no file of annotations: {first_line(error)}") from None
    _check_keys(content, {"image"}, f"{path}")
    tables = _tables(content, "image", f"{path}")
    if not tables:
        raise CallError(f"{path} lists no images: begin each with [[image]]")
    paths_by_name = {photo.name: photo for photo in photos}
    recipes = [_image_recipe(path, table, paths_by_name) for table in tables]
    unused = set(paths_by_name) - {recipe.photo.name for recipe in recipes}
    if unused:
        names = ", ".join(recipe.photo.name for recipe in recipes)
        raise CallError(f"{path} has no image called {min(unused)}: it has {names}")
    return recipes


def _image_recipe(path: Path, table: Table, paths_by_name: Mapping[str, Path]) -> ImageRecipe:
    _check_keys(table, IMAGE_KEYS, f"{path}: an image")
    name = _text(table, "photo", f"{path}: an image")
    photo_path = paths_by_name.get(Path(name).name, _relative_path(path, name))
    require_regular_file(photo_path)
    photo, _ = read_photo(photo_path)
    place = f"{path}: {name}"
    objects = tuple(_object(path, entry, photo, place) for entry in _tables(table, "object", place))
    edited_images = tuple(_edited_image(entry, place) for entry in _tables(table, "edited_image", place))
    return ImageRecipe(photo_path, objects, edited_images)


def _relative_path(path: Path, name: str) -> Path:
    """Return the path of a file that a recipe names, relative to the recipe."""
    check_no_url(name)
    return path.parent / name


def _object(path: Path, table: Table, photo: Image.Image, place: str) -> ObjectMask:
    _check_keys(table, OBJECT_KEYS, f"{place}: an object")
    name = _text(table, "name", f"{place}: an object")
    mask = table.get("mask")
    return object_mask(
        photo,
        box=table.get("box"),
        polygon=table.get("outline"),
        mask=None if mask is None else _relative_path(path, str(mask)),
        segments=table.get("segments"),
        cut=table.get("cut", "quickshift"),
        refine=_flag(table, "refine", place),
        name=name,
        label=_text(table, "class", f"{place}: {name}") if "class" in table else None,
    )


def _edited_image(table: Table, place: str) -> EditedImage:
    _check_keys(table, EDITED_IMAGE_KEYS, f"{place}: an edited image")
    name = _text(table, "name", f"{place}: an edited image")
    place = f"{place}: {name}"
    show = tuple(_placement(entry, place) for entry in _tables(table, "show", place))
    background = _text(table, "background", place) if "background" in table else "own"
    return EditedImage(name, show, background, _flag(table, "neutral", place))


def _placement(table: Table, place: str) -> Placement:
    _check_keys(table, PLACEMENT_KEYS, place)
    centre, scale = table.get("centre"), table.get("scale", 1)
    coordinates = [] if centre is None else centre if isinstance(centre, list) else [centre]
    if not all(map(_is_finite, (*coordinates, scale))) or (centre is not None and len(coordinates) != 2):
        raise CallError(f"{place}: centre is {centre!r} and scale is {scale!r}: write [x, y] and a number")
    return Placement(
        _text(table, "name", place),
        None if centre is None else (float(coordinates[0]), float(coordinates[1])),
        float(scale),
        _flag(table, "mirrored", place),
    )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _tables(table: Table, key: str, place: str) -> list[Table]:
    entries = table.get(key, [])
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise CallError(f"{place}: {key} is {entries!r}, but must be a list of tables")
    return entries


def _text(table: Table, key: str, place: str) -> str:
    if not isinstance(table.get(key), str) or not table[key]:
        raise CallError(f"{place} has no {key}: write it as text")
    return table[key]


def _flag(table: Table, key: str, place: str) -> bool:
    if not isinstance(table.get(key, False), bool):
        raise CallError(f"{place}: {key} is {table[key]!r}: write true or false")
    return bool(table.get(key, False))


def _check_keys(table: Table, allowed: set[str], place: str) -> None:
    for key in table:
        if key not in allowed:
            raise CallError(f"{place}: unknown key {key!r}: use {', '.join(sorted(allowed))}")
