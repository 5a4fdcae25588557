"""Edited images composed one pixel at a time in float64, and models whose outputs are known functions of the pixels."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import vitscope as vs

GROUND, RED = (120, 120, 150), (255, 0, 0)


def hole(mask: np.ndarray, margin: int) -> np.ndarray:
    """Return the pixels at most ``margin`` steps up, down, left or right from the mask."""
    grown = np.zeros_like(mask)
    inside = np.argwhere(mask)
    for row, column in np.ndindex(*mask.shape):
        grown[row, column] = np.abs(inside - (row, column)).sum(1).min() <= margin
    return grown


def opacity(mask: np.ndarray, feather: float) -> np.ndarray:
    """Return the opacity of an object: 0 outside, 1 from ``feather`` + 1 pixels inside; beyond the image, it is 0."""
    padded = np.pad(mask, 1)
    outside = np.argwhere(~padded)
    alpha = np.zeros(mask.shape)
    for row, column in np.argwhere(mask):
        nearest = np.sqrt(((outside - (row + 1, column + 1)) ** 2).sum(1).min())
        alpha[row, column] = min(nearest / (feather + 1), 1.0)
    return alpha


def regions_by_object(masks: Mapping[str, np.ndarray], margin: int) -> dict[str, np.ndarray]:
    """Divide the union of all holes among the objects: each pixel goes to the nearest one, or the first of two."""
    union = np.any([hole(mask, margin) for mask in masks.values()], axis=0)
    regions = {name: np.zeros_like(union) for name in masks}
    for row, column in np.argwhere(union):
        distances = {
            name: np.sqrt(((np.argwhere(mask) - (row, column)) ** 2).sum(1).min()) for name, mask in masks.items()
        }
        regions[min(distances, key=lambda name: distances[name])][row, column] = True
    return regions


def composed(
    photo: np.ndarray,
    masks: Mapping[str, np.ndarray],
    show: Sequence[vs.Placement],
    background: np.ndarray,
    *,
    own: bool,
    feather: float,
    margin: int,
) -> np.ndarray:
    """Return ``background`` with unmoved objects restored over their ``own``, and the rest pasted. Scale 1 only."""
    canvas, original = background.astype(np.float64), photo.astype(np.float64)
    boxes = {}
    for name, mask in masks.items():
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        boxes[name] = (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1)

    def is_unmoved(placed: vs.Placement) -> bool:
        top, bottom, left, right = boxes[placed.name]
        in_place = placed.centre is None or placed.centre == ((left + right) / 2, (top + bottom) / 2)
        return own and in_place and not placed.mirrored

    regions_of = regions_by_object(masks, margin) if any(map(is_unmoved, show)) else {}
    for placed in show:
        if is_unmoved(placed):
            canvas[regions_of[placed.name]] = original[regions_of[placed.name]]
    nothing_moved = True
    for placed in show:
        if nothing_moved and is_unmoved(placed):
            continue
        nothing_moved = False
        top, bottom, left, right = boxes[placed.name]
        x, y = placed.centre or ((left + right) / 2, (top + bottom) / 2)
        down, across = round(y - (bottom - top) / 2) - top, round(x - (right - left) / 2) - left
        alpha = opacity(masks[placed.name], feather)
        for row, column in np.argwhere(masks[placed.name]):
            source = (row, left + right - 1 - column) if placed.mirrored else (row, column)
            target = (source[0] + down, source[1] + across)
            if 0 <= target[0] < len(photo) and 0 <= target[1] < photo.shape[1]:
                share = alpha[row, column]
                canvas[target] = share * original[row, column] + (1 - share) * canvas[target]
    return canvas


def inpainted(photo: np.ndarray, missing: np.ndarray, rim_width: int = 2, smoothing: float = 1.0) -> np.ndarray:
    """Interpolate a hole from its rim by linear radial basis functions with a plane: the full linear system, solved."""
    rim = np.argwhere(hole(missing, rim_width) & ~missing).astype(np.float64)
    inside = np.argwhere(missing).astype(np.float64)

    def distances(ones: np.ndarray, others: np.ndarray) -> np.ndarray:
        return np.sqrt(((ones[:, None] - others[None]) ** 2).sum(-1))

    plane = np.c_[np.ones(len(rim)), rim]
    left = np.block([[-distances(rim, rim) + smoothing * np.eye(len(rim)), plane], [plane.T, np.zeros((3, 3))]])
    filled = photo.astype(np.float64)
    for channel in range(3):
        colours = filled[~missing & hole(missing, rim_width), channel]
        solved = np.linalg.solve(left, np.append(colours, np.zeros(3)))
        values = -distances(inside, rim) @ solved[:-3] + np.c_[np.ones(len(inside)), inside] @ solved[-3:]
        filled[missing, channel] = values.clip(colours.min(), colours.max())
    return filled


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def boxed(height: int, width: int, box: tuple[int, int, int, int]) -> np.ndarray:
    """Return the mask of a box (left, top, width, height)."""
    mask = np.zeros((height, width), dtype=bool)
    mask[box[1] : box[1] + box[3], box[0] : box[0] + box[2]] = True
    return mask


def painted(height: int, width: int, *boxes: tuple[int, int, int, int], ground: Any = GROUND) -> np.ndarray:
    """Return red boxes on a background of one colour, or on an image."""
    photo = np.empty((height, width, 3), np.uint8)
    photo[:] = ground
    for box in boxes:
        photo[boxed(height, width, box)] = RED
    return photo


class Seeing(nn.Module):
    """Logits as a function of the pixels, 0 to 1."""

    def __init__(self, look: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.look = look

    def forward(self, pixels: Tensor) -> Tensor:
        return self.look((pixels + 1) / 2)


def redness(unit: Tensor) -> Tensor:
    """Return red minus green of each pixel, (batch, height, width): 1 in a red box, 0 on its ground."""
    return (unit[:, 0] - unit[:, 1]).clamp(0, 1)


def two(answer: Tensor) -> Tensor:
    """Return the answer as the logit of class 0, and zero as the logit of class 1."""
    return torch.stack([answer, torch.zeros_like(answer)], 1)


def share_of_red(unit: Tensor) -> Tensor:
    """Return the logits of a model that ignores positions."""
    return two(redness(unit).mean((1, 2)))


def red_at_the_centre(unit: Tensor) -> Tensor:
    """Return the logits of a model that depends on the centre of the image only."""
    height, width = unit.shape[-2:]
    ys, xs = (torch.arange(side) - (side - 1) / 2 for side in (height, width))
    weight = torch.exp(-(ys[:, None] ** 2 + xs[None] ** 2) / (2 * (min(height, width) / 5) ** 2))
    return two((redness(unit) * weight / weight.sum()).sum((1, 2)))


def seeing(look: Callable[[Tensor], Tensor], height: int, width: int) -> vs.VisionModel:
    return vs.load(Seeing(look), image_size=(height, width))


class Placed(nn.Module):
    """The redness of each patch, weighted by an embedding of its position: patches of 4 pixels, class 0."""

    def __init__(self, weights: np.ndarray) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.from_numpy(weights).float().reshape(1, -1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = nn.functional.avg_pool2d(redness((pixels + 1) / 2)[:, None], 4).flatten(2).mT
        return two((patches * self.pos_embed).mean((1, 2)))


def placed(weights: np.ndarray) -> vs.VisionModel:
    size = (4 * weights.shape[0], 4 * weights.shape[1])
    return vs.load(Placed(weights), image_size=size, patch_size=4, readout="patches")


def student(values: Sequence[float], confidence: float) -> tuple[float, float]:
    """Return the interval of the mean, from the density of Student's t integrated by the trapezoidal rule."""
    count = len(values)
    mean = sum(values) / count
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    grid = np.linspace(0, 400, 4_000_001)
    degrees = count - 1
    density = math.gamma((degrees + 1) / 2) / math.sqrt(degrees * math.pi) / math.gamma(degrees / 2)
    heights = density * (1 + grid**2 / degrees) ** (-(degrees + 1) / 2)
    mass = np.concatenate([[0], np.cumsum((heights[1:] + heights[:-1]) / 2 * (grid[1] - grid[0]))])
    half = float(grid[np.searchsorted(mass, confidence / 2)]) * deviation / math.sqrt(count)
    return mean - half, mean + half
