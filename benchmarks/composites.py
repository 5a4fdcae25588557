"""The location test with vitscope and by hand: time and peak memory, beside the model's forwards alone, in one run.

    python benchmarks/composites.py                      # the table of docs/performance.md
    python benchmarks/composites.py --device cuda --models vit-b --places 20

The photo is scikit-image's cat; a box around its head is put at every place of a grid, the hole in the mean colour. "By
hand" pastes with Pillow and asks about one image at a time, as a notebook does; "by hand, batched" keeps all images
and asks in batches. Both give the answers of vitscope, which is held to that before it is measured. "Forwards" runs
the model on as many images that are ready. Times are medians of interleaved rounds, ratios are to the forwards of the
same round. Peak memory is that of a fresh process, above what it held after one run of a few places.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial

import numpy as np
import skimage.data
import torch
from measuring import in_fresh_process, median_ratio, peak_mebibytes, return_freed, time_rounds
from PIL import Image
from torch import Tensor

import vitscope as vs

MODELS = {"vit-nano": "vit-nano", "swin-nano": "swin-nano", "vit-b": "vit"}
WAYS = ("forwards", "by hand", "by hand, batched", "vitscope", "vitscope, rollouts")
BATCH = 64
BOX = (105, 20, 180, 200)  # left, top, width, height


def loaded(name: str, device: str) -> vs.VisionModel:
    torch.manual_seed(0)
    return vs.load(MODELS[name], pretrained=name != "vit-b", device=device)


def forwards(model: vs.VisionModel, pixels: Tensor, count: int) -> None:
    with torch.no_grad(), model.running():
        for start in range(0, count, BATCH):
            model.answer(pixels[: min(BATCH, count - start)])


def with_vitscope(model: vs.VisionModel, side: int, attention: bool = False) -> np.ndarray:
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
    """Every image of the test, as one makes them without a library."""
    photo = skimage.data.chelsea()
    left, top, width, height = BOX
    background, hole = photo.copy(), np.zeros(photo.shape[:2], dtype=bool)
    margin = round(0.015 * min(photo.shape[:2]))
    for row in range(photo.shape[0]):  # a diamond's reach beyond the box
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
    images, answers = pasted(side), []
    with torch.no_grad(), model.running():
        for start in range(0, len(images), batch):
            pixels, _ = model.prepare(images[start : start + batch])
            answers.append(model.answer(pixels).softmax(-1).cpu().numpy())
    return np.concatenate(answers)


def ways(model: vs.VisionModel, side: int) -> dict[str, Callable[[], object]]:
    pixels, _ = model.prepare(skimage.data.chelsea())
    return {
        "forwards": partial(forwards, model, pixels.repeat(BATCH, 1, 1, 1), side * side),
        "by hand": partial(by_hand, model, side, 1),
        "by hand, batched": partial(by_hand, model, side, BATCH),
        "vitscope": partial(with_vitscope, model, side),
        "vitscope, rollouts": partial(with_vitscope, model, side, attention=True),
    }


def check_equal(model: vs.VisionModel) -> None:
    difference = np.abs(by_hand(model, 3, 9) - with_vitscope(model, 3)).max()
    assert difference <= 1e-5, f"the answers differ by {difference}"


def peak(name: str, way: str, side: int, device: str) -> float:
    model = loaded(name, device)
    ways(model, 2)[way]()
    return_freed()
    return peak_mebibytes(ways(model, side)[way], device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--places", type=int, help="a side; by default 20, of vit-b 8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "WAY"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        print(json.dumps(peak(*given.peak, given.places, given.device)))
        return
    print("| model | places | way | time | over the forwards | peak memory |\n|---|---|---|---|---|---|")
    for name in given.models.split(","):
        side = given.places or (8 if name == "vit-b" else 20)
        model = loaded(name, given.device)
        check_equal(model)
        seconds = time_rounds(ways(model, side), given.device, given.rounds)
        for way in WAYS:
            arguments = ("--places", str(side), "--device", given.device, "--peak", name, way)
            memory = in_fresh_process(__file__, *arguments, large_blocks_mapped=True)
            ratio = median_ratio(seconds[way], seconds["forwards"])
            time = statistics.median(seconds[way])
            print(f"| {name} | {side * side:,} | {way} | {time:.2f} s | {ratio:.2f} | {memory:,.0f} MiB |", flush=True)


if __name__ == "__main__":
    main()
