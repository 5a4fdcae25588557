"""hide="drop" in window transformers: hidden patches have no effect, in every family at every size."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vitscope as vs
from tests.helpers import swin_families
from tests.helpers.dropping import evaluator, image, over_pixels
from tests.helpers.swin_families import SwinFamily, each_size
from vitscope.attention.tap import AttentionCall, Tap
from vitscope.interventions.token_dropping import without_hidden
from vitscope.perturb.masked_model import cells_of
from vitscope.perturb.rendering import subjects


@cache
def windowed(name: str, kind: str) -> tuple[vs.VisionModel, Tensor, Callable[[Tensor, Tensor], Tensor], vs.Grid]:
    family = swin_families.family(name)
    size = family.sizes[kind]
    model, pixels = family.model(size), image(size)
    return model, pixels, without_hidden(model, pixels, evaluator(model)), family.grid(size)


@pytest.mark.slow
@each_size
def test_windows_with_everything_visible_change_nothing(family: SwinFamily, kind: str) -> None:
    model, pixels, without, grid = windowed(family.name, kind)
    visible = torch.ones(2, grid.num_patches, dtype=torch.bool)
    torch.testing.assert_close(without(pixels, visible), evaluator(model)(pixels).expand(2, -1), atol=1e-5, rtol=1e-5)


def some_hidden(grid: vs.Grid, seed: int = 0) -> Tensor:
    """Return rows with a hidden corner of half the sides, with some hidden patches, and with few visible ones."""
    random = torch.rand(3, grid.num_patches, generator=torch.Generator().manual_seed(seed))
    visible = random > torch.tensor([0.0, 0.4, 0.9])[:, None]
    visible[0] = True
    visible[0].view(grid.height, grid.width)[: (grid.height + 1) // 2, : (grid.width + 1) // 2] = False
    visible[:, -1] = True
    visible[:, 0] = grid.num_patches == 1
    return visible


@pytest.mark.slow
@each_size
def test_windows_do_not_depend_on_the_content_of_hidden_patches(family: SwinFamily, kind: str) -> None:
    """Hidden pixels are permuted, which keeps their mean: patch merging uses the mean where it mixes them in."""
    model, pixels, without, grid = windowed(family.name, kind)
    if grid.num_patches == 1:
        pytest.skip("one token cannot be hidden")
    original = evaluator(model)(pixels)
    for row in some_hidden(grid):
        got = without(pixels, row[None])
        hidden = ~over_pixels(row, grid, swin_families.PATCH, tuple(pixels.shape[-2:]))
        order = torch.randperm(int(hidden.sum()), generator=torch.Generator().manual_seed(2))
        permuted = pixels.clone()
        permuted[..., hidden] = pixels[..., hidden][..., order]
        torch.testing.assert_close(without(permuted, row[None]), got, atol=1e-4, rtol=1e-4)
        assert float((got - original).abs().max()) > 1e-4


@pytest.mark.slow
@each_size
def test_no_token_attends_to_a_hidden_one_unless_its_entire_window_is_hidden(family: SwinFamily, kind: str) -> None:
    model, pixels, without, grid = windowed(family.name, kind)
    steps = [step for step in vs.capture(model, pixels).steps if isinstance(step, vs.AttentionStep)]
    visible = some_hidden(grid, seed=3)
    weights: list[Tensor] = []

    def record(call: AttentionCall) -> Tensor:
        scores = call.logits
        if scores is None:
            scores = (call.query * call.scale) @ call.key.transpose(-1, -2)
            scores = scores if call.bias is None else scores + call.bias
        weights.append(scores.softmax(-1))
        return call.run()

    with Tap(model.module, record):
        without(pixels, visible)
    assert len(weights) == len(steps)
    for step, attention in zip(steps, weights, strict=True):
        tokens = visible
        side = (grid.height, grid.width)
        while side != (step.grid.height, step.grid.width):
            # A merged token is hidden if all of its parts are.
            tokens = F.max_pool2d(tokens.view(-1, 1, *side).float(), 2, ceil_mode=True).flatten(1).bool()
            side = ((side[0] + 1) // 2, (side[1] + 1) // 2)
        slots = step.slots
        windows, width = slots.shape
        seen = F.pad(tokens, (0, 1), value=False)[:, slots]  # padding is not a visible token
        empty = F.pad(tokens, (0, 1), value=True)[:, slots]
        hidden = ~empty & seen.any(-1, keepdim=True)  # (image, window, slot)
        attention = attention.reshape(len(visible), windows, -1, width, width)
        assert float((attention * hidden[:, :, None, None]).amax()) == 0
        unseen = ~seen.any(-1)
        if bool(unseen.any()):
            assert torch.isfinite(attention[unseen]).all()


@pytest.mark.parametrize("name", ["transformers-swin", "timm-swinv2", "torchvision-swin"])
def test_the_classifier_of_windows_reads_the_visible_tokens(name: str) -> None:
    """Three stages of 16, 8 and 4 tokens per side: the classifier's average leaves out completely hidden tokens."""
    model, pixels, without, grid = windowed(name, "fitting")
    visible = torch.ones(grid.height, grid.width, dtype=torch.bool)
    visible[:8, :4] = False  # the last stage's tokens (0, 0) and (1, 0)
    pooled = model.layout.hierarchy.before_pooling
    outputs: list[Tensor] = []
    handle = pooled.register_forward_hook(lambda _, __, output: outputs.append(output.detach().clone()))
    try:
        got = without(pixels, visible.view(1, -1))
    finally:
        handle.remove()
    tokens = outputs[0].reshape(16, -1)
    remaining = torch.ones(16, dtype=torch.bool)
    remaining[[0, 4]] = False
    expected = F.linear(tokens[remaining].mean(0), model.layout.hierarchy.classifier.weight)
    bias = model.layout.hierarchy.classifier.bias
    torch.testing.assert_close(got[0], expected + bias, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [family.name for family in swin_families.ALL])
def test_windows_with_nothing_visible_are_finite(name: str) -> None:
    family = swin_families.family(name)
    kind = "fitting" if "fitting" in family.sizes else "small"
    model, pixels, without, grid = windowed(name, kind)
    nothing = torch.zeros(1, grid.num_patches, dtype=torch.bool)
    got = without(pixels, nothing)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got, evaluator(model)(torch.zeros_like(pixels)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["timm-swin", "transformers-swinv2", "torchvision-swinv2"])
def test_windows_in_half_precision_run(name: str) -> None:
    family = swin_families.family(name)
    module = family.model().module.bfloat16()
    result = vs.lime(module, image((32, 32)), target=1, num_samples=40, segments=quarters(), hide="drop")
    assert torch.isfinite(result.weights).all()


def quarters() -> np.ndarray:
    rows, columns = np.arange(32) // 16, np.arange(32) // 16
    return rows[:, None] * 2 + columns


@pytest.mark.parametrize("size", swin_families.MAXVIT_SIZES.values(), ids=swin_families.MAXVIT_SIZES)
def test_a_model_that_convolves_cannot_drop_tokens(size: tuple[int, int]) -> None:
    model = swin_families.MAXVIT.model(size)
    with pytest.raises(vs.UnsupportedModelError, match="its classifier does not average the last tokens") as caught:
        vs.occlusion(model, image(size), target=0, hide="drop")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_window_transformer_is_occluded_in_tokens_of_its_last_stage() -> None:
    model, pixels, without, grid = windowed("timm-swin", "fitting")
    (subject,) = subjects(model, pixels)
    _, cells = cells_of(model, subject)
    assert (cells.height, cells.width) == (4, 4)
    result = vs.occlusion(model, pixels, target=3, hide="drop", output="logit")
    original = evaluator(model)(pixels)[0, 3]
    for row in range(4):
        for column in range(4):
            visible = torch.ones(grid.height, grid.width, dtype=torch.bool)
            visible[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = False
            drop = float(original - without(pixels, visible.view(1, -1))[0, 3])
            assert float(result.values[0, row, column]) == pytest.approx(drop, abs=1e-4)
