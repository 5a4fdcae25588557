"""Compare the gradient methods with one forward and backward pass of the unmodified library (random weights).

    python benchmarks/gradients.py                    # the table of docs/performance.md
    python benchmarks/gradients.py --inputs vit-577 --methods input_x_gradient attn_lrp --no-memory

"forward + backward" is what a user writes: frozen weights, and the gradient of the highest logit with respect to the
input of the first block. "eager, all maps" is the usual way to the generic rule: eager attention, every map in the
graph, the gradients of all maps from one backward pass, and the product of matrices; for Swin it ends with the maps
times their gradients, because windows need more than a product. The script checks first that it agrees with
``vs.generic_attention`` to a relative error of 1e-3.

Times are medians of interleaved rounds; ratios are to "forward + backward" of the same round. On the CPU they are CPU
seconds of one thread, which other work on the machine hardly changes. Peak memory is that of a fresh process, above its
memory after one forward and backward pass; large blocks are kept off malloc's heap. If CUDA is available, the GPU in
float32 and in bfloat16 follows the CPU.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from measurement import in_fresh_process, median_ratio, peak_mebibytes, return_freed, time_rounds
from torch import Tensor, nn

import vitscope as vs
from vitscope.models.blocks import blocks

# Preset, number of images, and pixels per side.
INPUTS = {
    "vit-197x8": ("vit", 8, 224),
    "vit-577": ("vit", 1, 384),
    "vit-1370": ("vit", 1, 592),
    "swin-224x8": ("swin", 8, 224),
}
REFERENCE, EAGER = "forward + backward", "eager, all maps"
METHODS: dict[str, Callable[[vs.VisionModel, Tensor], object]] = {
    "input_x_gradient": vs.input_x_gradient,
    "libra input_x_gradient": lambda model, pixels: vs.libra(model, pixels, variant="input_x_gradient"),
    "libra full_grad": lambda model, pixels: vs.libra(model, pixels, variant="full_grad"),
    "libra full_grad_plus": lambda model, pixels: vs.libra(model, pixels, variant="full_grad_plus"),
    "libra grad_cam_plus": lambda model, pixels: vs.libra(model, pixels, variant="grad_cam_plus"),
    "attn_lrp": vs.attn_lrp,
    "generic_attention": vs.generic_attention,
    "gradient_rollout": vs.gradient_rollout,
    "le_grad": vs.le_grad,
    "token_tm": vs.token_tm,
    "grad_cam": vs.grad_cam,
    EAGER: lambda model, pixels: eager_generic(model, pixels),
}


def highest_logit(model: vs.VisionModel, pixels: Tensor, maps: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Return the sum of the highest logits, and the input of the first block, where the graph starts.

    Args:
        model: the model.
        pixels: (batch, channel, height, width).
        maps: list that receives the attention map of each block; None for none.
    """
    leaves: list[Tensor] = []

    def enter(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        leaves.append(args[0].detach().requires_grad_())
        return (leaves[0], *args[1:])

    layers = blocks(model.module)
    handles: list[torch.utils.hooks.RemovableHandle] = [layers[0].module.register_forward_pre_hook(enter)]
    if maps is not None:
        for layer in layers:
            handles.append(layer.attention.register_forward_hook(lambda _, __, output: maps.append(output[1])))
    try:
        logits = model.module(pixel_values=pixels, interpolate_pos_encoding=True).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits.amax(-1).sum(), leaves[0]


def forward_backward(model: vs.VisionModel, pixels: Tensor) -> Tensor:
    """Return the gradient of the highest logit with respect to the input of the first block."""
    (gradient,) = torch.autograd.grad(*highest_logit(model, pixels))
    return gradient


def eager_generic(model: vs.VisionModel, pixels: Tensor) -> Tensor:
    """Return the generic rule as commonly written, from all maps and their gradients; of the first block for Swin."""
    maps: list[Tensor] = []
    model.module.set_attn_implementation("eager")
    try:
        score, _ = highest_logit(model, pixels, maps)
        gradients = torch.autograd.grad(score, maps)
    finally:
        model.module.set_attn_implementation("sdpa")
    relevance = None
    with torch.no_grad():
        for weights, gradient in zip(maps, gradients, strict=True):
            fused = (weights * gradient).float().clamp_min(0).mean(1)
            if model.module.config.model_type == "swin":
                relevance = fused if relevance is None else relevance
                continue
            if relevance is None:
                relevance = torch.eye(fused.shape[-1], device=fused.device).expand_as(fused)
            relevance = relevance + fused @ relevance
    assert relevance is not None
    return relevance[:, 0, 1:]


def check_eager(model: vs.VisionModel, pixels: Tensor) -> None:
    """Check that the usual way and vitscope compute the same for a ViT in float32."""
    if model.module.config.model_type == "swin" or model.dtype != torch.float32:
        return
    expected = vs.generic_attention(model, pixels).values.flatten(1)
    torch.testing.assert_close(eager_generic(model, pixels), expected, rtol=1e-3, atol=1e-3 * float(expected.max()))


def prepare(name: str, device: str, dtype: str) -> tuple[vs.VisionModel, Tensor]:
    """Return the model, with frozen weights, and the input."""
    preset, batch, side = INPUTS[name]
    torch.manual_seed(0)
    model = vs.load(preset, pretrained=False, device=device, dtype=dtype, image_size=side)
    model.module.requires_grad_(False)
    return model, torch.randn(batch, 3, side, side, device=device, dtype=model.dtype)


def child(name: str, method: str, device: str, dtype: str) -> None:
    """Print the peak memory of a method in MiB."""
    model, pixels = prepare(name, device, dtype)
    forward_backward(model, pixels)  # so that libraries and thread pools are not attributed to a method
    call = forward_backward if method == REFERENCE else METHODS[method]
    if method not in (REFERENCE, EAGER):
        vs.capture(model, pixels[:1])  # nor what vitscope finds out about a model once
    if device == "cpu":
        return_freed()
    print(json.dumps(peak_mebibytes(lambda: call(model, pixels), device)))


def print_rows(name: str, device: str, dtype: str, args: argparse.Namespace) -> None:
    """Print the rows of an input."""
    model, pixels = prepare(name, device, dtype)
    if EAGER in args.methods:
        check_eager(model, pixels)
    calls: dict[str, Callable[[], object]] = {REFERENCE: lambda: forward_backward(model, pixels)}
    for method in args.methods:
        calls[method] = lambda call=METHODS[method]: call(model, pixels)  # type: ignore[misc]
    clock = time.process_time if device == "cpu" else time.perf_counter
    seconds = time_rounds(calls, device, args.rounds, clock)
    reference = None
    for method, times in seconds.items():
        cells = [f"{device} {dtype}", name, method, f"{statistics.median(times) * 1000:,.0f} ms"]
        cells.append(f"{median_ratio(times, seconds[REFERENCE]):.2f}")
        if args.no_memory:
            cells += ["", ""]
        else:
            peak = in_fresh_process(__file__, "--child", name, method, device, dtype, large_blocks_mapped=True)
            reference = peak if reference is None else reference
            cells += [f"{peak:,.0f} MiB", f"{peak / reference:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", nargs="+", choices=INPUTS, default=list(INPUTS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--child", nargs=4, metavar=("INPUT", "METHOD", "DEVICE", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        child(*args.child)
        return
    print("| device | input | method | time | over reference | peak memory | over its peak |")
    print("|---|---|---|---|---|---|---|")
    settings = [("cpu", "float32")]
    if torch.cuda.is_available():
        settings += [("cuda", "float32"), ("cuda", "bfloat16")]
    for device, dtype in settings:
        for name in args.inputs:
            print_rows(name, device, dtype, args)


if __name__ == "__main__":
    main()
