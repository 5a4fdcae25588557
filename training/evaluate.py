"""Measure a model's accuracy on CIFAR-10's 10,000 test images, with vitscope's preprocessing.

python training/evaluate.py --model swin-nano
"""

import argparse

import torch

import vitscope as vs


def main() -> None:
    """Print the accuracy per class and over all images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit-nano")
    args = parser.parse_args()
    data = vs.load_data("cifar10")
    test_images, labels = data.test, torch.from_numpy(data.test.classes)
    model = vs.load(args.model)
    correct = torch.zeros(len(data.labels))
    for start in range(0, len(test_images), 500):
        images = [test_images.read(index) for index in range(start, start + 500)]
        for (best,), label in zip(model.predict(images, top_k=1), labels[start : start + 500], strict=True):
            correct[label] += best.index == int(label)
    for name, count, total in zip(data.labels, correct.tolist(), labels.bincount().tolist(), strict=True):
        print(f"{name:12} {count / total:.1%}")
    print(f"{'all':12} {correct.sum() / len(labels):.2%}")


if __name__ == "__main__":
    main()
