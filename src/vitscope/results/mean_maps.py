"""Mean maps: what the maps of several photos have in common."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image

from vitscope.display import counted
from vitscope.errors import CallError
from vitscope.grid import Grid
from vitscope.images.cell_sums import cell_sums
from vitscope.images.image import InputImage
from vitscope.results.attribution import Attribution
from vitscope.validation import short_repr

MAX_CELLS = 64  # rows and columns of a mean map; finer maps are averaged over squares
MAX_PIXELS = 256  # of the longer side of a mean photo


def mean_maps(results: Attribution | Sequence[Attribution], groups: Sequence[str] | None = None) -> Attribution:
    """Return the mean map, over the mean photo, of each group of photos.

    Each map is divided by the sum of its absolute values first, so that every photo counts equally. Maps are averaged
    as the model sees the photos, cropped and resized. The mean shows something only if objects lie at similar places in
    all photos, as in medical images.

    Args:
        results: the maps of several photos by one method; maps on different grids become as coarse as the coarsest.
        groups: the group of each photo, such as its class; by default the class that its map explains.

    Returns:
        a map for each group, in the order in which they appear, whose absolute values sum to at most 1. The names of
        the images are the groups, with their numbers of photos.

    Raises:
        CallError: there are no maps, not one group for each photo, no photos, or signed and unsigned maps.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> model, photos = vs.load("vit-nano"), [skimage.data.chelsea(), skimage.data.coffee()]
        >>> means = vs.mean_maps(vs.rollout(model, photos), groups=["all", "all"])
        >>> means.values.shape, means.images[0].name
        (torch.Size([1, 8, 8]), 'all (2 photos)')
    """
    singles = _singles(results)
    if groups is None:
        groups = [single.target or "" for single in singles]
        if not all(groups):
            raise CallError("these maps explain no class: pass groups, the class of each photo")
    names = list(map(str, groups))
    if len(names) != len(singles):
        raise CallError(f"{len(names)} groups for {len(singles)} photos: pass one group for each photo")
    if len({single.signed for single in singles}) > 1:
        raise CallError("cannot average signed and unsigned maps: pass the results of one method")
    height, width = (min(single.values.shape[axis] for single in singles) for axis in (1, 2))
    shape = min(height, MAX_CELLS), min(width, MAX_CELLS)
    maps = np.stack([_averaged(_shares(single), shape) for single in singles])
    photo_size = _photo_size(singles[0].images[0])
    photos = [_seen_pixels(single.images[0], photo_size) for single in singles]
    values, images, records = [], [], []
    for name in dict.fromkeys(names):
        indices = [index for index, group in enumerate(names) if group == name]
        values.append(maps[indices].mean(0))
        pixels = np.mean([photos[index] for index in indices], axis=0).round().astype(np.uint8)
        images.append(InputImage.from_photo(Image.fromarray(pixels), f"{name} ({counted(len(indices), 'photo')})"))
        records.append({"group": name, "photos": len(indices)})
    return Attribution(
        torch.from_numpy(np.stack(values)).float(),
        Grid(*shape),
        images,
        _provenance(singles, records),
        signed=singles[0].signed,
    )


def reduced(result: Attribution) -> Attribution:
    """Return a single result as coarse as :func:`mean_maps` needs it, with a small photo, to save memory."""
    image, size = result.images[0], _photo_size(result.images[0])
    height, width = (min(side, MAX_CELLS) for side in result.values.shape[1:])
    photo = Image.fromarray(_seen_pixels(image, size).round().astype(np.uint8))
    values = torch.from_numpy(_averaged(_shares(result), (height, width))).float()[None]
    provenance = {key: value for key, value in result.provenance.items() if key not in ("photos", "images")}
    image = InputImage.from_photo(photo, image.name)
    return Attribution(values, Grid(height, width), [image], provenance, result.target, result.signed)


def _singles(results: Any) -> list[Attribution]:
    """Return the results of single images."""
    batches = [results] if isinstance(results, Attribution) else list(results)
    if not batches or not all(isinstance(batch, Attribution) for batch in batches):
        raise CallError(
            f"results is {short_repr(results)}: attributions are expected, as vitscope.rollout returns them"
        )
    if not all(batch.images for batch in batches):
        raise CallError("a result holds no photos: attach them with result.with_photos(images)")
    return [single for batch in batches for single in batch]


def _shares(result: Attribution) -> Float[np.ndarray, "height width"]:
    """Return the map of a single result, divided by the sum of its absolute values."""
    values = result.values[0].detach().cpu().double().numpy()
    return values / (np.abs(values).sum() or 1.0)


def _averaged(values: Float[np.ndarray, "height width"], shape: tuple[int, int]) -> Float[np.ndarray, "rows columns"]:
    """Return a map on a coarser grid with the same sum."""
    rows, columns = (np.linspace(0, side, cells + 1) for side, cells in zip(values.shape, shape, strict=True))
    return cell_sums(values, rows, columns)


def _photo_size(image: InputImage) -> tuple[int, int]:
    """Return the (width, height) of a mean photo in pixels, in the proportions of what the model sees."""
    left, top, right, bottom = image.box
    scale = min(MAX_PIXELS / max(right - left, bottom - top), 1.0)
    return max(round((right - left) * scale), 1), max(round((bottom - top) * scale), 1)


def _seen_pixels(image: InputImage, size: tuple[int, int]) -> Float[np.ndarray, "pixel_height pixel_width 3"]:
    """Return what the model sees of a photo at ``size`` = (width, height); padding is black."""
    box = tuple(round(edge) for edge in image.box)
    seen = image.photo.convert("RGB").crop(box).resize(size, Image.Resampling.BILINEAR)  # type: ignore[arg-type]
    return np.asarray(seen, dtype=np.float64)


def _provenance(singles: Sequence[Attribution], records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return how a mean map was made; attention stays a multiple of uniform attention."""
    first = singles[0].provenance
    shared = {key: first[key] for key in ("method", "model", "parameters") if key in first}
    is_attention = all(single.provenance.get("rows_sum_to_one") is True for single in singles)
    return {**shared, "mean_of": records, **({"rows_sum_to_one": True} if is_attention else {})}
