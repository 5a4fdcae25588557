"""Compare rollouts of ViT-B/16 (random weights): a plain forward pass, vitscope, and the usual eager attention.

    python benchmarks/rollout.py                      # the table of docs/performance.md
    python benchmarks/rollout.py --device cuda --dtype bfloat16

"eager" is a forward pass that returns every attention map, followed by the product of the matrices (A + I, rows
normalised). With discard, ``topk`` sets the lowest 90 % of each fused map to zero, as the widely copied code does.
Times are medians of interleaved rounds; ratios are to the plain forward pass of the same round. Peak memory is that of
a fresh process, above its memory after loading model and input.
"""

import argparse
import json
import statistics
from collections.abc import Callable

import torch
from measurement import in_fresh_process, median_ratio, peak_mebibytes, time_rounds
from torch import Tensor

import vitscope as vs

SIZES = {"197": (1, 224), "197x8": (8, 224), "577": (1, 384), "1370": (1, 592), "2705": (1, 832)}
METHODS = ("plain", "vitscope", "vitscope discard", "eager", "eager discard")


def eager_rollout(module: torch.nn.Module, pixels: Tensor, discard: float) -> Tensor:
    """Return the rollout as a product of all maps: correct for batches, otherwise as commonly written."""
    module.set_attn_implementation("eager")
    with torch.no_grad():
        maps = module(pixel_values=pixels, output_attentions=True, interpolate_pos_encoding=True).attentions
        product = None
        for layer in maps:
            fused = layer.float().mean(1)
            if discard:
                flat = fused.flatten(1)
                lowest = flat.topk(int(flat.shape[1] * discard), largest=False).indices
                flat.scatter_(1, lowest, 0)
            step = fused + torch.eye(fused.shape[-1], device=fused.device)
            step = step / step.sum(-1, keepdim=True)
            product = step if product is None else step @ product
    module.set_attn_implementation("sdpa")
    assert product is not None
    return product[:, 0, 1:]


def methods(model: vs.VisionModel, pixels: Tensor) -> dict[str, Callable[[], object]]:
    """Return the call of each method."""

    def plain() -> None:
        with torch.no_grad():
            model.forward(pixels)

    return {
        "plain": plain,
        "vitscope": lambda: vs.rollout(model, pixels),
        "vitscope discard": lambda: vs.rollout(model, pixels, discard_ratio=0.9),
        "eager": lambda: eager_rollout(model.module, pixels, 0.0),
        "eager discard": lambda: eager_rollout(model.module, pixels, 0.9),
    }


def prepare(size: str, device: str, dtype: str) -> dict[str, Callable[[], object]]:
    """Return the call of each method for a new model and input."""
    batch, pixels = SIZES[size]
    torch.manual_seed(0)
    model = vs.load("vit", pretrained=False, device=device, dtype=dtype, image_size=pixels)
    return methods(model, torch.randn(batch, 3, pixels, pixels, device=device, dtype=model.dtype))


def child(size: str, method: str, device: str, dtype: str) -> None:
    """Print the peak memory of a method in MiB."""
    call = prepare(size, device, dtype)[method]
    if device == "cpu":
        prepare("197", device, dtype)["plain"]()  # so that libraries and thread pools are not attributed to a method
    print(json.dumps(peak_mebibytes(call, device)))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--child", nargs=2, metavar=("SIZE", "METHOD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child, args.device, args.dtype)
        return
    print("| tokens | method | time | over plain | peak memory |")
    print("|---|---|---|---|---|")
    settings = ("--device", args.device, "--dtype", args.dtype)
    for size in args.sizes:
        seconds = time_rounds(prepare(size, args.device, args.dtype), args.device, args.rounds)
        for method in METHODS:
            ratio = median_ratio(seconds[method], seconds["plain"])
            peak = None if args.no_memory else in_fresh_process(__file__, "--child", size, method, *settings)
            memory = "" if peak is None else f"{peak:,.0f} MiB"
            milliseconds = statistics.median(seconds[method]) * 1000
            print(f"| {size} | {method} | {milliseconds:,.0f} ms | {ratio:.2f} | {memory} |", flush=True)


if __name__ == "__main__":
    main()
