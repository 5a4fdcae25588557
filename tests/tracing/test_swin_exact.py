"""Proof: attention on the token grid reproduces the attention output of each Swin block."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitscope as vs
from tests.helpers import swin_families
from tests.helpers.swin_families import MAXVIT, MAXVIT_SIZES, Parts, SwinFamily, each_size, family, perturbed, pixels
from vitscope.attention.trace import AttentionStep
from vitscope.attention.windows import Windows

Record = dict[str, tuple[Tensor, Tensor]]  # for each block: its input and its attention output, (batch, token, channel)


@contextmanager
def recording(blocks: dict[str, tuple[nn.Module, Parts]]) -> Iterator[Record]:
    """Record the input and the attention output of each block in the library's own run."""
    inputs: dict[str, Tensor] = {}
    record: Record = {}

    def enter(name: str, _: nn.Module, args: Any) -> None:
        inputs[name] = args[0].flatten(1, -2)

    def compute(name: str, adds: bool, _: nn.Module, args: Any) -> None:
        tokens = inputs[name]
        result = args[0].reshape(tokens.shape)
        record[name] = tokens, result - tokens if adds else result

    handles = []
    for name, (block, projections) in blocks.items():
        handles.append(block.register_forward_pre_hook(partial(enter, name)))
        handles.append(projections.result.register_forward_pre_hook(partial(compute, name, projections.adds)))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def run_alone(family: SwinFamily, module: nn.Module, x: Tensor) -> Record:
    """Record a run without vitscope, on a copy, because some libraries modify a module while it runs."""
    copy = deepcopy(module)
    with recording({name: (block, family.parts(block)) for name, block in family.blocks(copy).items()}) as record:
        copy(x)
    return record


def output(step: AttentionStep, projections: Parts, x: Tensor) -> Tensor:
    """Return proj(A V + padding), with A and the share of padding taken from the step alone."""
    tokens = x if projections.norm is None else projections.norm(x)
    values = F.linear(tokens, projections.weight, projections.bias)
    values = values.unflatten(-1, (projections.heads, -1)).transpose(1, 2)
    padding = projections.bias.view(projections.heads, 1, -1)  # padding is zero, so its value is the bias
    mixed = step.attention() @ values + step.padding_share()[..., None] * padding
    return projections.out(mixed.transpose(1, 2).flatten(2))


def error(step: AttentionStep, projections: Parts, recorded: tuple[Tensor, Tensor]) -> float:
    """Return the largest deviation of the output from the recorded one."""
    x, expected = recorded
    return float((output(step, projections, x) - expected).abs().max())


def recorded_steps(
    family: SwinFamily, size: tuple[int, int], batch: int = 2
) -> tuple[vs.VisionModel, list[tuple[AttentionStep, Parts, tuple[Tensor, Tensor]]]]:
    """Return a model, and for each block its step, its projections and its recorded input and output."""
    model, x = family.model(size), pixels(size, batch)
    record = run_alone(family, model.module, x)
    trace = vs.capture(model, x)
    assert [step.module for step in trace.blocks] == [f"{name}.{family.attention}" for name in record]
    projections = [family.parts(block) for block in family.blocks(model.module).values()]
    return model, list(zip(trace.blocks, projections, record.values(), strict=True))


@pytest.fixture(autouse=True)
def _no_graph() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.slow
@each_size
def test_attention_on_the_grid_reproduces_the_output_of_each_block(family: SwinFamily, kind: str) -> None:
    size = family.sizes[kind]
    grid = family.grid(size)
    _, checked = recorded_steps(family, size)
    assert len(checked) == 6
    for i, (step, projections, recorded) in enumerate(checked):
        scale = 2 ** (i // 2)
        assert step.grid == vs.Grid(math.ceil(grid.height / scale), math.ceil(grid.width / scale))
        assert recorded[1].std() > 0.05  # attention is not trivial
        torch.testing.assert_close(output(step, projections, recorded[0]), recorded[1], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@each_size
def test_attention_to_tokens_and_padding_sums_to_one(family: SwinFamily, kind: str) -> None:
    size = family.sizes[kind]
    for step in vs.capture(family.model(size), pixels(size)).blocks:
        attention, padding = step.attention(), step.padding_share()
        assert attention.min() >= 0
        assert padding.min() >= 0
        torch.testing.assert_close(attention.sum(-1) + padding, torch.ones_like(padding), atol=1e-5, rtol=0)
        padded = bool((step.slots < 0).any())
        assert padded or not bool(padding.any())
        if padded and step.layer % 2 == 0:  # a shifted block may mask all of its padding
            assert padding.max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("size", MAXVIT_SIZES.values(), ids=str)
def test_attention_on_the_grid_reproduces_the_output_of_each_maxvit_block(size: tuple[int, int]) -> None:
    _, checked = recorded_steps(MAXVIT, size)
    assert len(checked) == 8
    for step, projections, recorded in checked:
        assert recorded[1].std() > 0.05
        torch.testing.assert_close(output(step, projections, recorded[0]), recorded[1], atol=1e-5, rtol=1e-5)


def windows_of(model: vs.VisionModel, step: AttentionStep) -> Windows:
    return model.layout.hierarchy.blocks[step.module].windows(step.grid)


def errors_of_wrong_windows(wrong: Callable[[Windows], Windows], family: SwinFamily, kind: str) -> list[float]:
    """Return the error of each block whose windows differ from the wrong ones."""
    model, checked = recorded_steps(family, family.sizes[kind])
    errors = []
    for step, projections, recorded in checked:
        windows = windows_of(model, step)
        slots, wrong_slots = windows.slots(step.grid), wrong(windows).slots(step.grid)
        assert torch.equal(slots, step.slots)
        if not torch.equal(slots, wrong_slots):
            errors.append(error(replace(step, slots=wrong_slots), projections, recorded))
            assert error(step, projections, recorded) < 1e-5
    return errors


SQUARE = [f for f in swin_families.ALL if "padded" in f.kinds]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fitting", "padded"])
@pytest.mark.parametrize("family", SQUARE, ids=lambda family: family.name)
def test_the_proof_fails_without_the_shift(family: SwinFamily, kind: str) -> None:
    errors = errors_of_wrong_windows(lambda windows: replace(windows, shift=(0, 0)), family, kind)
    assert len(errors) >= 2
    assert min(errors) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("family", SQUARE, ids=lambda family: family.name)
def test_the_proof_fails_if_rolling_and_padding_are_swapped(family: SwinFamily) -> None:
    errors = errors_of_wrong_windows(
        lambda windows: replace(windows, roll_first=not windows.roll_first), family, "padded"
    )
    assert len(errors) >= 2
    assert min(errors) > 1e-2


def test_the_proof_fails_if_dilated_windows_of_maxvit_are_taken_for_plain_windows() -> None:
    model, checked = recorded_steps(MAXVIT, MAXVIT_SIZES["rectangular"])
    for step, projections, recorded in checked:
        windows = windows_of(model, step)
        assert windows.dilated == ("grid" in step.module)
        swapped = replace(step, slots=replace(windows, dilated=not windows.dilated).slots(step.grid))
        covers_grid = windows.size == (step.grid.height, step.grid.width)
        deviation = error(swapped, projections, recorded)
        assert (deviation < 1e-5) if covers_grid else (deviation > 1e-2)


def test_the_number_of_tokens_in_each_window_of_a_padded_grid() -> None:
    """An 8×8 grid in windows of 7, shifted by 3: the libraries roll and pad in a different order."""
    counts = {}
    for roll_first in (False, True):
        slots = Windows((7, 7), (3, 3), roll_first).slots(vs.Grid(8, 8))
        counts[roll_first] = (slots >= 0).sum(1).tolist()
        assert slots[slots >= 0].sort().values.tolist() == list(range(64))
    assert counts == {False: [25, 15, 15, 9], True: [49, 7, 7, 1]}


def hf_tiny(version: str) -> nn.Module:
    import transformers

    return getattr(transformers, f"{version}ForImageClassification")(getattr(transformers, f"{version}Config")())


def timm_tiny(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, img_size=224)


def torchvision_tiny(name: str) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None)


FULL_SIZE = {
    "transformers-swin": partial(hf_tiny, "Swin"),
    "transformers-swinv2": partial(hf_tiny, "Swinv2"),
    "timm-swin": partial(timm_tiny, "swin_tiny_patch4_window7_224"),
    "timm-swinv2": partial(timm_tiny, "swinv2_tiny_window8_256"),
    "torchvision-swin": partial(torchvision_tiny, "swin_t"),
    "torchvision-swinv2": partial(torchvision_tiny, "swin_v2_t"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_architectures_at_224_pixels(name: str) -> None:
    tiny = family(name)
    torch.manual_seed(0)
    model, x = vs.load(perturbed(FULL_SIZE[name](), scale=0.03)), pixels((224, 224), 1)
    record = run_alone(tiny, model.module, x)
    trace = vs.capture(model, x)
    assert len(trace.blocks) == 12
    for step, block, recorded in zip(trace.blocks, tiny.blocks(model.module).values(), record.values(), strict=True):
        scale = float(recorded[1].abs().max())
        assert error(step, tiny.parts(block), recorded) < 1e-5 * max(scale, 1)
