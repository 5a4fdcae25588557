"""Measure the peak memory of capture and rollout for DINOv2-L with registers at 518 px.

    python benchmarks/memory.py

The model has random weights, and 24 layers × 16 heads × 1,374 tokens. Each method runs in a process of its own. Peaks
are above the memory after loading model and input. All attention maps in float32 would take 2,765 MiB; all queries and
keys take 258 MiB.
"""

import argparse
import json
from collections.abc import Callable

import torch
import transformers
from measurement import in_fresh_process, peak_above_loaded

import vitscope as vs

METHODS = ("plain forward pass", "capture, then rollout", "rollout", "rollout discard", "eager, all maps")


def child(method: str) -> None:
    """Print the peak memory of a method in MiB."""
    torch.manual_seed(0)
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518, patch_size=14
    )
    module = transformers.Dinov2WithRegistersModel(config).eval()
    model = vs.load(module)
    pixels = torch.randn(1, 3, 518, 518)
    model.forward(torch.randn(1, 3, 28, 28))  # so that libraries and thread pools are not attributed to a method

    def plain() -> None:
        with torch.no_grad():
            model.forward(pixels)

    def eager() -> None:
        module.set_attn_implementation("eager")
        with torch.no_grad():
            module(pixel_values=pixels, output_attentions=True)

    calls: dict[str, Callable[[], object]] = {
        "plain forward pass": plain,
        "capture, then rollout": lambda: vs.rollout(vs.capture(model, pixels)),
        "rollout": lambda: vs.rollout(model, pixels),
        "rollout discard": lambda: vs.rollout(model, pixels, discard_ratio=0.9),
        "eager, all maps": eager,
    }
    print(json.dumps(peak_above_loaded(calls[method])))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    print("| method | peak above loaded | above the plain forward pass |")
    print("|---|---|---|")
    plain = None
    for method in METHODS:
        peak = in_fresh_process(__file__, "--child", method)
        plain = peak if plain is None else plain
        print(f"| {method} | {peak:,.0f} MiB | {peak - plain:,.0f} MiB |", flush=True)


if __name__ == "__main__":
    main()
