"""Measure whether two models depend on the same regions: LIME of both for many photos.

    python benchmarks/agreement.py photos/*.jpg --models vit-nano,swin-nano     # the table of docs/lime.md

Each photo is segmented by quickshift, and both models explain the class that the first one predicts. There are two
controls: the agreement of the first model with itself under another seed (the most that can be expected), and the
agreement of maps of different photos, each with the next (what any two maps have in common). Photos are resized to 200
× 200 pixels, so that maps of different photos can be compared. Intervals are 95 % confidence intervals of the mean over
photos.
"""

import argparse
import statistics
from pathlib import Path

import numpy as np
from PIL import Image

import vitscope as vs

SAMPLES = 1000
SIZE = (200, 200)


def on_photo_of(target: vs.Attribution, result: vs.Attribution) -> vs.Attribution:
    """Return a map as if it belonged to the photo of another result."""
    return vs.Attribution(result.values, result.grid, target.images, result.provenance, result.target, result.signed)


def summary(values: list[float]) -> str:
    """Return the mean of the values with its 95 % interval."""
    finite = [value for value in values if not np.isnan(value)]
    spread = 1.96 * statistics.stdev(finite) / len(finite) ** 0.5
    return f"{statistics.mean(finite):+.2f} ± {spread:.2f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+", type=Path)
    parser.add_argument("--models", default="vit-nano,swin-nano")
    arguments = parser.parse_args()
    model, other_model = (vs.load(name) for name in arguments.models.split(","))
    results, others, reseeded = [], [], []
    for path in arguments.photos:
        photo = Image.open(path).convert("RGB").resize(SIZE)
        results.append(vs.lime(model, photo, num_samples=SAMPLES, batch_size=128))
        reseeded.append(vs.lime(model, photo, num_samples=SAMPLES, batch_size=128, seed=1))
        others.append(vs.lime(other_model, photo, num_samples=SAMPLES, batch_size=128, target=results[-1].target))
    shifted = [
        on_photo_of(result, next_result) for result, next_result in zip(results, others[1:] + others[:1], strict=True)
    ]
    print(f"{len(results)} photos, {SAMPLES:,} samples each\n")
    print("| maps | rank correlation | overlap of the top fifth |\n|---|---|---|")
    for name, compared in (
        (f"{model.name} under two seeds", reseeded),
        (f"{model.name} and {other_model.name}", others),
        (f"{model.name} and {other_model.name}, of different photos", shifted),
    ):
        pairs = [vs.agreement(list(pair)) for pair in zip(results, compared, strict=True)]
        correlations = [float(pair.rank_correlation[0, 1]) for pair in pairs]
        overlaps = [float(pair.overlap[0, 1]) for pair in pairs]
        print(f"| {name} | {summary(correlations)} | {summary(overlaps)} |")
    chance = statistics.mean(float(pair.chance[0, 1]) for pair in pairs)
    print(f"\nRegions of this size overlap by {chance:.2f} by chance.")


if __name__ == "__main__":
    main()
