"""Compare LIME by vitscope and by PyPI's lime: time and peak memory, and those of the forward passes alone.

    python benchmarks/compare_lime.py                      # the table of docs/performance.md
    python benchmarks/compare_lime.py --device cuda --samples 1000 --models vit-b

Needs ``pip install lime``. The photo is scikit-image's cat, segmented by quickshift with lime's settings; hidden
segments have their mean colour. Both use the same batch size, and the script checks first that their coefficients are
equal. "forward passes" runs the model on the same number of prepared images. The time of quickshift, which both methods
need, is printed first. Times are medians of interleaved rounds; ratios are to the forward passes of the same round.
Peak memory is that of a fresh process, above its memory after one batch, and is measured over two batches.
"""

import argparse
import contextlib
import io
import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import skimage.data
import torch
from measurement import in_fresh_process, median_ratio, peak_mebibytes, return_freed, time_rounds
from torch import Tensor

import vitscope as vs
from vitscope.perturb.segments import segment

MODELS = {"vit-nano": "vit-nano", "swin-nano": "swin-nano", "vit-b": "vit"}
METHODS = ("forward passes", "lime", "vitscope", "vitscope drop")
BATCH = 64


def loaded(name: str, device: str) -> vs.VisionModel:
    """Return the model of a row of the table."""
    torch.manual_seed(0)
    return vs.load(MODELS[name], pretrained=name != "vit-b", device=device)


def run_forward_passes(model: vs.VisionModel, pixels: Tensor, samples: int) -> None:
    """Run the model alone on as many images as there are samples."""
    with torch.no_grad(), model.running():
        for start in range(0, samples, BATCH):
            model.logits(pixels[: min(BATCH, samples - start)])


def with_lime(model: vs.VisionModel, photo: np.ndarray, samples: int) -> Any:
    """Return the explanation of the package, called as its users do."""
    from lime.lime_image import LimeImageExplainer

    def classify(images: np.ndarray) -> np.ndarray:
        pixels, _ = model.prepare(list(images))
        with torch.no_grad(), model.running():
            logits = model.logits(pixels)
        return logits.softmax(-1).cpu().numpy()

    explainer = LimeImageExplainer(random_state=0)
    with contextlib.redirect_stderr(io.StringIO()):
        return explainer.explain_instance(photo, classify, num_samples=samples, batch_size=BATCH)


def with_vitscope(model: vs.VisionModel, photo: np.ndarray, samples: int, hide: str = "mean") -> vs.SegmentAttribution:
    """Return the explanation of vitscope."""
    return vs.lime(model, photo, num_samples=samples, batch_size=BATCH, hide=hide)


def methods(model: vs.VisionModel, samples: int) -> dict[str, Callable[[], object]]:
    """Return the call of each method."""
    photo = skimage.data.chelsea()
    pixels, _ = model.prepare(photo)
    pixels = pixels.repeat(BATCH, 1, 1, 1)
    return {
        "forward passes": partial(run_forward_passes, model, pixels, samples),
        "lime": partial(with_lime, model, photo, samples),
        "vitscope": partial(with_vitscope, model, photo, samples),
        "vitscope drop": partial(with_vitscope, model, photo, samples, "drop"),
    }


def check_equal(model: vs.VisionModel) -> None:
    """Check that both explanations have the same coefficients."""
    photo, samples = skimage.data.chelsea(), 120
    theirs, ours = with_lime(model, photo, samples), with_vitscope(model, photo, samples)
    for label in theirs.top_labels:
        weights = np.zeros(len(ours.weights))
        for index, weight in theirs.local_exp[label]:
            weights[index] = weight
        difference = np.abs(weights - ours.of(model.label(label)).weights.numpy()).max()
        assert difference <= 1e-6 * np.abs(weights).max(), f"the coefficients differ by {difference}"


def segmentation() -> float:
    """Return the seconds of quickshift."""
    photo = skimage.data.chelsea()
    (image,) = vs.load("vit-nano").prepare(photo)[1]
    seconds = time_rounds({"quickshift": lambda: segment(photo, "quickshift", image, None)}, "cpu", 3)
    return statistics.median(seconds["quickshift"])


def peak(name: str, method: str, samples: int, device: str) -> float:
    """Return the peak memory of a method in MiB, above the memory after one batch."""
    model = loaded(name, device)
    methods(model, BATCH)[method]()
    return_freed()
    return peak_mebibytes(methods(model, samples)[method], device)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--samples", type=int, help="number of masks; by default 1,000, or 256 for vit-b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(json.dumps(peak(*arguments.peak, arguments.samples, arguments.device)))
        return
    print(f"quickshift alone: {segmentation():.2f} s\n")
    print("| model | samples | method | time | over forward passes | peak memory |\n|---|---|---|---|---|---|")
    for name in arguments.models.split(","):
        samples = arguments.samples or (256 if name == "vit-b" else 1000)
        model = loaded(name, arguments.device)
        check_equal(model)
        seconds = time_rounds(methods(model, samples), arguments.device, arguments.rounds)
        for method in METHODS:
            options = ("--samples", str(min(samples, 2 * BATCH)), "--device", arguments.device, "--peak", name, method)
            memory = in_fresh_process(__file__, *options, large_blocks_mapped=True)
            ratio = median_ratio(seconds[method], seconds["forward passes"])
            time = statistics.median(seconds[method])
            print(f"| {name} | {samples:,} | {method} | {time:.2f} s | {ratio:.2f} | {memory:,.0f} MiB |", flush=True)


if __name__ == "__main__":
    main()
