"""Measure which baseline, the filling of hidden parts, makes the most faithful maps.

    python benchmarks/baselines.py photos/*.jpg             # the tables of docs/baselines.md
    python benchmarks/baselines.py mri/test/*/* --models tuned-vit tuned-swin --count 24

Every map of the predicted class ranks the patches (of a Swin: tokens of the last stage). Patches are deleted and
inserted in this order, in five steps, and the probability is compared with that in random order. The gain is the mean
of two areas between curves: how much lower deletion is than in random order, and how much higher insertion; more is
better. Hidden patches of this test are filled in five ways (the judges). No map is judged by its own baseline, and
gains are adjusted for the judges that a map had (the least-squares fit of baseline + judge, for each photo). ± is the
95 % interval of the mean over photos; "from the best" is that of differences of maps of the same photo. The last column
is the share of the five strongest patches that lie in empty parts of the image, where 90 % of the pixels are nearly
black. Photos are shrunk to the model's input first, which takes less time and hardly changes a map.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import vitscope as vs
from vitscope.perturb import MaskedModel, PerturbationOptions
from vitscope.perturb.masked_model import cells_of
from vitscope.perturb.rendering import subjects

HIDES = ("grey", "image mean", "patch mean", "blur", "black", "drop")
JUDGES = ("grey", "image mean", "blur", "black", "drop")
STEPS = 5
ORDERS = 2  # random orders per photo: one and its reverse
BATCH = 64
STRONGEST = 5
BLACK, EMPTY = 20, 0.9  # a pixel is nearly black up to 20 of 255; a patch is empty if 90 % of its pixels are

Order = np.ndarray  # (patch,): patches in the order of deletion


def shrunk(model: vs.VisionModel, path: Path) -> Image.Image:
    """Return what the model sees of a photo, in the size of its input: perturbing it takes the least time."""
    _, (view,) = model.prepare(path)
    size = model.preprocessing.size[::-1]
    return view.photo.crop(tuple(round(side) for side in view.box)).resize(size, Image.Resampling.BICUBIC)


def filling(name: str, photo: Image.Image) -> object:
    """Return the option ``hide`` for one of :data:`HIDES`."""
    if name == "image mean":
        return tuple(np.asarray(photo).mean((0, 1)).tolist())
    return "mean" if name == "patch mean" else name


def map_of(model: vs.VisionModel, photo: Image.Image, method: str, hide: str | None, samples: int) -> vs.Attribution:
    """Return the map of a method for the predicted class."""
    options: dict[str, object] = {} if hide is None else {"hide": filling(hide, photo), "batch_size": BATCH}
    if method in ("lime", "kernel_shap"):
        options["segments"] = "patches"
    if method in ("lime", "kernel_shap", "rise"):
        options["num_samples"] = samples
    return getattr(vs, method)(model, photo, **options)


class Judge:
    """The test of one photo: deletion and insertion with each filling, less those in random order."""

    def __init__(self, model: vs.VisionModel, photo: Image.Image) -> None:
        (subject,) = subjects(model, photo)
        self._view, cells = cells_of(model, subject)
        assert cells is not None
        self.cells = cells
        self._models = {}
        for name in JUDGES:
            options = PerturbationOptions(hide=filling(name, photo), batch_size=BATCH)
            self._models[name] = MaskedModel(model, subject, options, segments="patches")
        generator = np.random.default_rng(0)
        shuffled = [generator.permutation(cells.height * cells.width) for _ in range(ORDERS // 2)]
        self._random = {
            name: self._areas(name, [*shuffled, *(row[::-1] for row in shuffled)]).mean(0) for name in JUDGES
        }

    def order(self, result: vs.Attribution) -> Order:
        """Return the patches, highest mean value first."""
        means = F.adaptive_avg_pool2d(result.values[0][None, None], (self.cells.height, self.cells.width))
        return np.argsort(-means.flatten().numpy(), kind="stable")

    def gains(self, name: str, orders: Sequence[Order]) -> np.ndarray:
        """Return (order, 2): how much lower than in random order deletion is, and how much higher insertion is."""
        return (self._areas(name, orders) - self._random[name]) * [-1, 1]

    def _areas(self, name: str, orders: Sequence[Order]) -> np.ndarray:
        """Return (order, 2): the areas under deletion and insertion, without the ends, which all orders share."""
        masked_model = self._models[name]
        counts = np.linspace(0, len(orders[0]), STEPS + 1).round().astype(int)[1:-1]
        deleted = np.zeros((len(orders), len(counts), len(orders[0])), dtype=bool)
        for row, order in zip(deleted, orders, strict=True):
            for step, count in enumerate(counts):
                row[step, order[:count]] = True
        visible = np.stack([~deleted, deleted], axis=1).reshape(-1, len(orders[0]))
        outputs = masked_model.evaluate(masked_model.masks(visible), [masked_model.target(None)]).outputs[:, 0]
        return outputs.reshape(len(orders), 2, len(counts)).sum(-1) / STEPS


def empty_patches(photo: Image.Image, cells: vs.Grid) -> np.ndarray:
    """Return (patch,), True for patches whose pixels are nearly all black."""
    black = torch.from_numpy((np.asarray(photo).max(-1) <= BLACK).astype(np.float32))[None, None]
    return (F.adaptive_avg_pool2d(black, (cells.height, cells.width)).flatten() >= EMPTY).numpy()


def adjusted(gains: np.ndarray) -> np.ndarray:
    """Return (photo, row): the gain of each row under the mean judge.

    Args:
        gains: (photo, row, judge), NaN for a judge that a row did not have.
    """
    rows, judges = gains.shape[1:]
    had = ~np.isnan(gains[0])
    design = np.zeros((rows, judges, rows + judges - 1))
    for row in range(rows):
        design[row, :, row] = 1
    for judge in range(judges - 1):
        design[:, judge, rows + judge] = 1
    design[:, -1, rows:] = -1  # the effects of the judges add up to zero
    fit = np.linalg.lstsq(design[had], gains[:, had].T, rcond=None)[0]
    return fit[:rows].T


def mean_and_interval(values: np.ndarray) -> str:
    """Return the mean over photos with its 95 % interval."""
    return f"{values.mean():+.3f} ± {1.96 * values.std(ddof=1) / len(values) ** 0.5:.3f}"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table in Markdown."""
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)
    print(flush=True)


class Measurements:
    """The gains of every map of every photo, and the share of its strongest patches that lie in empty parts.

    Attributes:
        gains: by method and baseline (None for a method without one): (judge, 2) of each photo, NaN for its own judge.
        strongest: likewise, a number for each photo; NaN if no patch is empty.
        empty: likewise, the share of all its patches that are empty.
    """

    def __init__(self) -> None:
        self.gains: dict[tuple[str, str | None], list[np.ndarray]] = {}
        self.strongest: dict[tuple[str, str | None], list[float]] = {}
        self.empty: dict[tuple[str, str | None], list[float]] = {}

    def add(self, model: vs.VisionModel, path: Path, keys: Sequence[tuple[str, str | None]], samples: int) -> None:
        """Measure the maps of one photo."""
        photo = shrunk(model, path)
        judge = Judge(model, photo)
        orders = {key: judge.order(map_of(model, photo, *key, samples)) for key in keys}
        gains = {key: np.full((len(JUDGES), 2), np.nan) for key in keys}
        for column, name in enumerate(JUDGES):
            judged = [key for key in keys if key[1] != name]
            for key, gain in zip(judged, judge.gains(name, [orders[key] for key in judged]), strict=True):
                gains[key][column] = gain
        black = empty_patches(photo, judge.cells)
        for key in keys:
            share = float(black[orders[key][:STRONGEST]].mean()) if black.any() else np.nan
            self.gains.setdefault(key, []).append(gains[key])
            self.strongest.setdefault(key, []).append(share)
            self.empty.setdefault(key, []).append(float(black.mean()))

    def print_baselines(self, method: str, hides: Sequence[str]) -> None:
        """Print the table of a method: each baseline, its gain, and the strongest patches in empty parts."""
        gains = np.stack([self.gains[method, hide] for hide in hides], axis=1).mean(-1)
        totals, judged = adjusted(gains), gains.mean(0)
        best = totals.mean(0).argmax()
        rows = []
        for row, hide in enumerate(hides):
            worse = "best" if row == best else mean_and_interval(totals[:, row] - totals[:, best])
            by_judge = ["" if np.isnan(value) else f"{value:+.3f}" for value in judged[row]]
            rows.append([hide, mean_and_interval(totals[:, row]), worse, *by_judge, self._in_empty(method, hide)])
        judges = (f"judge: {name}" for name in JUDGES)
        print(f"{method}, {len(gains)} images{self._about_empty(method, hides[0])}\n")
        print_table(["baseline", "gain", "from the best", *judges, "strongest in empty parts"], rows)

    def print_maps(self, methods: Sequence[tuple[str, str | None]]) -> None:
        """Print the table of methods, each with all judges but its own baseline."""
        rows = []
        for method, hide in methods:
            values = np.nanmean(np.stack(self.gains[method, hide]), 1)
            mean = values.mean(-1)
            rows.append(
                [
                    method if hide is None else f"{method}, {hide}",
                    str(len(values)),
                    mean_and_interval(mean),
                    mean_and_interval(-values[:, 0]),
                    mean_and_interval(values[:, 1]),
                    f"{(mean > 0).mean():.0%}",
                    self._in_empty(method, hide),
                ]
            )
        header = ["map", "images", "gain", "deletion minus random", "insertion minus random", "better than random on"]
        print_table([*header, "strongest in empty parts"], rows)

    def _in_empty(self, method: str, hide: str | None) -> str:
        shares = self.strongest[method, hide]
        return "–" if np.isnan(shares).all() else f"{np.nanmean(shares):.0%}"

    def _about_empty(self, method: str, hide: str | None) -> str:
        empty = [share for share in self.empty[method, hide] if share]
        return f"; {len(empty)} with empty parts, {np.mean(empty):.0%} of their patches" if empty else ""


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+", type=Path)
    parser.add_argument("--models", nargs="+", default=["vit-nano", "swin-nano"])
    parser.add_argument(
        "--methods", nargs="*", default=["occlusion", "rise"], help="methods whose baselines to compare"
    )
    parser.add_argument("--hides", nargs="+", default=HIDES, choices=HIDES, help="their baselines")
    parser.add_argument("--maps", nargs="*", default=["rollout", "libra"], help="methods without a baseline")
    parser.add_argument("--count", type=int, help="number of photos, spread evenly over the list; all by default")
    parser.add_argument(
        "--sampled", type=int, default=4, help="methods that draw masks take every n-th of these photos"
    )
    parser.add_argument("--samples", type=int, default=256, help="masks of methods that draw masks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", vs.VitscopeWarning)
    count = min(arguments.count or len(arguments.photos), len(arguments.photos))
    paths = [arguments.photos[index] for index in np.linspace(0, len(arguments.photos) - 1, count).round().astype(int)]
    hides = {
        method: [hide for hide in arguments.hides if method != "rise" or hide != "patch mean"]  # RISE has no segments
        for method in arguments.methods
    }
    maps: list[tuple[str, str | None]] = [(method, None) for method in arguments.maps]
    pairs: dict[str, list[tuple[str, str | None]]] = {m: [(m, hide) for hide in names] for m, names in hides.items()}
    for name in arguments.models:
        model, measurements = vs.load(name), Measurements()
        for index, path in enumerate(paths):
            drawn = [m for m in hides if m == "occlusion" or index % arguments.sampled == 0]
            measurements.add(
                model, path, [*maps, *(pair for method in drawn for pair in pairs[method])], arguments.samples
            )
            print(f"{model.name}: {index + 1} of {count}", file=sys.stderr, end="\r")
        print(f"\n## {model.name}\n")
        for method, names in hides.items():
            measurements.print_baselines(method, names)
        measurements.print_maps([*maps, *(pair for method in hides for pair in pairs[method])])


if __name__ == "__main__":
    main()
