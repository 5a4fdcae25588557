"""A bundled model's accuracy on CIFAR-10's 10,000 test pictures, through vitscope's own preprocessing.

python training/evaluate.py package --model swin-nano
"""

import argparse
from pathlib import Path

import cifar10
import torch

import vitscope as vs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder with the six PNG files")
    parser.add_argument("--model", default="vit-nano")
    args = parser.parse_args()
    _, _, pictures, labels = cifar10.load(args.data)
    model = vs.load(args.model)
    right = torch.zeros(len(cifar10.CLASSES))
    for start in range(0, len(pictures), 500):
        images = list(pictures[start : start + 500].permute(0, 2, 3, 1).numpy())
        for (best,), label in zip(model.predict(images, top_k=1), labels[start : start + 500], strict=True):
            right[label] += best.index == int(label)
    for name, count, total in zip(cifar10.CLASSES, right.tolist(), labels.bincount().tolist(), strict=True):
        print(f"{name:12} {count / total:.1%}")
    print(f"{'all':12} {right.sum() / len(labels):.2%}")


if __name__ == "__main__":
    main()
