"""Compare the location test by vitscope and by hand: time and peak memory, and those of the forward passes alone.

    python benchmarks/compositing.py                      # the table of docs/performance.md
    python benchmarks/compositing.py --device cuda --models vit-b --places 20

The photo is scikit-image's cat. A box around its head is pasted at every position of a grid; the hole has the mean
colour. "by hand" pastes with Pillow and evaluates one image at a time, as a notebook does; "by hand, batched" keeps all
images and evaluates them in batches. The script checks first that both give vitscope's predictions. "forward passes"
runs the model on the same number of prepared images. Times are medians of interleaved rounds; ratios are to the forward
passes of the same round. Peak memory is that of a fresh process, above its memory after a run of a few positions.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial

import numpy as np
import skimage.data
import torch
from measurement import in_fresh_process, median_ratio, peak_mebibytes, return_freed, time_rounds
from PIL import Image
from torch import Tensor

import vitscope as vs

MODELS = {"vit-nano": "vit-nano", "swin-nano": "swin-nano", "vit-b": "vit"}
METHODS = ("forward passes", "by hand", "by hand, batched", "vitscope", "vitscope, rollouts")
BATCH = 64
BOX = (105, 20, 180, 200)  # left, top, width, height


def loaded(name: str, device: str) -> vs.VisionModel:
    """Return the model of a row of the table."""
    torch.manual_seed(0)
    return vs.load(MODELS[name], pretrained=name != "vit-b", device=device)


def run_forward_passes(model: vs.VisionModel, pixels: Tensor, count: int) -> None:
    """Run the model alone on as many images as the test has."""
    with torch.no_grad(), model.running():
        for start in range(0, count, BATCH):
            model.logits(pixels[: min(BATCH, count - start)])


def with_vitscope(model: vs.VisionModel, side: int, attention: bool = False) -> np.ndarray:
    """Return vitscope's predictions (image, class) of the location test."""
    result = vs.compose(
        model,
        skimage.data.chelsea(),
        BOX,
        tests="location",
        places=side,
        fill="mean",
        feather=0,
        attention=attention,
        batch_size=BATCH,
    )
    return result.outputs[1:]


def pasted(side: int) -> list[Image.Image]:
    """Return every image of the test, pasted with Pillow alone."""
    photo = skimage.data.chelsea()
    left, top, width, height = BOX
    background, hole = photo.copy(), np.zeros(photo.shape[:2], dtype=bool)
    margin = round(0.015 * min(photo.shape[:2]))
    for row in range(photo.shape[0]):  # the hole is the box, dilated by a diamond
        beyond = max(top - row, row - (top + height - 1), 0)
        if beyond <= margin:
            hole[row, max(left - margin + beyond, 0) : left + width + margin - beyond] = True
    background[hole] = np.rint(photo[~hole].mean(0))
    cutout = Image.fromarray(photo[top : top + height, left : left + width])
    images = []
    for y in np.linspace(0, photo.shape[0] - height, side):
        for x in np.linspace(0, photo.shape[1] - width, side):
            image = Image.fromarray(background)
            image.paste(cutout, (round(x), round(y)))
            images.append(image)
    return images


def by_hand(model: vs.VisionModel, side: int, batch: int) -> np.ndarray:
    """Return the predictions (image, class) of the images that were pasted without vitscope."""
    images, predictions = pasted(side), []
    with torch.no_grad(), model.running():
        for start in range(0, len(images), batch):
            pixels, _ = model.prepare(images[start : start + batch])
            predictions.append(model.logits(pixels).softmax(-1).cpu().numpy())
    return np.concatenate(predictions)


def methods(model: vs.VisionModel, side: int) -> dict[str, Callable[[], object]]:
    """Return the call of each method."""
    pixels, _ = model.prepare(skimage.data.chelsea())
    return {
        "forward passes": partial(run_forward_passes, model, pixels.repeat(BATCH, 1, 1, 1), side * side),
        "by hand": partial(by_hand, model, side, 1),
        "by hand, batched": partial(by_hand, model, side, BATCH),
        "vitscope": partial(with_vitscope, model, side),
        "vitscope, rollouts": partial(with_vitscope, model, side, attention=True),
    }


def check_equal(model: vs.VisionModel) -> None:
    """Check that both ways give the same predictions."""
    difference = np.abs(by_hand(model, 3, 9) - with_vitscope(model, 3)).max()
    assert difference <= 1e-5, f"the predictions differ by {difference}"


def peak(name: str, method: str, side: int, device: str) -> float:
    """Return the peak memory of a method in MiB, above the memory after a run of four positions."""
    model = loaded(name, device)
    methods(model, 2)[method]()
    return_freed()
    return peak_mebibytes(methods(model, side)[method], device)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--places", type=int, help="places per side; by default 20, or 8 for vit-b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(json.dumps(peak(*arguments.peak, arguments.places, arguments.device)))
        return
    print("| model | places | method | time | over forward passes | peak memory |\n|---|---|---|---|---|---|")
    for name in arguments.models.split(","):
        side = arguments.places or (8 if name == "vit-b" else 20)
        model = loaded(name, arguments.device)
        check_equal(model)
        seconds = time_rounds(methods(model, side), arguments.device, arguments.rounds)
        for method in METHODS:
            options = ("--places", str(side), "--device", arguments.device, "--peak", name, method)
            memory = in_fresh_process(__file__, *options, large_blocks_mapped=True)
            ratio = median_ratio(seconds[method], seconds["forward passes"])
            time = statistics.median(seconds[method])
            print(
                f"| {name} | {side * side:,} | {method} | {time:.2f} s | {ratio:.2f} | {memory:,.0f} MiB |", flush=True
            )


if __name__ == "__main__":
    main()
