"""Measure the default recipe on little data: accuracy and time beside the report's recipe and scikit-learn.

    python benchmarks/tuning.py FOLDER [--models vit-nano MODEL] [--image-size 112] [--tunings head lora full]

FOLDER holds one folder of images per class. Each seed draws 40 images per class to train and 100 to test, without
duplicates, and is also the seed of the run. `head` is compared with scikit-learn's LogisticRegressionCV on the same
features, standardized; every tuning with `--recipe report`. Seconds are CPU seconds of
the whole call: set OMP_NUM_THREADS=1.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import vitscope as vs
from vitscope.models.heads import reset_classifier
from vitscope.tune.classifier import compute_features
from vitscope.tune.data import LabeledImages
from vitscope.tune.dataset import ImageDataset
from vitscope.tune.methods import TUNING_METHODS

BATCH = 32


def subset(folder: Path, classes: Sequence[str], per_class: int, tests: int, seed: int) -> vs.Data:
    """Return a data set of a few images per class, drawn with a seed, without duplicates between train and test."""
    complete = vs.load_data(folder, vs.DataOptions(test_share=0.5))
    images = complete.train
    generator = np.random.default_rng(seed)
    rows: dict[str, list[int]] = {"train": [], "test": []}
    kept = [complete.labels.index(label) for label in classes or complete.labels]
    for index in kept:
        shuffled = generator.permutation(np.flatnonzero(images.classes == index)).tolist()
        rows["train"] += shuffled[:per_class]
        rows["test"] += shuffled[per_class : per_class + tests]
    numbers = {index: number for number, index in enumerate(kept)}
    splits = []
    for name in ("train", "test"):
        split = images.subset(np.asarray(sorted(rows[name])))
        renumbered = np.asarray([numbers[int(index)] for index in split.classes])
        splits.append(replace(split, classes=renumbered))
    data = vs.Data(folder.name, tuple(complete.labels[index] for index in kept), *splits)
    return vs.check_data(data).without_duplicates()


def features(model: vs.VisionModel, images: LabeledImages) -> np.ndarray:
    """Return the features (image, channel) that a classifier of the model reads."""
    dataset = ImageDataset(images, model.preprocessing)
    starts = range(0, len(images), BATCH)
    batches = [list(range(start, min(start + BATCH, len(images)))) for start in starts]
    return compute_features(model, (dataset.__getitems__(batch)["pixel_values"] for batch in batches))[0].numpy()


def by_scikit_learn(model: vs.VisionModel, data: vs.Data) -> tuple[float, float]:
    """Return the accuracy of scikit-learn's logistic regression and its CPU seconds, with those for the features."""
    start = time.process_time()
    classifier = reset_classifier(model, data.labels)
    pipeline = make_pipeline(StandardScaler(), LogisticRegressionCV(max_iter=5000))
    pipeline.fit(features(classifier, data.train), data.train.classes)
    accuracy = pipeline.score(features(classifier, data.test), data.test.classes)
    return float(accuracy), time.process_time() - start


def by_vitscope(model: vs.VisionModel, data: vs.Data, tuning: str, recipe: str, seed: int) -> tuple[float, float]:
    """Return the test accuracy of a run and the CPU seconds of the call."""
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        tuned = vs.finetune(model, data, out=Path(folder, "run"), tuning=tuning, recipe=recipe, seed=seed)
    return tuned.accuracy, time.process_time() - start


def main() -> None:
    """Print one line per model and tuning method: means over seeds, and the accuracy of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", default=["vit-nano"])
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--classes", nargs="*", default=[], help="names of the classes to use; all by default")
    parser.add_argument("--tunings", nargs="+", default=[name for name in TUNING_METHODS if name != "window-cls"])
    parser.add_argument("--recipes", nargs="+", default=["report", "modern"])
    parser.add_argument("--per-class", type=int, default=40)
    parser.add_argument("--tests", type=int, default=100, help="test images per class")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    datasets = [subset(args.folder, args.classes, args.per_class, args.tests, seed) for seed in range(args.seeds)]
    print(f"{'model':<16} {'tuning':<18} {'by':<14} {'accuracy':>8} {'seconds':>8}  by seed")
    for name in args.models:
        model = vs.load(name, image_size=args.image_size) if args.image_size else vs.load(name)
        for tuning in args.tunings:
            results = {}
            if tuning == "head":
                results["scikit-learn"] = [by_scikit_learn(model, data) for data in datasets]
            for recipe in args.recipes:
                results[Path(recipe).stem] = [
                    by_vitscope(model, data, tuning, recipe, seed) for seed, data in enumerate(datasets)
                ]
            for label, runs in results.items():
                accuracy, seconds = np.mean(runs, axis=0)
                each = " ".join(f"{value:.1%}" for value, _ in runs)
                line = f"{Path(name).name:<16} {tuning:<18} {label:<14} {accuracy:>8.1%} {seconds:>8.1f}  {each}"
                print(line, flush=True)


if __name__ == "__main__":
    main()
