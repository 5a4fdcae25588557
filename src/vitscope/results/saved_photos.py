"""Records of the photos of a saved result, by which the photos are recognised later."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from PIL import Image

from vitscope.errors import CallError
from vitscope.images.image import InputImage, on_white
from vitscope.images.reading import photos, read_photo
from vitscope.validation import require_mapping

PhotoRecord = Mapping[str, Any]


def photo_record(image: InputImage) -> dict[str, Any]:
    """Return the record of a photo: name (without folder), size, box that the model saw, and hash of the pixels."""
    return {
        "name": PurePath(image.name).name,
        "size": list(image.photo.size),
        "box": list(image.box),
        "sha256": pixel_hash(image.photo),
    }


def pixel_hash(photo: Image.Image) -> str:
    """Return the SHA-256 of an RGB photo's size and pixels, whatever its file, as 64 hexadecimal digits."""
    return hashlib.sha256(f"{photo.width}×{photo.height}".encode() + photo.tobytes()).hexdigest()


def check_provenance(provenance: Mapping[str, Any], count: int) -> None:
    """Check what the provenance of a saved file says about each of ``count`` images.

    Raises:
        ValueError, KeyError: an entry is missing or has another type.
    """
    for key in ("images", "photos"):
        if key in provenance and (not isinstance(provenance[key], list) or len(provenance[key]) != count):
            raise ValueError(f"its provenance does not list {count} {key}")
    for entry in provenance.get("images", ()):
        if not isinstance(require_mapping(entry, "provenance of an image")["target"], str | None):
            raise ValueError("the target of an image is not text")
    for entry in provenance.get("photos", ()):
        record = require_mapping(entry, "record of a photo")
        numbers = [*record["size"], *record["box"]]
        is_number = [isinstance(number, int | float) and not isinstance(number, bool) for number in numbers]
        if len(record["size"]) != 2 or len(record["box"]) != 4 or not all(is_number) or min(record["size"]) < 1:
            raise ValueError("the size or box of a photo is not numbers")
        if not isinstance(record["name"], str) or not isinstance(record["sha256"], str):
            raise ValueError("the name or hash of a photo is not text")


def matching_images(records: Sequence[PhotoRecord], images: Any) -> list[InputImage]:
    """Return the photo of each record, with the box that the model saw.

    Args:
        records: from :func:`photo_record`.
        images: the photos, in any order, as all functions take them.

    Raises:
        CallError: a photo is missing, or its pixels differ.
    """
    by_hash = {}
    for source in photos(images):
        photo, name = read_photo(source)
        photo = on_white(photo)
        by_hash[pixel_hash(photo)] = (photo, name)
    matches = []
    for record in records:
        if record["sha256"] not in by_hash:
            size = "×".join(map(str, record["size"]))
            name = record["name"] or "a photo without a name"
            raise CallError(f"none of these {len(by_hash)} images has the pixels of {name} ({size}): pass this photo")
        photo, name = by_hash[record["sha256"]]
        left, top, right, bottom = record["box"]
        matches.append(InputImage(photo, (left, top, right, bottom), name))
    return matches
