"""Positions made equal: patches may then change places, weights and other threads know nothing of it."""

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


def answered(model: vs.VisionModel, pixels: Tensor) -> Tensor:
    with torch.no_grad(), model.running():
        answer = model.answer(pixels)
        return model.features(pixels) if answer is None else answer


def neutrally(model: vs.VisionModel, pixels: Tensor) -> Tensor:
    with neutral_positions(positions(model)):
        return answered(model, pixels)


def permuted(pixels: Tensor, patch: int, seed: int = 0) -> Tensor:
    rows, columns = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    patches = pixels.unflatten(-1, (columns, patch)).unflatten(-3, (rows, patch)).permute(0, 1, 2, 4, 3, 5)
    order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))
    moved = patches.flatten(2, 3)[:, :, order].unflatten(2, (rows, columns))
    return moved.permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3)


def family(name: str) -> Family:
    return next(family for family in families.ALL if family.name == name)


@every_family
def test_without_positions_patches_may_change_places(family: Family) -> None:
    model, pixels = family.model(), family.pixels()
    known = positions(model)
    assert known.rotary == (family.name in ROTARY)
    assert known.can_be_neutral == (family.name not in ROTARY)
    assert float((answered(model, permuted(pixels, 8)) - answered(model, pixels)).abs().max()) > 2e-4
    if family.name in ROTARY:
        assert known.kinds == ()
        return
    torch.testing.assert_close(neutrally(model, permuted(pixels, 8)), neutrally(model, pixels), atol=1e-5, rtol=1e-5)
    assert float((neutrally(model, pixels) - answered(model, pixels)).abs().max()) > 1e-3
    assert "position embedding" in known.kinds or "beit" in family.name
    assert ("relative bias" in known.kinds) == (family.name in ("transformers-beit", "timm-beit"))


@every_family
def test_prefix_tokens_keep_their_embedding(family: Family) -> None:
    """What becomes of the embedding: its mean for every patch, itself for every token before them."""
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


@every_swin
def test_biases_of_windows_are_constant(family: SwinFamily) -> None:
    """Of the scores as the softmax sees them, less those of queries and keys, nothing is left but one number a head."""
    size = family.sizes["fitting" if "fitting" in family.sizes else "small"]
    model, pixels = family.model(size), swin_families.pixels(size)
    known = positions(model)
    assert (known.can_be_neutral, known.kinds) == (True, ("relative bias",))
    plain, neutral = answered(model, pixels), neutrally(model, pixels)
    assert float((neutral - plain).abs().max()) > 1e-3
    assert torch.equal(answered(model, pixels), plain)
    blocks = list(family.blocks(model.module).values())
    # The first block's attention, of tokens that are all the same: without a bias every weight is the same too.
    attention = getattr(blocks[0], family.attention)
    handle = attention.register_forward_pre_hook(lambda _, args: (torch.ones_like(args[0]), *args[1:]))
    with neutral_positions(known):
        weights = vs.capture(model, pixels).attention(0)
    biased = vs.capture(model, pixels).attention(0)
    handle.remove()
    inside = weights[weights > 0]
    assert float(inside.max() - inside.min()) < 1e-6
    shown = biased[biased > 0]
    assert float(shown.max() - shown.min()) > 1e-4


@every_swin
def test_windows_without_positions_leave_no_trace(family: SwinFamily) -> None:
    size = family.sizes["fitting" if "fitting" in family.sizes else "small"]
    model, pixels = family.model(size), swin_families.pixels(size)
    before = state(model.module)
    buffers = {name: buffer.clone() for name, buffer in model.module.named_buffers()}
    neutrally(model, pixels)
    now = state(model.module)
    for part in ("weights", "training", "attributes", "hooks", "modes", "functions"):
        assert_same(now[part], before[part], part)
    assert_same(dict(model.module.named_buffers()), buffers)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["timm-vit", "transformers-clip", "transformers-beit"])
def test_weights_are_untouched_also_after_an_exception(name: str) -> None:
    model, pixels = family(name).model(), family(name).pixels()
    known, expected = positions(model), answered(model, pixels)
    before = state(model.module)

    def fail(*_: Any) -> None:
        raise TroubleError("in a norm")

    norms = [child for child in model.module.modules() if isinstance(child, nn.LayerNorm)]
    handle = norms[1].register_forward_pre_hook(fail)
    with pytest.raises(TroubleError), neutral_positions(known):
        answered(model, pixels)
    handle.remove()
    assert_same(state(model.module), before)
    assert torch.equal(answered(model, pixels), expected)
    assert torch._C._len_torch_function_stack() == 0


def test_another_thread_knows_nothing_of_it() -> None:
    model, pixels = family("timm-vit").model(), family("timm-vit").pixels()
    plain, neutral = answered(model, pixels), neutrally(model, pixels)
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        inside.wait(60)
        torch.testing.assert_close(answered(model, pixels), plain, atol=1e-6, rtol=0)
        done.set()

    def held() -> None:
        with neutral_positions(positions(model)):
            inside.set()
            done.wait(60)
            torch.testing.assert_close(answered(model, pixels), neutral, atol=1e-6, rtol=0)

    together(other, held)
    assert done.is_set()


def test_at_another_size_the_embedding_is_still_the_same_everywhere() -> None:
    for name in ("transformers-vit", "transformers-dinov2-registers", "transformers-siglip"):
        model = vs.load(family(name).model().module, image_size=64)
        pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        same = (neutrally(model, permuted(pixels, 8)), neutrally(model, pixels))
        torch.testing.assert_close(*same, atol=1e-5, rtol=1e-5)


def test_a_foreign_embedding_is_known_by_its_name() -> None:
    import numpy as np

    weights = np.arange(12.0).reshape(3, 4)
    model = placed(weights)
    known = positions(model)
    assert known.kinds == ("position embedding",)
    (neutral,) = known.neutral.values()
    torch.testing.assert_close(neutral, torch.full((1, 12, 1), 5.5))
    module = nn.Module()
    module.pos_embed = nn.Parameter(torch.arange(8.0).reshape(1, 2, 2, 2))
    module.forward = lambda pixels: (pixels.mean((2, 3)) @ torch.ones(3, 2)) + module.pos_embed.mean((1, 2))
    grid = vs.load(module, image_size=8, patch_size=4, readout="patches")
    (flat,) = positions(grid).neutral.values()
    assert flat[0, :, :, 0].tolist() == [[3, 3], [3, 3]]


def test_a_model_that_says_nothing_of_places_has_none() -> None:
    known = positions(vs.load(nn.Conv2d(3, 4, 8, stride=8), image_size=16, patch_size=8, readout="patches"))
    assert (known.neutral, known.kinds, known.rotary, known.can_be_neutral) == ({}, (), False, False)


def test_what_is_rotary_besides_is_not_made_equal_by_half() -> None:
    tensor = torch.zeros(1)
    assert Positions({tensor: tensor}, ("position embedding",), False).can_be_neutral
    assert not Positions({tensor: tensor}, ("position embedding",), True).can_be_neutral


def test_an_embedding_that_fits_no_grid_is_refused() -> None:
    module = nn.Module()
    module.pos_embed = nn.Parameter(torch.zeros(1, 11, 4))
    module.forward = lambda pixels: pixels.mean((2, 3))
    model = vs.load(module, image_size=16, patch_size=8, readout="patches")
    with pytest.raises(
        vs.CallError, match="pos_embed of Module has 11 rows, which fit no grid of its patches"
    ) as caught:
        positions(model)
    assert "\n" not in str(caught.value)
