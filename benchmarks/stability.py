"""Measure the number of samples after which LIME's seeds agree: lime's own sampling, paired masks and GLIME.

    python benchmarks/stability.py photos/*.jpg --model vit-nano             # the first table of docs/lime.md
    python benchmarks/stability.py photos/*.jpg --model vit-nano --auto      # the table of the stopping rule

For each photo and kind of sampling, ten seeds draw 4,000 masks. "same top five from" is the smallest number of
samples from which on all seeds have the same top five segments, at every larger number tested. "overlap" is the share
of the top five that two seeds have in common, "deviation" the standard deviation of a coefficient over seeds as a share
of the largest coefficient, both at 1,000 samples. Photos are resized to 200 pixels and segmented by quickshift. With
``--auto`` the stopping rule runs with each seed instead: the number of samples it needed, and whether the seeds agree.
"""

import argparse
import itertools
import statistics
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

import vitscope as vs
from vitscope.methods.lime import Plan
from vitscope.perturb import MaskedModel, PerturbationOptions
from vitscope.perturb.rendering import subjects

SEEDS, MAX_SAMPLES, TOP = range(10), 4000, 5
LOOKS = (250, 500, 750, 1000, 1500, 2000, 3000, 4000)
AT = 1000
SAMPLINGS = ("lime", "paired", "glime")


def shrunk(path: Path) -> Image.Image:
    """Return a photo of at most 200 × 200 pixels."""
    photo = Image.open(path).convert("RGB")
    photo.thumbnail((200, 200))
    return photo


def top(weights: np.ndarray) -> frozenset[int]:
    """Return the segments with the five largest weights."""
    return frozenset(np.argsort(-weights, kind="stable")[:TOP].tolist())


def coefficients(masked_model: MaskedModel, sampling: str, seed: int) -> dict[int, np.ndarray]:
    """Return the target's coefficients at each number of samples; smaller samples are prefixes of larger ones."""
    plan = Plan.checked(num_samples=MAX_SAMPLES, sampling=sampling, seed=seed)
    rows = plan.sampler(masked_model.segments.count).draw(MAX_SAMPLES)
    outputs = masked_model.evaluate(masked_model.masks(rows), [masked_model.target(None)]).outputs
    return {look: plan.fitted(rows[:look], outputs[:look]).weights[0] for look in LOOKS}


def samples_needed(runs: list[dict[int, np.ndarray]]) -> int | None:
    """Return the number of samples from which on all runs have the same top five; None if they never do."""
    agreed = [look for look in LOOKS if len({top(run[look]) for run in runs}) == 1]
    needed = None
    for look in reversed(LOOKS):
        if look not in agreed:
            break
        needed = look
    return needed


def overlap(tops: list[frozenset[int]]) -> float:
    """Return the mean share of the top five that two runs have in common."""
    return statistics.mean(len(first & second) / TOP for first, second in itertools.combinations(tops, 2))


def compare(model: vs.VisionModel, paths: list[Path]) -> None:
    """Print the table of the kinds of sampling."""
    print("| photo | segments | sampling | same top five from | overlap | deviation |\n|---|---|---|---|---|---|")
    for path in paths:
        (subject,) = subjects(model, shrunk(path))
        masked_model = MaskedModel(model, subject, PerturbationOptions(batch_size=128), segments="quickshift")
        for sampling in SAMPLINGS:
            runs = [coefficients(masked_model, sampling, seed) for seed in SEEDS]
            needed = samples_needed(runs)
            weights = np.stack([run[AT] for run in runs])
            deviation = weights.std(0, ddof=1).mean() / np.abs(weights.mean(0)).max()
            print(
                f"| {path.stem} | {masked_model.segments.count} | {sampling} | "
                f"{f'{needed:,}' if needed else f'more than {MAX_SAMPLES:,}'} | "
                f"{overlap([top(row) for row in weights]):.2f} | {deviation:.3f} |",
                flush=True,
            )


def automatic(model: vs.VisionModel, paths: list[Path]) -> None:
    """Print the table of the stopping rule."""
    print(
        "| photo | samples, median | minimum | maximum | stable | overlap of the top five |\n|---|---|---|---|---|---|"
    )
    for path in paths:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", vs.VitscopeWarning)
            results = [vs.lime(model, shrunk(path), num_samples="auto", seed=seed, batch_size=128) for seed in SEEDS]
        samples = [result.provenance["samples"] for result in results]
        stable = sum(result.provenance["parameters"]["stable"] for result in results)
        alike = overlap([top(result.weights.numpy()) for result in results])
        print(
            f"| {path.stem} | {statistics.median(samples):,.0f} | {min(samples):,} | {max(samples):,} | "
            f"{stable} of {len(results)} | {alike:.2f} |",
            flush=True,
        )


def main() -> None:
    """Print one of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+", type=Path)
    parser.add_argument("--model", default="vit-nano")
    parser.add_argument("--auto", action="store_true")
    arguments = parser.parse_args()
    (automatic if arguments.auto else compare)(vs.load(arguments.model), arguments.photos)


if __name__ == "__main__":
    main()
