"""Neutral positions: the order of patches no longer matters, and weights and other threads are unaffected."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.contracts.test_leaks import TroubleError, assert_same, state, together
from tests.helpers import families, swin_families
from tests.helpers.families import Family, every_family
from tests.helpers.swin_families import SwinFamily, every_swin
from tests.reference.stage import placed
from vitscope.interventions.positions import Positions, neutral_positions, positions

ROTARY = ("transformers-dinov3", "timm-dinov3")


def evaluated(model: vs.VisionModel, pixels: Tensor) -> Tensor:
    with torch.no_grad(), model.running():
        answer = model.logits(pixels)
        return model.features(pixels) if answer is None else answer


def evaluated_neutrally(model: vs.VisionModel, pixels: Tensor) -> Tensor:
    with neutral_positions(positions(model)):
        return evaluated(model, pixels)


def permuted(pixels: Tensor, patch: int, seed: int = 0) -> Tensor:
    rows, columns = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    patches = pixels.unflatten(-1, (columns, patch)).unflatten(-3, (rows, patch)).permute(0, 1, 2, 4, 3, 5)
    order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))
    shuffled = patches.flatten(2, 3)[:, :, order].unflatten(2, (rows, columns))
    return shuffled.permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3)


def family(name: str) -> Family:
    return next(family for family in families.ALL if family.name == name)


@pytest.mark.slow
@every_family
def test_without_positions_the_order_of_patches_does_not_matter(family: Family) -> None:
    model, pixels = family.model(), family.pixels()
    model_positions = positions(model)
    assert model_positions.rotary == (family.name in ROTARY)
    assert model_positions.can_be_neutral == (family.name not in ROTARY)
    assert float((evaluated(model, permuted(pixels, 8)) - evaluated(model, pixels)).abs().max()) > 2e-4
    if family.name in ROTARY:
        assert model_positions.kinds == ()
        return
    torch.testing.assert_close(
        evaluated_neutrally(model, permuted(pixels, 8)), evaluated_neutrally(model, pixels), atol=1e-5, rtol=1e-5
    )
    assert float((evaluated_neutrally(model, pixels) - evaluated(model, pixels)).abs().max()) > 1e-3
    assert "position embedding" in model_positions.kinds or "beit" in family.name
    assert ("relative bias" in model_positions.kinds) == (family.name in ("transformers-beit", "timm-beit"))


@every_family
def test_prefix_tokens_keep_their_embedding(family: Family) -> None:
    """The neutral embedding is the mean for every patch, and unchanged for every token before them."""
    model = family.model()
    prefix = len(family.prefix_names)
    for tensor, neutral in positions(model).neutral.items():
        assert tensor.shape == neutral.shape
        rows = tensor.shape[-2]
        first = rows - 24 if family.library == "timm" else rows - 16
        if tensor.ndim == 3 or "clip" in family.name or "siglip" in family.name:
            assert first in (0, 1, prefix)  # registers may have none
            before, after = tensor.detach()[..., :first, :], tensor.detach()[..., first:, :]
            assert torch.equal(neutral[..., :first, :], before)
            expected = after.double().mean(-2, keepdim=True).expand_as(after)
            torch.testing.assert_close(neutral[..., first:, :].double(), expected, atol=1e-6, rtol=0)
        else:
            expected = tensor.detach().double().mean(0, keepdim=True).expand_as(tensor)
            torch.testing.assert_close(neutral.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.slow
@every_swin
def test_biases_of_windows_are_constant(family: SwinFamily) -> None:
    """Equal tokens get equal attention: the neutral bias is one number per head."""
    size = family.sizes["fitting" if "fitting" in family.sizes else "small"]
    model, pixels = family.model(size), swin_families.pixels(size)
    model_positions = positions(model)
    assert (model_positions.can_be_neutral, model_positions.kinds) == (True, ("relative bias",))
    plain, neutral = evaluated(model, pixels), evaluated_neutrally(model, pixels)
    assert float((neutral - plain).abs().max()) > 1e-3
    assert torch.equal(evaluated(model, pixels), plain)
    blocks = list(family.blocks(model.module).values())
    # The first block's attention for tokens that are all equal: without a bias all weights are equal too.
    attention = getattr(blocks[0], family.attention)
    handle = attention.register_forward_pre_hook(lambda _, args: (torch.ones_like(args[0]), *args[1:]))
    with neutral_positions(model_positions):
        weights = vs.capture(model, pixels).attention(0)
    biased = vs.capture(model, pixels).attention(0)
    handle.remove()
    inside = weights[weights > 0]
    assert float(inside.max() - inside.min()) < 1e-6
    inside = biased[biased > 0]
    assert float(inside.max() - inside.min()) > 1e-4


@pytest.mark.slow
@every_swin
def test_windows_without_positions_leave_no_trace(family: SwinFamily) -> None:
    size = family.sizes["fitting" if "fitting" in family.sizes else "small"]
    model, pixels = family.model(size), swin_families.pixels(size)
    before = state(model.module)
    buffers = {name: buffer.clone() for name, buffer in model.module.named_buffers()}
    evaluated_neutrally(model, pixels)
    now = state(model.module)
    for aspect in ("weights", "training", "attributes", "hooks", "modes", "functions"):
        assert_same(now[aspect], before[aspect], aspect)
    assert_same(dict(model.module.named_buffers()), buffers)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["timm-vit", "transformers-clip", "transformers-beit"])
def test_weights_are_unchanged_even_after_an_exception(name: str) -> None:
    model, pixels = family(name).model(), family(name).pixels()
    model_positions, expected = positions(model), evaluated(model, pixels)
    before = state(model.module)

    def fail(*_: Any) -> None:
        raise TroubleError("in a norm")

    norms = [child for child in model.module.modules() if isinstance(child, nn.LayerNorm)]
    handle = norms[1].register_forward_pre_hook(fail)
    with pytest.raises(TroubleError), neutral_positions(model_positions):
        evaluated(model, pixels)
    handle.remove()
    assert_same(state(model.module), before)
    assert torch.equal(evaluated(model, pixels), expected)
    assert torch._C._len_torch_function_stack() == 0


def test_another_thread_is_unaffected() -> None:
    model, pixels = family("timm-vit").model(), family("timm-vit").pixels()
    plain, neutral = evaluated(model, pixels), evaluated_neutrally(model, pixels)
    inside, done = threading.Event(), threading.Event()

    def outside() -> None:
        inside.wait(60)
        torch.testing.assert_close(evaluated(model, pixels), plain, atol=1e-6, rtol=0)
        done.set()

    def holding() -> None:
        with neutral_positions(positions(model)):
            inside.set()
            done.wait(60)
            torch.testing.assert_close(evaluated(model, pixels), neutral, atol=1e-6, rtol=0)

    together(outside, holding)
    assert done.is_set()


def test_the_embedding_is_neutral_at_another_image_size_too() -> None:
    for name in ("transformers-vit", "transformers-dinov2-registers", "transformers-siglip"):
        model = vs.load(family(name).model().module, image_size=64)
        pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        same = (evaluated_neutrally(model, permuted(pixels, 8)), evaluated_neutrally(model, pixels))
        torch.testing.assert_close(*same, atol=1e-5, rtol=1e-5)


def test_a_foreign_embedding_is_recognised_by_its_name() -> None:
    import numpy as np

    weights = np.arange(12.0).reshape(3, 4)
    model = placed(weights)
    model_positions = positions(model)
    assert model_positions.kinds == ("position embedding",)
    (neutral,) = model_positions.neutral.values()
    torch.testing.assert_close(neutral, torch.full((1, 12, 1), 5.5))
    module = nn.Module()
    module.pos_embed = nn.Parameter(torch.arange(8.0).reshape(1, 2, 2, 2))
    module.forward = lambda pixels: (pixels.mean((2, 3)) @ torch.ones(3, 2)) + module.pos_embed.mean((1, 2))
    grid = vs.load(module, image_size=8, patch_size=4, readout="patches")
    (flat,) = positions(grid).neutral.values()
    assert flat[0, :, :, 0].tolist() == [[3, 3], [3, 3]]


def test_a_model_without_position_tensors_has_no_positions() -> None:
    model_positions = positions(vs.load(nn.Conv2d(3, 4, 8, stride=8), image_size=16, patch_size=8, readout="patches"))
    assert (model_positions.neutral, model_positions.kinds, model_positions.rotary, model_positions.can_be_neutral) == (
        {},
        (),
        False,
        False,
    )


def test_rotary_positions_cannot_be_neutral() -> None:
    tensor = torch.zeros(1)
    assert Positions({tensor: tensor}, ("position embedding",), False).can_be_neutral
    assert not Positions({tensor: tensor}, ("position embedding",), True).can_be_neutral


def test_an_embedding_that_fits_no_grid_is_refused() -> None:
    module = nn.Module()
    module.pos_embed = nn.Parameter(torch.zeros(1, 11, 4))
    module.forward = lambda pixels: pixels.mean((2, 3))
    model = vs.load(module, image_size=16, patch_size=8, readout="patches")
    with pytest.raises(
        vs.UnsupportedModelError, match="pos_embed of Module has 11 rows, which fit no grid of its patches"
    ) as caught:
        positions(model)
    assert "\n" not in str(caught.value)
