"""LibraGrad: its maps equal an explicit forward pass, and everything sums to the output."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import vitscope as vs
from tests.helpers.gradients import (
    FITTING,
    PLAIN,
    UNFITTING,
    Case,
    assert_equal,
    case,
    named,
    target_of,
    transformers_vit,
)
from tests.reference import gradients as reference
from tests.reference.explicit_functions import explicit_functions
from vitscope.errors import CallError, UnsupportedModelError

VARIANTS = ("full_grad_plus", "full_grad", "grad_cam_plus", "input_x_gradient")


def score(logits: Tensor) -> Tensor:
    return logits[:, 1]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["timm-vit", "timm-vit-mean", "transformers"])
def test_every_variant_equals_an_explicit_forward_pass(family: str, variant: Any) -> None:
    model, pixels = transformers_vit() if family == "transformers" else case(family).in_float64()
    weights = (reference.from_transformers if family == "transformers" else reference.from_timm)(model.module)
    run = reference.run(weights, pixels, "libra")
    tokens = reference.libra_map(run, score, variant)
    result = vs.libra(model, pixels, target=1, variant=variant)
    assert_equal(result.values.flatten(1), tokens[:, 1:])
    for image, completeness in enumerate(result.provenance["completeness"]):
        assert completeness["output"] == pytest.approx(float(run.logits.detach()[image, 1]), rel=1e-9)
        assert completeness["prefix"] == pytest.approx(float(tokens[image, 0]), rel=1e-9)
        if variant != "input_x_gradient":
            assert abs(completeness["error"]) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fitting", "padded", "odd"])
def test_the_inputs_of_window_blocks_are_carried_to_the_finest_grid(kind: str) -> None:
    model, pixels = case(f"timm-swin-{kind}").in_float64()
    streams: list[Tensor] = []
    blocks = [block for stage in model.module.layers for block in stage.blocks]  # type: ignore[union-attr]
    handles = [block.register_forward_pre_hook(lambda _, args: streams.append(args[0])) for block in blocks]
    with explicit_functions(model.module, "libra"):
        gradients = torch.autograd.grad(score(model.module(pixels.requires_grad_())).sum(), streams)
    for handle in handles:
        handle.remove()
    height, width = streams[0].shape[1:3]
    total = torch.zeros(2, height, width, dtype=torch.float64)
    for stream, gradient in zip(streams, gradients, strict=True):
        values = (stream * gradient.mean((1, 2), keepdim=True)).sum(-1).detach()
        while values.shape[1:] != (height, width):  # a quarter to each of four tokens; padding keeps its own
            finer = next(s.shape[1:3] for s in reversed(streams) if s.shape[1] > values.shape[1])
            values = (values / 4).repeat_interleave(2, 1).repeat_interleave(2, 2)[:, : finer[0], : finer[1]]
        total += values
    assert_equal(vs.libra(model, pixels.detach(), target=1, variant="grad_cam_plus").values, total)


@pytest.mark.slow
@named([*PLAIN, *FITTING, *UNFITTING])
def test_all_parts_of_the_map_sum_to_the_output(case: Case) -> None:
    model, pixels = case.in_float64()
    result = vs.libra(model, pixels, target=target_of(model), variant="full_grad")
    for image, completeness in enumerate(result.provenance["completeness"]):
        parts = float(result.values[image].double().sum()) + completeness["prefix"] + completeness["unplaced"]
        assert parts == pytest.approx(completeness["output"], rel=1e-4, abs=1e-4)  # values are float32
        assert abs(completeness["error"]) <= 1e-10 * max(1, abs(completeness["output"]))


@pytest.mark.parametrize("variant", ["input_x_gradient", "full_grad_plus"])
def test_the_gamma_rule_equals_an_explicit_forward_pass(variant: Any) -> None:
    model, pixels = case("timm-vit").in_float64()
    run = reference.run(reference.from_timm(model.module), pixels, "libra", gamma=0.25)
    result = vs.libra(model, pixels, target=1, variant=variant, gamma=0.25)
    assert_equal(result.values.flatten(1), reference.libra_map(run, score, variant)[:, 1:])


@pytest.mark.usefixtures("unchecked")
def test_options_out_of_range() -> None:
    model, pixels = transformers_vit()
    for options, text in (
        ({"variant": "ig"}, "variant is 'ig': choose full_grad_plus"),
        ({"at": "tokens"}, "at is 'tokens'"),
        ({"at": "pixels"}, "variant='full_grad_plus' has no map of pixels"),
        ({"gamma": -1}, "gamma is -1"),
        ({"conv_gamma": "x"}, "conv_gamma is 'x'"),
    ):
        with pytest.raises(CallError, match=text):
            vs.libra(model, pixels, **options)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["full_grad_plus", "full_grad", "grad_cam_plus"])
def test_unknown_paths_between_grids_are_refused(variant: Any) -> None:
    module = timm.create_model("test_maxvit", pretrained=False, num_classes=5).eval()
    pixels = torch.rand(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UnsupportedModelError, match=r"^libra is not available for this model: how its 1600 tokens "):
        vs.libra(module, pixels, target=1, variant=variant)
