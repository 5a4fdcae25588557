"""A run with gradients: laws of the rules at every block of every family, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.helpers.gradients import FITTING, PLAIN, UNFITTING, Case, case, named, transformers_vit
from vitscope.attention.step import AttentionStep
from vitscope.errors import UnsupportedModelError, WorkError
from vitscope.tracing.gradients import GradientCapture, GradientOptions, capture_gradients

COMPLETE = 1e-10
# A relative position bias adds a term to the law of AttnLRP, and so does a norm or a pooling query between q and k.
SIMPLE = [
    "timm-vit",
    "timm-vit-mean",
    "torchvision-vit",
    "transformers-vit",
    "transformers-deit",
    "timm-deit-distilled",
]
SIMPLE += ["transformers-dinov2-head", "transformers-clip-head", "transformers-siglip-head"]


def score_of(run: GradientCapture) -> Tensor:
    return run.output[:, 1]


def products(tensors: Any, gradients: Any) -> list[Tensor]:
    return [(t * g).detach().flatten(1).sum(1) for t, g in zip(tensors, gradients, strict=True)]


@pytest.mark.slow
@named([*PLAIN, *FITTING, *UNFITTING])
def test_libra_is_complete_at_every_block(case: Case) -> None:
    model, pixels = case.in_float64()
    with capture_gradients(model, pixels, GradientOptions(rules="libra", biases=True)) as run:
        score, streams = score_of(run), run.require_streams()
        inputs = products(streams, run.gradients(score, streams))
        terms = run.bias_terms()
        assert len(inputs) == run.trace.num_layers
        for layer, received in enumerate(inputs):
            later = [term.values.sum(1) + term.padding for term in terms if term.block >= layer]
            error = score.detach() - received - torch.stack(later).sum(0)
            assert float(error.abs().max()) <= COMPLETE * max(1.0, float(score.detach().abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm-swin", "torchvision-swin", "transformers-swin"])
def test_biases_on_padding_are_reported_apart(name: str) -> None:
    """Only windows that do not fit the grid hold padding; its queries are cut off but its keys and values are not."""
    parts = {}
    for kind in ("fitting", "padded"):
        model, pixels = case(f"{name}-{kind}").in_float64()
        with capture_gradients(model, pixels, GradientOptions(rules="libra", biases=True)) as run:
            run.gradients(score_of(run), run.streams)
            parts[kind] = max(float(term.padding.abs().max()) for term in run.bias_terms())
            grids = {run.grid(layer) for layer in range(run.trace.num_layers)}
            assert {term.grid for term in run.bias_terms() if term.grid is not None} <= grids
    assert parts["fitting"] == 0
    assert parts["padded"] > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", SIMPLE)
def test_the_gap_of_attn_lrp_is_what_softmaxes_keep(name: str) -> None:
    model, pixels = case(name).in_float64()
    gap: list[Tensor] = []

    def collect(step: AttentionStep, rows: slice, weights: Tensor, gradient: Tensor) -> None:
        assert step.num_heads == weights.shape[2]
        assert weights.shape[3] == len(range(*rows.indices(10**6)))
        to_scores = weights * (gradient - (weights * gradient).sum(-1, keepdim=True))
        gap.append((weights * gradient - weights.log() * to_scores).flatten(1).sum(1))

    with capture_gradients(model, pixels, GradientOptions(rules="attn_lrp", biases=True)) as run:
        score, start = score_of(run), run.start
        (received,) = products([start], run.gradients(score, [start], collect))
        biases = torch.stack([term.values.sum(1) + term.padding for term in run.bias_terms()]).sum(0)
        kept = torch.stack(gap).sum(0)
        error = score.detach() - received - biases - kept
        assert float(error.abs().max()) <= COMPLETE
        assert float(kept.abs().max()) > 1e-3


def test_gradients_arrive_from_the_last_block_to_the_first_and_equal_finite_differences() -> None:
    model, pixels = transformers_vit()
    layers: list[int] = []
    with capture_gradients(model, pixels) as run:
        (gradient,) = run.gradients(score_of(run), [run.start], lambda step, *_: layers.append(step.layer))
        start, before = run.start.detach(), score_of(run).detach()
    assert layers == [2, 1, 0]
    direction = torch.randn(start.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = GradientOptions(start=lambda stream: stream + 1e-6 * direction)
    with capture_gradients(model, pixels, moved) as run:
        slope = (score_of(run).detach() - before) / 1e-6
    torch.testing.assert_close((gradient * direction).sum((1, 2)), slope, rtol=1e-4, atol=1e-6)


def test_the_output_is_that_of_a_plain_run_and_streams_are_inputs_of_blocks() -> None:
    for name in ("timm-vit", "timm-swin-padded", "transformers-dinov2-registers"):
        model, pixels = case(name).in_float64()
        with torch.no_grad(), model.running():
            expected = model.logits(pixels)
        for rules in ("plain", "libra", "attn_lrp"):
            with capture_gradients(model, pixels, GradientOptions(rules=rules, gamma=0.1, biases=True)) as run:  # type: ignore[arg-type]
                torch.testing.assert_close(run.output.detach(), expected, rtol=1e-12, atol=1e-12)
                assert run.start is run.streams[0]
                assert [len(run.tokens(stream, layer)) for layer, stream in enumerate(run.streams)] == [2] * len(
                    run.streams
                )


def test_separate_blocks_have_no_gradient_in_earlier_ones() -> None:
    model, pixels = transformers_vit()
    with capture_gradients(model, pixels, GradientOptions(separate_blocks=True)) as run:
        run.gradients(score_of(run), [run.streams[-1]])
    with (
        capture_gradients(model, pixels, GradientOptions(separate_blocks=True)) as again,
        pytest.raises(UnsupportedModelError, match=r"a module detaches its activations"),
    ):
        again.gradients(score_of(again), again.streams)


class Detaching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


class Spoiling(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, *gradients: Any) -> Any:
        return gradients[0] * float("nan")


class Spoiled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = Spoiling.apply(x)
        return result


def test_a_module_that_detaches_is_refused() -> None:
    for place in ("norm", "head"):
        model, pixels = case("timm-vit").in_float64()
        setattr(model.module, place, Detaching() if place == "norm" else nn.Sequential(model.module.head, Detaching()))
        with pytest.raises(UnsupportedModelError, match="the graph ends in"):
            vs.input_x_gradient(vs.load(model.module, output="logits"), pixels, target=1)


def test_a_gradient_of_nan_names_its_block() -> None:
    model, pixels = case("timm-vit").in_float64()
    blocks: Any = model.module.blocks  # type: ignore[union-attr]
    blocks[1].norm1 = nn.Sequential(blocks[1].norm1, Spoiled())
    with (
        capture_gradients(model, pixels) as run,
        pytest.raises(WorkError, match="infinite, first at the input of block 1: run"),
    ):
        run.gradients(score_of(run), run.streams)


def test_weights_without_gradients_are_refused() -> None:
    with torch.inference_mode():
        module = case("timm-vit").model().module
    for method in (vs.input_x_gradient, vs.generic_attention):
        with pytest.raises(UnsupportedModelError, match=r"created under torch\.inference_mode"):
            method(vs.load(module), case("timm-vit").pixels, target=1)
    model, pixels = case("timm-vit").model(), case("timm-vit").pixels
    model.module.extra = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"its weights are integers \(extra is torch.int8\)"):
        vs.libra(model, pixels, target=1)


def test_packed_quantised_weights_are_refused() -> None:
    """The modules of torch.ao.nn.quantized hold their weights in ``_packed_params`` and have no parameters."""
    model, pixels = transformers_vit()
    path, linear = next((path, m) for path, m in model.module.named_modules() if isinstance(m, nn.Linear))
    linear.add_module("_packed_params", nn.Module())
    with pytest.raises(UnsupportedModelError, match=rf"the weights of {path} are quantised"):
        vs.generic_attention(model, pixels, target=1)
