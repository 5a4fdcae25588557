"""Measure images per second while tuning, compared with a plain PyTorch loop over the same batches.

    python benchmarks/finetuning.py [--models timm:vit_base_patch16_224 torchvision:swin_b] [--precision bfloat16]

Images are random and held in memory; models that are not bundled have random weights. Each tuning method runs with
vitscope.finetune and with the loop that a user would write: forward, cross entropy, backward, clip, AdamW. The fastest
round of each counts; the first steps are excluded.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F

import vitscope as vs
from vitscope.models.heads import reset_classifier
from vitscope.tune.data import LabeledImages
from vitscope.tune.dataset import ImageDataset
from vitscope.tune.methods import prepare

WARM_UP = 2  # steps
CLASSES = 4


def random_data(count: int, size: int) -> vs.Data:
    """Return a data set of random images, ``count`` of them for training."""
    generator = np.random.default_rng(0)
    source = generator.integers(0, 256, (count + CLASSES, size, size, 3), dtype=np.uint8)
    classes = np.arange(count + CLASSES) % CLASSES
    rows = np.arange(count + CLASSES)
    splits = [LabeledImages(source, index, classes[index]) for index in (rows[:count], rows[count:])]
    return vs.Data("random", tuple(f"class {i}" for i in range(CLASSES)), *splits)


def with_vitscope(model: vs.VisionModel, data: vs.Data, tuning: str, recipe: vs.Recipe) -> float:
    """Return vitscope's seconds per step."""
    ticks: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        vs.finetune(
            model,
            data,
            out=Path(folder) / "run",
            tuning=tuning,
            recipe=recipe,
            save_steps=10**6,
            progress=lambda step: None if "accuracy" in step.metrics else ticks.append(time.perf_counter()),
        )
    return median(np.diff(ticks)[WARM_UP:])


def by_hand(model: vs.VisionModel, data: vs.Data, tuning: str, recipe: vs.Recipe, device: torch.device) -> float:
    """Return the seconds per step of a plain loop."""
    classifier = reset_classifier(model, data.labels)
    prepare(classifier, tuning)
    module = classifier.module.to(device).train(tuning != "head")
    dataset = ImageDataset(data.train, classifier.preprocessing, augmentations=recipe.augment)
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4)
    dtype = getattr(torch, recipe.precision)
    ticks = []
    for start in range(0, len(data.train), recipe.batch_size):
        batch = dataset.__getitems__(list(range(start, start + recipe.batch_size)))
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            logits = classifier.forward(batch["pixel_values"].to(device))
        loss = F.cross_entropy(logits.float(), batch["labels"].to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        ticks.append(time.perf_counter())
    return median(np.diff(ticks)[WARM_UP:])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit-nano", "swin-nano", "timm:vit_small_patch16_224"])
    parser.add_argument("--tunings", nargs="+", default=["head", "lora", "full"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="float32")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Without an augmentation, tuning a head would run the frozen backbone once and not in every step.
    recipe = vs.Recipe(epochs=1, batch_size=args.batch_size, precision=args.precision, augment=("mirror",))
    print(f"{'model':34} {'tuning':8} {'by hand':>12} {'vitscope':>12} {'ratio':>6}   images per second")
    for name in args.models:
        model = vs.load(name, pretrained=":" not in name)
        data = random_data(args.batch_size * (args.steps + WARM_UP + 1), model.preprocessing.size[0])
        for tuning in args.tunings:
            rounds = [
                (by_hand(model, data, tuning, recipe, device), with_vitscope(model, data, tuning, recipe))
                for _ in range(args.rounds)
            ]
            rates = [args.batch_size / min(seconds) for seconds in zip(*rounds, strict=True)]
            print(f"{name:34} {tuning:8} {rates[0]:12.1f} {rates[1]:12.1f} {rates[1] / rates[0]:6.2f}", flush=True)


if __name__ == "__main__":
    main()
