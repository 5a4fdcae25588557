"""Peak memory of capture plus rollout for DINOv2-L with registers at 518 px: 24 layers × 16 heads × 1,374 tokens.

    python benchmarks/memory.py

Random weights. Each way runs in a process of its own; the figure is the peak above what was resident with model and
input loaded. All attention maps in float32 would be 2,765 MiB, all queries and keys 258 MiB.
"""

import argparse
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

import vitscope as vs

WAYS = ("plain forward", "capture, then rollout", "rollout", "rollout discard", "eager, all maps")


def anonymous_mebibytes() -> float:
    """What this process holds itself; pages of libraries come and go with the system's needs and do not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise SystemExit("this benchmark reads /proc and runs on Linux only")


def peak_above_loaded(call: Callable[[], object]) -> float:
    """MiB of the peak while ``call`` runs, above what is held before it; looked at every two milliseconds."""
    before = anonymous_mebibytes()
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_mebibytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return peak - before


def child(way: str) -> None:
    torch.manual_seed(0)
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518, patch_size=14
    )
    module = transformers.Dinov2WithRegistersModel(config).eval()
    model = vs.load(module)
    pixels = torch.randn(1, 3, 518, 518)
    model.forward(torch.randn(1, 3, 28, 28))  # libraries and thread pools are nobody's

    def plain() -> None:
        with torch.no_grad():
            model.forward(pixels)

    def eager() -> None:
        module.set_attn_implementation("eager")
        with torch.no_grad():
            module(pixel_values=pixels, output_attentions=True)

    calls: dict[str, Callable[[], object]] = {
        "plain forward": plain,
        "capture, then rollout": lambda: vs.rollout(vs.capture(model, pixels)),
        "rollout": lambda: vs.rollout(model, pixels),
        "rollout discard": lambda: vs.rollout(model, pixels, discard_ratio=0.9),
        "eager, all maps": eager,
    }
    print(json.dumps(peak_above_loaded(calls[way])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    print("| way | peak above loaded | above the plain forward |")
    print("|---|---|---|")
    plain = None
    for way in WAYS:
        done = subprocess.run([sys.executable, __file__, "--child", way], check=True, capture_output=True, text=True)
        peak = float(json.loads(done.stdout.splitlines()[-1]))
        plain = peak if plain is None else plain
        print(f"| {way} | {peak:,.0f} MiB | {peak - plain:,.0f} MiB |", flush=True)


if __name__ == "__main__":
    main()
