"""The proof: each block's attention, put on the token grid, gives what the block's own attention gave."""

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

Seen = dict[str, tuple[Tensor, Tensor]]  # a block's input and what its attention gave, (batch, token, channel)


@contextmanager
def watching(blocks: dict[str, tuple[nn.Module, Parts]]) -> Iterator[Seen]:
    """What goes into each block and what its attention makes of it, in the library's own run."""
    inputs: dict[str, Tensor] = {}
    seen: Seen = {}

    def enter(name: str, _: nn.Module, args: Any) -> None:
        inputs[name] = args[0].flatten(1, -2)

    def reach(name: str, adds: bool, _: nn.Module, args: Any) -> None:
        given = inputs[name]
        result = args[0].reshape(given.shape)
        seen[name] = given, result - given if adds else result

    handles = []
    for name, (block, parts) in blocks.items():
        handles.append(block.register_forward_pre_hook(partial(enter, name)))
        handles.append(parts.result.register_forward_pre_hook(partial(reach, name, parts.adds)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def run_alone(family: SwinFamily, module: nn.Module, x: Tensor) -> Seen:
    """A run of a copy without vitscope: some libraries alter themselves while they run."""
    copy = deepcopy(module)
    with watching({name: (block, family.parts(block)) for name, block in family.blocks(copy).items()}) as seen:
        copy(x)
    return seen


def output(step: AttentionStep, parts: Parts, x: Tensor) -> Tensor:
    """proj(G V), G from the step alone: dense on the grid, padding's share times the value of padding."""
    values = F.linear(x if parts.norm is None else parts.norm(x), parts.weight, parts.bias)
    values = values.unflatten(-1, (parts.heads, -1)).transpose(1, 2)
    padding = parts.bias.view(parts.heads, 1, -1)  # padding is zero, so its value is the bias
    mixed = step.attention() @ values + step.on_padding()[..., None] * padding
    return parts.out(mixed.transpose(1, 2).flatten(2))


def error(step: AttentionStep, parts: Parts, seen: tuple[Tensor, Tensor]) -> float:
    x, expected = seen
    return float((output(step, parts, x) - expected).abs().max())


def steps_and_parts(
    family: SwinFamily, size: tuple[int, int], batch: int = 2
) -> tuple[vs.VisionModel, list[tuple[AttentionStep, Parts, tuple[Tensor, Tensor]]]]:
    model, x = family.model(size), pixels(size, batch)
    seen = run_alone(family, model.module, x)
    trace = vs.capture(model, x)
    assert [step.module for step in trace.blocks] == [f"{name}.{family.attention}" for name in seen]
    parts = [family.parts(block) for block in family.blocks(model.module).values()]
    return model, list(zip(trace.blocks, parts, seen.values(), strict=True))


@pytest.fixture(autouse=True)
def _no_graph() -> Iterator[None]:
    with torch.no_grad():
        yield


@each_size
def test_the_operator_is_the_blocks_own_attention(family: SwinFamily, kind: str) -> None:
    size = family.sizes[kind]
    grid = family.grid(size)
    _, checked = steps_and_parts(family, size)
    assert len(checked) == 6
    for i, (step, parts, seen) in enumerate(checked):
        scale = 2 ** (i // 2)
        assert step.grid == vs.Grid(math.ceil(grid.height / scale), math.ceil(grid.width / scale))
        assert seen[1].std() > 0.05  # attention says something
        torch.testing.assert_close(output(step, parts, seen[0]), seen[1], atol=1e-5, rtol=1e-5)


@each_size
def test_attention_and_what_falls_on_padding_sum_to_one(family: SwinFamily, kind: str) -> None:
    size = family.sizes[kind]
    for step in vs.capture(family.model(size), pixels(size)).blocks:
        attention, padding = step.attention(), step.on_padding()
        assert attention.min() >= 0
        assert padding.min() >= 0
        torch.testing.assert_close(attention.sum(-1) + padding, torch.ones_like(padding), atol=1e-5, rtol=0)
        padded = bool((step.slots < 0).any())
        assert padded or not bool(padding.any())
        if padded and step.layer % 2 == 0:  # a shifted block may mask all of its padding
            assert padding.max() > 0.1


@pytest.mark.parametrize("size", MAXVIT_SIZES.values(), ids=str)
def test_maxvit_blocks_and_grids_too(size: tuple[int, int]) -> None:
    _, checked = steps_and_parts(MAXVIT, size)
    assert len(checked) == 8
    for step, parts, seen in checked:
        assert seen[1].std() > 0.05
        torch.testing.assert_close(output(step, parts, seen[0]), seen[1], atol=1e-5, rtol=1e-5)


def windows_of(model: vs.VisionModel, step: AttentionStep) -> Windows:
    return model.layout.hierarchy.blocks[step.module].windows(step.grid)


def misplaced(wrong: Callable[[Windows], Windows], family: SwinFamily, kind: str) -> list[float]:
    """The error of each block that cuts its grid differently once its windows are wrong."""
    model, checked = steps_and_parts(family, family.sizes[kind])
    errors = []
    for step, parts, seen in checked:
        windows = windows_of(model, step)
        slots, other = windows.slots(step.grid), wrong(windows).slots(step.grid)
        assert torch.equal(slots, step.slots)
        if not torch.equal(slots, other):
            errors.append(error(replace(step, slots=other), parts, seen))
            assert error(step, parts, seen) < 1e-5
    return errors


SQUARE = [f for f in swin_families.ALL if "padded" in f.kinds]


@pytest.mark.parametrize("kind", ["fitting", "padded"])
@pytest.mark.parametrize("family", SQUARE, ids=lambda family: family.name)
def test_the_proof_fails_without_the_unshift(family: SwinFamily, kind: str) -> None:
    errors = misplaced(lambda windows: replace(windows, shift=(0, 0)), family, kind)
    assert len(errors) >= 2
    assert min(errors) > 1e-2


@pytest.mark.parametrize("family", SQUARE, ids=lambda family: family.name)
def test_the_proof_fails_when_rolling_and_padding_change_places(family: SwinFamily) -> None:
    errors = misplaced(lambda windows: replace(windows, roll_first=not windows.roll_first), family, "padded")
    assert len(errors) >= 2
    assert min(errors) > 1e-2


def test_the_proof_fails_when_maxvits_grids_are_taken_for_windows() -> None:
    model, checked = steps_and_parts(MAXVIT, MAXVIT_SIZES["rectangular"])
    for step, parts, seen in checked:
        windows = windows_of(model, step)
        assert windows.dilated == ("grid" in step.module)
        swapped = replace(step, slots=replace(windows, dilated=not windows.dilated).slots(step.grid))
        whole = windows.size == (step.grid.height, step.grid.width)
        assert (error(swapped, parts, seen) < 1e-5) if whole else (error(swapped, parts, seen) > 1e-2)


def test_real_tokens_of_each_window_where_the_grid_is_no_multiple() -> None:
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


REAL = {
    "transformers-swin": partial(hf_tiny, "Swin"),
    "transformers-swinv2": partial(hf_tiny, "Swinv2"),
    "timm-swin": partial(timm_tiny, "swin_tiny_patch4_window7_224"),
    "timm-swinv2": partial(timm_tiny, "swinv2_tiny_window8_256"),
    "torchvision-swin": partial(torchvision_tiny, "swin_t"),
    "torchvision-swinv2": partial(torchvision_tiny, "swin_v2_t"),
}


@pytest.mark.parametrize("name", REAL)
def test_the_real_architecture_at_224(name: str) -> None:
    tiny = family(name)
    torch.manual_seed(0)
    model, x = vs.load(perturbed(REAL[name](), scale=0.03)), pixels((224, 224), 1)
    seen = run_alone(tiny, model.module, x)
    trace = vs.capture(model, x)
    assert len(trace.blocks) == 12
    for step, block, known in zip(trace.blocks, tiny.blocks(model.module).values(), seen.values(), strict=True):
        scale = float(known[1].abs().max())
        assert error(step, tiny.parts(block), known) < 1e-5 * max(scale, 1)
