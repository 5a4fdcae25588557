"""Rollout of ViT-B/16 (random weights): a plain forward, vitscope, and what people do today, in one run.

    python benchmarks/rollout.py                      # the table of docs/performance.md
    python benchmarks/rollout.py --device cuda --dtype bfloat16

"Today" is the eager forward that returns every attention map, then the product of the matrices (A + I, rows
normalised); with discard, the lowest 90 % of each fused map set to zero by ``topk``, as the widely copied code does.
Times are the median of interleaved rounds, over the plain forward of the same round. Peak memory is that of a fresh
process, above what it held with model and input loaded.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from memory import peak_above_loaded
from torch import Tensor

import vitscope as vs

SIZES = {"197": (1, 224), "197x8": (8, 224), "577": (1, 384), "1370": (1, 592), "2705": (1, 832)}
WAYS = ("plain", "vitscope", "vitscope discard", "today", "today discard")


def today(module: torch.nn.Module, pixels: Tensor, discard: float) -> Tensor:
    """All maps, then the matrix product; correct for batches, otherwise as people write it."""
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


def ways(model: vs.VisionModel, pixels: Tensor) -> dict[str, Callable[[], object]]:
    def plain() -> None:
        with torch.no_grad():
            model.forward(pixels)

    return {
        "plain": plain,
        "vitscope": lambda: vs.rollout(model, pixels),
        "vitscope discard": lambda: vs.rollout(model, pixels, discard_ratio=0.9),
        "today": lambda: today(model.module, pixels, 0.0),
        "today discard": lambda: today(model.module, pixels, 0.9),
    }


def prepare(size: str, device: str, dtype: str) -> dict[str, Callable[[], object]]:
    batch, pixels = SIZES[size]
    torch.manual_seed(0)
    model = vs.load("vit", pretrained=False, device=device, dtype=dtype, image_size=pixels)
    return ways(model, torch.randn(batch, 3, pixels, pixels, device=device, dtype=model.dtype))


def timed(call: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def time_ways(size: str, device: str, dtype: str, rounds: int) -> dict[str, list[float]]:
    calls = prepare(size, device, dtype)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds + 1):
        for way in WAYS:
            seconds[way].append(timed(calls[way], device))
    return {way: values[1:] for way, values in seconds.items()}  # the first round warms up


def peak_mebibytes(size: str, way: str, device: str, dtype: str) -> float:
    """Measured in a process of its own."""
    command = [sys.executable, __file__, "--child", size, way, "--device", device, "--dtype", dtype]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def child(size: str, way: str, device: str, dtype: str) -> None:
    call = prepare(size, device, dtype)[way]
    if device == "cpu":
        prepare("197", device, dtype)["plain"]()  # libraries, thread pools and scratch space are not the method's
        print(json.dumps(peak_above_loaded(call)))
    else:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        print(json.dumps((torch.cuda.max_memory_allocated() - before) / 2**20))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--child", nargs=2, metavar=("SIZE", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child, args.device, args.dtype)
        return
    print("| tokens | way | time | over plain | peak memory |")
    print("|---|---|---|---|---|")
    for size in args.sizes:
        seconds = time_ways(size, args.device, args.dtype, args.rounds)
        for way in WAYS:
            ratio = statistics.median(mine / plain for mine, plain in zip(seconds[way], seconds["plain"], strict=True))
            memory = "" if args.no_memory else f"{peak_mebibytes(size, way, args.device, args.dtype):,.0f} MiB"
            milliseconds = statistics.median(seconds[way]) * 1000
            print(f"| {size} | {way} | {milliseconds:,.0f} ms | {ratio:.2f} | {memory} |", flush=True)


if __name__ == "__main__":
    main()
