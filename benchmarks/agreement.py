"""Do models look at the same places? LIME of two models over many photos, as numbers.

    python benchmarks/agreement.py photos/*.jpg --models vit-nano,swin-nano     # the table of docs/lime.md

Each photo is cut by quickshift, and both models explain the class that the first finds likeliest. Beside their
agreement stand two others: that of the first model with itself under another seed, which is as much as can be asked
for, and that of maps of different photos (each with the next), which is what any two maps have in common. Photos are
shrunk to 200 × 200 pixels, proportions lost, so that maps of different photos can be compared. Intervals are of the
mean over photos.
"""

import argparse
import statistics
from pathlib import Path

import numpy as np
from PIL import Image

import vitscope as vs

SAMPLES = 1000
SIZE = (200, 200)


def moved(result: vs.Attribution, onto: vs.Attribution) -> vs.Attribution:
    """A map as if it were of another photo."""
    return vs.Attribution(result.values, result.grid, onto.images, result.provenance, result.target, result.signed)


def summary(values: list[float]) -> str:
    known = [value for value in values if not np.isnan(value)]
    spread = 1.96 * statistics.stdev(known) / len(known) ** 0.5
    return f"{statistics.mean(known):+.2f} ± {spread:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+", type=Path)
    parser.add_argument("--models", default="vit-nano,swin-nano")
    given = parser.parse_args()
    first, second = (vs.load(name) for name in given.models.split(","))
    ones, others, again = [], [], []
    for path in given.photos:
        photo = Image.open(path).convert("RGB").resize(SIZE)
        ones.append(vs.lime(first, photo, num_samples=SAMPLES, batch_size=128))
        again.append(vs.lime(first, photo, num_samples=SAMPLES, batch_size=128, seed=1))
        others.append(vs.lime(second, photo, num_samples=SAMPLES, batch_size=128, target=ones[-1].target))
    shifted = [moved(other, one) for one, other in zip(ones, others[1:] + others[:1], strict=True)]
    print(f"{len(ones)} photos, {SAMPLES:,} samples each\n")
    print("| maps | rank correlation | overlap of the top fifth |\n|---|---|---|")
    for name, compared in (
        (f"{first.name} under two seeds", again),
        (f"{first.name} and {second.name}", others),
        (f"{first.name} and {second.name}, of different photos", shifted),
    ):
        pairs = [vs.agreement([one, other]) for one, other in zip(ones, compared, strict=True)]
        correlations = [float(pair.rank_correlation[0, 1]) for pair in pairs]
        overlaps = [float(pair.overlap[0, 1]) for pair in pairs]
        print(f"| {name} | {summary(correlations)} | {summary(overlaps)} |")
    chance = statistics.mean(float(pair.chance[0, 1]) for pair in pairs)
    print(f"\nBy chance regions as large as these overlap by {chance:.2f}.")


if __name__ == "__main__":
    main()
