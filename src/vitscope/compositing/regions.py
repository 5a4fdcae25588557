"""Regions of photos: boxes, polygons, masks, and the border of the photo."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from vitscope.compositing.object_masks import Mask, ObjectMask, is_box, is_polygon, mask_option, mask_pixels
from vitscope.errors import CallError
from vitscope.images.image import InputImage
from vitscope.validation import short_repr

BORDER = "border"
BORDER_RATIO = 0.1  # of the height and of the width, on each side


def region_mask(image: InputImage, region: Any, name: str) -> Mask | None:
    """Return the mask of a region at the size of the photo; None if the photo has no such region.

    Args:
        image: the photo.
        region: as in :func:`vitscope.region_shares`.
        name: of the region, for errors.

    Raises:
        CallError: the region does not fit the photo, or is nothing of the kind.
    """
    photo = image.photo
    if region is None:
        return None
    if isinstance(region, str) and region == BORDER:
        return _border(photo)
    option = {"mask": region.mask} if isinstance(region, ObjectMask) else mask_option(region)
    mask = mask_pixels(photo, option, name)
    return mask if mask.any() else None


def regions_by_name(regions: Any, count: int) -> dict[str, list[Any]]:
    """Return a region for each of ``count`` photos, by the name of the region.

    Args:
        regions: as in :func:`vitscope.region_shares`.
        count: number of photos.

    Raises:
        CallError: there is no region, or not one for each photo.
    """
    if _names_itself(regions):
        regions = [regions]
    if isinstance(regions, list | tuple) and all(map(_names_itself, regions)):
        regions = {region.name if isinstance(region, ObjectMask) else region: region for region in regions}
    if not isinstance(regions, Mapping):
        raise CallError(
            f"regions is {short_repr(regions)}: pass a mapping from names to boxes, polygons, masks or 'border'"
        )
    if not regions:
        raise CallError("no region was passed: pass a mapping from names to boxes, polygons, masks or 'border'")
    return {str(name): _for_each_photo(str(name), region, count) for name, region in regions.items()}


def _border(photo: Image.Image) -> Mask:
    """Return the outer tenth of the photo on each side."""
    rows, columns = (max(round(BORDER_RATIO * side), 1) for side in (photo.height, photo.width))
    mask = np.ones((photo.height, photo.width), dtype=bool)
    mask[rows : photo.height - rows, columns : photo.width - columns] = False
    return mask


def _names_itself(region: Any) -> bool:
    return isinstance(region, ObjectMask) or (isinstance(region, str) and region == BORDER)


def _for_each_photo(name: str, region: Any, count: int) -> list[Any]:
    """Return the region of each photo: a list of regions, or the same region for all."""
    if region is None:
        raise CallError(f"the region {name} is None: pass a box, a polygon, a mask or 'border'")
    if not isinstance(region, list) or is_box(region) or is_polygon(region):
        return [region] * count
    if len(region) != count:
        raise CallError(f"{len(region)} regions {name} for {count} photos: pass one for each photo, or one for all")
    return region
