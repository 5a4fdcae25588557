"""Compare rollouts of Swin-T (random weights) of three libraries: a plain forward pass, vitscope, dense matrices.

    python benchmarks/swin.py                         # the table of docs/performance.md
    python benchmarks/swin.py --device cuda --dtype bfloat16

"dense" is the rollout without the fold. The windows of a block form one matrix A over all of its tokens, averaged over
heads; A + I has normalised rows; merging is a matrix of quarters. The product runs from the last block to the first, so
it has only 49 rows. One block is dense at a time: at 896 px a single head would need 9 GiB. The script checks first
that it agrees with vitscope's rollout to a relative error of 1e-4.

Noise is added to all weights: with the library's initialisation, attention is so uniform that any grouping of tokens
would agree. Times are medians of interleaved rounds; ratios are to the plain forward pass of the same round. Peak
memory is that of a fresh process, above its memory after a plain forward pass; large blocks are kept off malloc's heap.
"""

import argparse
import json
import statistics
from collections.abc import Callable

import torch
from measurement import in_fresh_process, median_ratio, peak_mebibytes, return_freed, time_rounds
from torch import Tensor

import vitscope as vs

LIBRARIES = {
    "transformers": "swin",
    "timm": "timm:swin_tiny_patch4_window7_224",
    "torchvision": "torchvision:swin_t",
}
INPUTS = {"224x8": (8, 224), "224": (1, 224), "896": (1, 896)}
DENSE_INPUT = "224"
NOISE = 0.1


def dense_rollout(trace: vs.Trace) -> Tensor:
    """Return the rollout (batch, token) as a product of matrices over all tokens of each block."""
    product = None
    for layer in reversed(range(trace.num_layers)):
        grid = trace.step(layer).require_grid()
        if product is not None and product.shape[-1] != grid.num_tokens:
            product = product @ dense_merging(grid, product.device)
        step = dense_step(trace, layer)
        product = step if product is None else product @ step
    assert product is not None
    return product.mean(1)  # the classifier reads the mean of the last tokens


def dense_step(trace: vs.Trace, layer: int) -> Tensor:
    """Return A + I of a block with normalised rows, (batch, token, token)."""
    fused = trace.attention(layer).mean(1)
    step = fused + torch.eye(fused.shape[-1], device=fused.device)
    return step / step.sum(-1, keepdim=True)


def dense_merging(grid: vs.Grid, device: torch.device) -> Tensor:
    """Return the matrix (coarse, fine) of merging: a coarse token is a quarter of each of its four fine tokens."""
    rows, columns = (torch.eye(side // 2, device=device) / 2 for side in (grid.height, grid.width))
    return torch.kron(rows.repeat_interleave(2, dim=1), columns.repeat_interleave(2, dim=1))


def check_dense(model: vs.VisionModel, pixels: Tensor) -> None:
    """Check that vitscope's rollout agrees with the dense one."""
    trace = vs.capture(model, pixels)
    dense = dense_rollout(trace)
    assert dense.std() > 0.1 * dense.mean(), "attention is too even for an agreement to mean anything"
    torch.testing.assert_close(vs.rollout(trace).values.flatten(1), dense, rtol=1e-4, atol=0)
    if model.dtype == torch.float32:  # in other dtypes a separate run rounds differently
        torch.testing.assert_close(vs.rollout(model, pixels).values.flatten(1), dense, rtol=1e-4, atol=0)


def prepare(library: str, size: str, device: str, dtype: str) -> tuple[vs.VisionModel, Tensor]:
    """Return the model, with noise added to its weights, and the input."""
    batch, side = INPUTS[size]
    torch.manual_seed(0)
    model = vs.load(LIBRARIES[library], pretrained=False, device=device, dtype=dtype, image_size=side)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=NOISE)
    return model, torch.randn(batch, 3, side, side, device=device, dtype=model.dtype)


def methods(model: vs.VisionModel, pixels: Tensor, size: str) -> dict[str, Callable[[], object]]:
    """Return the call of each method."""

    def plain() -> None:
        with torch.no_grad():
            model.forward(pixels)

    calls: dict[str, Callable[[], object]] = {
        "plain": plain,
        "rollout": lambda: vs.rollout(model, pixels),
        "capture, then rollout": lambda: vs.rollout(vs.capture(model, pixels)),
        "rollout norm": lambda: vs.rollout(model, pixels, merge="norm"),
        "rollout discard": lambda: vs.rollout(model, pixels, discard_ratio=0.9),
    }
    if size == DENSE_INPUT:
        calls["dense"] = lambda: dense_rollout(vs.capture(model, pixels))
    return calls


def child(library: str, size: str, method: str, device: str, dtype: str) -> None:
    """Print the peak memory of a method in MiB."""
    calls = methods(*prepare(library, size, device, dtype), size)
    calls["plain"]()  # so that libraries and thread pools are not attributed to a method
    if device == "cpu":
        return_freed()
    print(json.dumps(peak_mebibytes(calls[method], device)))


def print_rows(library: str, size: str, args: argparse.Namespace) -> None:
    """Print the rows of a library and input."""
    model, pixels = prepare(library, size, args.device, args.dtype)
    if size == DENSE_INPUT:
        check_dense(model, pixels)
    seconds = time_rounds(methods(model, pixels, size), args.device, args.rounds)
    plain = None
    for method, times in seconds.items():
        cells = [library, size, method, f"{statistics.median(times) * 1000:,.0f} ms"]
        cells.append(f"{median_ratio(times, seconds['plain']):.2f}")
        if args.no_memory:
            cells += ["", ""]
        else:
            settings = ("--device", args.device, "--dtype", args.dtype)
            peak = in_fresh_process(__file__, "--child", library, size, method, *settings, large_blocks_mapped=True)
            plain = peak if plain is None else plain
            cells += [f"{peak:,.0f} MiB", f"{peak / plain:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--inputs", nargs="+", choices=INPUTS, default=list(INPUTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--child", nargs=3, metavar=("LIBRARY", "INPUT", "METHOD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child, args.device, args.dtype)
        return
    print("| library | input | method | time | over plain | peak memory | over plain's peak |")
    print("|---|---|---|---|---|---|---|")
    for library in args.libraries:
        for size in args.inputs:
            print_rows(library, size, args)


if __name__ == "__main__":
    main()
