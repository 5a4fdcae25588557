"""hide="drop": what is hidden is not there, in every plain family and every window family at every size."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitscope as vs
from tests.helpers import families, swin_families
from tests.helpers.families import Family, every_family
from tests.helpers.swin_families import SwinFamily, each_size
from vitscope.attention.tap import AttentionCall, Tap
from vitscope.interventions.token_dropping import similar_batches, without_hidden
from vitscope.perturb.masked_model import cells_of
from vitscope.perturb.rendering import subjects


def answer_of(model: vs.VisionModel) -> Callable[[Tensor], Tensor]:
    """Classes, or features where there are none."""

    def answer(pixels: Tensor) -> Tensor:
        with torch.no_grad(), model.running():
            given = model.answer(pixels)
            return model.features(pixels) if given is None else given

    return answer


def plain(name: str) -> Family:
    return next(family for family in families.ALL if family.name == name)


def image(size: tuple[int, int], seed: int = 1) -> Tensor:
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed))


def shown_patches(grid: vs.Grid, count: int, rows: int = 3, seed: int = 0) -> Tensor:
    """Rows that show ``count`` patches each, chosen at random."""
    ranks = torch.rand(rows, grid.num_patches, generator=torch.Generator().manual_seed(seed)).argsort(1).argsort(1)
    return ranks < count


def over_pixels(shown: Tensor, grid: vs.Grid, patch: int, size: tuple[int, int]) -> Tensor:
    """(patch,) → (height, width); what is in no patch is shown."""
    blocks = shown.view(grid.height, grid.width).repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    whole = torch.ones(max(size[0], len(blocks)), max(size[1], blocks.shape[1]), dtype=torch.bool)
    whole[: len(blocks), : blocks.shape[1]] = blocks
    return whole[: size[0], : size[1]]


@cache
def prepared(name: str) -> tuple[vs.VisionModel, Tensor, Callable[[Tensor, Tensor], Tensor], Tensor]:
    """A plain family's model and image, how it answers without some patches, and its plain answer."""
    family = plain(name)
    model, pixels = family.model(), image(family.size)
    answer = answer_of(model)
    return model, pixels, without_hidden(model, pixels, answer), answer(pixels)


# Plain transformers


@every_family
def test_with_everything_shown_nothing_changes(family: Family) -> None:
    _, pixels, without, whole = prepared(family.name)
    shown = torch.ones(2, family.grid.num_patches, dtype=torch.bool)
    torch.testing.assert_close(without(pixels, shown), whole.expand(2, -1), atol=1e-5, rtol=1e-5)


@every_family
@pytest.mark.parametrize("count", [1, 9, 23])
def test_what_hidden_patches_hold_is_irrelevant(family: Family, count: int) -> None:
    _, pixels, without, whole = prepared(family.name)
    shown = shown_patches(family.grid, count % family.grid.num_patches)
    got = without(pixels, shown)
    for row, one in zip(shown, got, strict=True):
        visible = over_pixels(row, family.grid, family.patch, family.size)
        spoilt = torch.where(visible, pixels, image(family.size, seed=9) * 50)
        torch.testing.assert_close(without(spoilt, row[None])[0], one, atol=1e-5, rtol=1e-5)
        assert float((one - whole[0]).abs().max()) > 1e-4


@every_family
def test_images_of_one_batch_do_not_touch_each_other(family: Family) -> None:
    _, pixels, without, _ = prepared(family.name)
    shown = shown_patches(family.grid, 7, rows=4)
    together = without(pixels, shown)
    for at in range(4):
        torch.testing.assert_close(without(pixels, shown[at : at + 1])[0], together[at], atol=1e-5, rtol=1e-5)
    assert float((together[0] - together[1]).abs().max()) > 1e-4


@contextmanager
def means_of_shown(module: nn.Module, last: nn.Module, shown: Tensor, prefix: int) -> Iterator[None]:
    """After the last block hidden tokens hold the mean of the shown ones: no mean over tokens can tell them."""
    passed: list[bool] = []
    hidden = prefix + (~shown).nonzero()[:, 0]
    seen = prefix + shown.nonzero()[:, 0]

    def level(child: nn.Module, _: Any, output: Any) -> None:
        if child is last:
            passed.append(True)
        tokens = output[0] if isinstance(output, tuple) else output
        if passed and isinstance(tokens, Tensor) and tokens.shape[:2] == (1, prefix + len(shown)):
            tokens[:, hidden] = tokens[:, seen].mean(1, keepdim=True)

    handles = [child.register_forward_hook(level) for child in module.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def last_block(module: nn.Module) -> nn.Module:
    stacks = [
        child
        for name, child in module.named_modules()
        if name.split(".")[-1] in ("layers", "layer", "blocks") and len(list(child.children())) == 3
    ]
    return list(stacks[-1].children())[-1]


def with_masked_keys(model: vs.VisionModel, pixels: Tensor, shown: Tensor, prefix: int) -> Tensor:
    """The twin: all tokens run, but nobody may look at hidden ones, nor is any mean taken over them."""
    closed = torch.zeros(prefix + len(shown)).masked_fill(~F.pad(shown, (prefix, 0), value=True), -torch.inf)

    def attend(call: AttentionCall) -> Tensor:
        if call.num_keys != len(closed):
            return call.run()
        if call.logits is not None:
            return (call.logits + closed).softmax(-1)
        weights = (call.query * call.scale) @ call.key.transpose(-1, -2) + closed
        if call.bias is not None:
            weights = weights + call.bias
        return weights.softmax(-1) @ call.value

    with Tap(model.module, attend), means_of_shown(model.module, last_block(model.module), shown, prefix):
        return answer_of(model)(pixels)


@every_family
@pytest.mark.parametrize("count", [2, 11, 20])
def test_dropping_equals_a_full_run_in_which_nobody_looks_at_the_hidden(family: Family, count: int) -> None:
    model, pixels, without, _ = prepared(family.name)
    shown = shown_patches(family.grid, min(count, family.grid.num_patches - 1), seed=count)
    for row, got in zip(shown, without(pixels, shown), strict=True):
        expected = with_masked_keys(model, pixels, row, len(family.prefix_names))[0]
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_the_twin_tells_hidden_patches_apart() -> None:
    """Another choice of patches gives another answer, of the twin too."""
    model, pixels, without, _ = prepared("timm-vit")
    first, second = shown_patches(plain("timm-vit").grid, 11, rows=2)
    assert float((without(pixels, first[None]) - with_masked_keys(model, pixels, second, 1)).abs().max()) > 1e-3


@every_family
def test_blocks_are_given_the_tokens_that_are_left_alone(family: Family) -> None:
    model, pixels, without, _ = prepared(family.name)
    lengths: list[int] = []

    def note(call: AttentionCall) -> Tensor:
        if call.num_queries == call.num_keys:
            lengths.append(call.num_keys)
        return call.run()

    with Tap(model.module, note):
        without(pixels, shown_patches(family.grid, 5))
    assert set(lengths) == {len(family.prefix_names) + 5}
    assert len(lengths) % 3 == 0


@every_family
def test_with_everything_hidden_the_prefix_is_left(family: Family) -> None:
    """A model that reads patches is given an empty image instead; what was hidden matters to none."""
    model, pixels, without, _ = prepared(family.name)
    nothing = torch.zeros(1, family.grid.num_patches, dtype=torch.bool)
    answer = without(pixels, nothing)
    other = image(family.size, seed=5) * 10
    torch.testing.assert_close(without(other, nothing), answer, atol=1e-5, rtol=1e-5)
    if not family.prefix_names or "patches" in family.readout:
        torch.testing.assert_close(answer, answer_of(model)(torch.zeros_like(pixels)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [family.name for family in families.ALL if "patches" in family.readout])
def test_a_mean_over_no_patches_is_a_number(name: str) -> None:
    model, pixels = plain(name).model(), plain(name).pixels(1)
    labels = np.zeros(plain(name).size, int)
    labels[0, 0] = 1  # the other segment holds all patches
    result = vs.lime(model, pixels, target=0, num_samples=20, segments=labels, hide="drop")
    assert torch.isfinite(result.weights).all()
    assert result.weights.abs().max() > 0


def test_positions_go_with_their_tokens() -> None:
    """Two patches that hold the same: which of them is left makes a difference, for the position is added before."""
    for name in ("timm-vit", "transformers-dinov3", "timm-dinov3", "transformers-beit"):
        family = plain(name)
        model, pixels = family.model(), image(family.size)
        pixels[..., 8:16, 8:16] = pixels[..., :8, :8]
        without = without_hidden(model, pixels, answer_of(model))
        shown = torch.zeros(2, 24, dtype=torch.bool)
        shown[:, [3, 20]] = True
        shown[0, 0], shown[1, 7] = True, True
        first, second = without(pixels, shown)
        assert float((first - second).abs().max()) > 1e-4


def test_dropping_through_lime_is_dropping() -> None:
    """Segments of a patch each: the answers behind LIME are those of the patches that are shown."""
    family = plain("timm-dinov2-registers")
    model, pixels, without, _ = prepared(family.name)
    result = vs.kernel_shap(
        model, pixels, target=2, num_samples=62, segments=columns(), hide="drop", output="logit", batch_size=5
    )
    everything, nothing = torch.ones(1, 24, dtype=torch.bool), torch.zeros(1, 24, dtype=torch.bool)
    assert result.intercept == pytest.approx(float(without(pixels, nothing)[0, 2]), abs=1e-5)
    assert float(result.weights.sum()) + result.intercept == pytest.approx(
        float(without(pixels, everything)[0, 2]), abs=1e-5
    )


def columns() -> np.ndarray:
    """Labels of the six columns of patches."""
    return np.broadcast_to(np.arange(48) // 8, (32, 48)).copy()


@pytest.mark.parametrize(("hidden_pixels", "dropped"), [(31, False), (32, False), (33, True), (64, True)])
def test_a_patch_is_left_out_when_more_than_half_of_it_is_hidden(hidden_pixels: int, dropped: bool) -> None:
    model, pixels, without, whole = prepared("timm-vit")
    labels = np.zeros((32, 48), int)
    block = np.zeros(64, int)
    block[:hidden_pixels] = 1
    labels[8:16, 8:16] = block.reshape(8, 8)
    result = vs.kernel_shap(model, pixels, target=0, num_samples=2, segments=labels, hide="drop", output="logit")
    shown = torch.ones(1, 24, dtype=torch.bool)
    shown[0, 7] = False
    fall = float(whole[0, 0] - without(pixels, shown)[0, 0])
    cls_alone = float(without(pixels, torch.zeros(1, 24, dtype=torch.bool))[0, 0])
    alone = float(without(pixels, ~shown)[0, 0]) if dropped else cls_alone
    background = torch.zeros(1, 24, dtype=torch.bool)
    background[0, 7] = not dropped and hidden_pixels >= 32
    rest = float(without(pixels, background)[0, 0])
    # Shapley values of two players, from the four answers.
    both, first_alone = float(whole[0, 0]), float(whole[0, 0]) - (fall if dropped else 0.0)
    second_alone = alone if dropped else rest
    nothing = cls_alone
    expected = [
        ((first_alone - nothing) + (both - second_alone)) / 2,
        ((second_alone - nothing) + (both - first_alone)) / 2,
    ]
    assert result.weights.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["transformers-vit", "timm-dinov3", "transformers-beit", "torchvision-vit"])
def test_half_precision_runs(name: str) -> None:
    family = plain(name)
    whole = family.model()
    model = vs.load(whole.module.bfloat16())
    pixels = image(family.size)
    result = vs.lime(model, pixels, target=1, num_samples=60, segments="patches", hide="drop", output="logit")
    assert torch.isfinite(result.weights).all()
    assert bool(result.weights.any())
    without = without_hidden(model, pixels.bfloat16(), answer_of(model))
    shown = torch.ones(1, family.grid.num_patches, dtype=torch.bool)
    expected = answer_of(model)(pixels.bfloat16())
    torch.testing.assert_close(without(pixels.bfloat16(), shown), expected, atol=0.1, rtol=0.1)


def test_a_module_whose_tokens_are_unknown_cannot_drop_any() -> None:
    class Foreign(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return pixels.mean((2, 3))

    model = vs.load(Foreign(), image_size=16)
    with pytest.raises(vs.CallError, match="needs a model whose tokens are known, Foreign is not") as caught:
        vs.lime(model, image((16, 16)), segments="slic", hide="drop")
    assert "\n" not in str(caught.value)


def test_a_model_whose_first_block_is_nowhere_cannot_drop_tokens() -> None:
    """Attention that is not inside a list of blocks."""

    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 8, stride=8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, pixels: Tensor) -> Tensor:
            tokens = self.patches(pixels).flatten(2).transpose(1, 2)
            return self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1)

    model = vs.load(Single().eval(), patch_size=8, readout="patches", output="logits")
    with pytest.raises(vs.CallError, match="where its tokens enter the first block is unknown") as caught:
        vs.lime(model, image((16, 16)), segments="patches", hide="drop")
    assert "\n" not in str(caught.value)


def test_a_foreign_module_whose_layout_is_said_can_drop_tokens() -> None:
    family = plain("timm-vit")

    class Foreign(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, pixels: Tensor) -> Tensor:
            return self.inner(pixels)

    known, pixels, without, _ = prepared("timm-vit")
    model = vs.load(Foreign(known.module), patch_size=8, prefix=["cls"], readout="cls")
    shown = shown_patches(family.grid, 6)
    got = without_hidden(model, pixels, answer_of(model))(pixels, shown)
    torch.testing.assert_close(got, without(pixels, shown), atol=1e-6, rtol=1e-5)


def some_masks(counts: list[int], patches: int) -> np.ndarray:
    return np.stack([np.arange(patches) < count for count in counts])


def test_a_model_that_averages_is_asked_for_one_number_of_patches_at_a_time() -> None:
    shown = some_masks([3, 5, 3, 3, 0, 5, 3], 8)
    assert sorted(similar_batches(plain("timm-vit-mean").model(), shown, 2)) == [[0, 2], [1, 5], [3, 6], [4]]
    assert sorted(similar_batches(plain("timm-vit-mean").model(), shown, 99)) == [[0, 2, 3, 6], [1, 5], [4]]


def test_others_are_asked_for_about_as_many_patches_at_a_time() -> None:
    shown = some_masks([100, 50, 105, 52, 0, 111, 50, 110], 200)
    assert sorted(similar_batches(plain("timm-vit").model(), shown, 9)) == [[0, 2, 7], [1, 6, 3], [4], [5]]
    assert sorted(similar_batches(plain("timm-siglip").model(), shown, 2)) == [[0, 2], [1, 6], [3], [4], [7, 5]]
    assert similar_batches(plain("timm-vit").model(), shown[:0], 2) == []


@every_family
def test_a_batch_with_fillers_answers_as_each_mask_alone(family: Family) -> None:
    if {"patches", "tokens"} & set(family.readout):
        pytest.skip("a model that averages its patches never meets a filler")
    _, pixels, without, _ = prepared(family.name)
    generator = torch.Generator().manual_seed(4)
    shown = torch.rand(6, family.grid.num_patches, generator=generator) < torch.linspace(0.2, 1.0, 6)[:, None]
    alone = torch.cat([without(pixels, row[None]) for row in shown])
    torch.testing.assert_close(without(pixels, shown), alone, atol=1e-5, rtol=1e-5)


# Window transformers


@cache
def windowed(name: str, kind: str) -> tuple[vs.VisionModel, Tensor, Callable[[Tensor, Tensor], Tensor], vs.Grid]:
    family = swin_families.family(name)
    size = family.sizes[kind]
    model, pixels = family.model(size), image(size)
    return model, pixels, without_hidden(model, pixels, answer_of(model)), family.grid(size)


@each_size
def test_windows_with_everything_shown_change_nothing(family: SwinFamily, kind: str) -> None:
    model, pixels, without, grid = windowed(family.name, kind)
    shown = torch.ones(2, grid.num_patches, dtype=torch.bool)
    torch.testing.assert_close(without(pixels, shown), answer_of(model)(pixels).expand(2, -1), atol=1e-5, rtol=1e-5)


def some_hidden(grid: vs.Grid, seed: int = 0) -> Tensor:
    """A corner of half the sides hidden, some patches here and there, and all but a few."""
    random = torch.rand(3, grid.num_patches, generator=torch.Generator().manual_seed(seed))
    shown = random > torch.tensor([0.0, 0.4, 0.9])[:, None]
    shown[0] = True
    shown[0].view(grid.height, grid.width)[: (grid.height + 1) // 2, : (grid.width + 1) // 2] = False
    shown[:, -1] = True
    shown[:, 0] = grid.num_patches == 1
    return shown


@each_size
def test_windows_do_not_see_what_hidden_patches_hold(family: SwinFamily, kind: str) -> None:
    """Hidden pixels change places: their mean, which stands in where merging mixes them in, stays."""
    model, pixels, without, grid = windowed(family.name, kind)
    if grid.num_patches == 1:
        pytest.skip("one token cannot be hidden")
    whole = answer_of(model)(pixels)
    for row in some_hidden(grid):
        got = without(pixels, row[None])
        hidden = ~over_pixels(row, grid, swin_families.PATCH, tuple(pixels.shape[-2:]))
        order = torch.randperm(int(hidden.sum()), generator=torch.Generator().manual_seed(2))
        moved = pixels.clone()
        moved[..., hidden] = pixels[..., hidden][..., order]
        torch.testing.assert_close(without(moved, row[None]), got, atol=1e-4, rtol=1e-4)
        assert float((got - whole).abs().max()) > 1e-4


@each_size
def test_no_token_looks_at_a_hidden_one_unless_its_whole_window_is_hidden(family: SwinFamily, kind: str) -> None:
    model, pixels, without, grid = windowed(family.name, kind)
    steps = [step for step in vs.capture(model, pixels).steps if isinstance(step, vs.AttentionStep)]
    shown = some_hidden(grid, seed=3)
    weights: list[Tensor] = []

    def note(call: AttentionCall) -> Tensor:
        scores = call.logits
        if scores is None:
            scores = (call.query * call.scale) @ call.key.transpose(-1, -2)
            scores = scores if call.bias is None else scores + call.bias
        weights.append(scores.softmax(-1))
        return call.run()

    with Tap(model.module, note):
        without(pixels, shown)
    assert len(weights) == len(steps)
    for step, found in zip(steps, weights, strict=True):
        tokens = shown
        side = (grid.height, grid.width)
        while side != (step.grid.height, step.grid.width):
            # A merged token is hidden where all that it was made of are.
            tokens = F.max_pool2d(tokens.view(-1, 1, *side).float(), 2, ceil_mode=True).flatten(1).bool()
            side = ((side[0] + 1) // 2, (side[1] + 1) // 2)
        slots = step.slots
        windows, places = slots.shape
        seen = F.pad(tokens, (0, 1), value=False)[:, slots]  # padding is no shown token
        empty = F.pad(tokens, (0, 1), value=True)[:, slots]
        hidden = ~empty & seen.any(-1, keepdim=True)  # (image, window, slot)
        found = found.reshape(len(shown), windows, -1, places, places)
        looked = (found * hidden[:, :, None, None]).amax()
        assert float(looked) == 0
        whole = ~seen.any(-1)
        if bool(whole.any()):
            assert torch.isfinite(found[whole]).all()


@pytest.mark.parametrize("name", ["transformers-swin", "timm-swinv2", "torchvision-swin"])
def test_the_classifier_of_windows_reads_what_is_shown(name: str) -> None:
    """Three stages of 16, 8 and 4 tokens a side: what the classifier averages leaves out tokens hidden as a whole."""
    model, pixels, without, grid = windowed(name, "fitting")
    shown = torch.ones(grid.height, grid.width, dtype=torch.bool)
    shown[:8, :4] = False  # the last stage's tokens (0, 0) and (1, 0)
    pooled = model.layout.hierarchy.before_pooling
    given: list[Tensor] = []
    handle = pooled.register_forward_hook(lambda _, __, output: given.append(output.detach().clone()))
    try:
        got = without(pixels, shown.view(1, -1))
    finally:
        handle.remove()
    tokens = given[0].reshape(16, -1)
    left = torch.ones(16, dtype=torch.bool)
    left[[0, 4]] = False
    expected = F.linear(tokens[left].mean(0), model.layout.hierarchy.classifier.weight)
    bias = model.layout.hierarchy.classifier.bias
    torch.testing.assert_close(got[0], expected + bias, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [family.name for family in swin_families.ALL])
def test_windows_with_nothing_shown_give_numbers(name: str) -> None:
    family = swin_families.family(name)
    kind = "fitting" if "fitting" in family.sizes else "small"
    model, pixels, without, grid = windowed(name, kind)
    nothing = torch.zeros(1, grid.num_patches, dtype=torch.bool)
    got = without(pixels, nothing)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got, answer_of(model)(torch.zeros_like(pixels)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["timm-swin", "transformers-swinv2", "torchvision-swinv2"])
def test_windows_in_half_precision_run(name: str) -> None:
    family = swin_families.family(name)
    module = family.model().module.bfloat16()
    result = vs.lime(module, image((32, 32)), target=1, num_samples=40, segments=quarters(), hide="drop")
    assert torch.isfinite(result.weights).all()


def quarters() -> np.ndarray:
    rows, places = np.arange(32) // 16, np.arange(32) // 16
    return rows[:, None] * 2 + places


@pytest.mark.parametrize("size", swin_families.MAXVIT_SIZES.values(), ids=swin_families.MAXVIT_SIZES)
def test_a_model_that_convolves_cannot_drop_tokens(size: tuple[int, int]) -> None:
    model = swin_families.MAXVIT.model(size)
    with pytest.raises(vs.CallError, match="its classifier does not average the last tokens") as caught:
        vs.occlusion(model, image(size), target=0, hide="drop")
    assert "\n" not in str(caught.value)


def test_a_window_transformer_is_occluded_in_tokens_of_its_last_stage() -> None:
    model, pixels, without, grid = windowed("timm-swin", "fitting")
    (subject,) = subjects(model, pixels)
    _, cells = cells_of(model, subject)
    assert (cells.height, cells.width) == (4, 4)
    result = vs.occlusion(model, pixels, target=3, hide="drop", output="logit")
    whole = answer_of(model)(pixels)[0, 3]
    for row in range(4):
        for column in range(4):
            shown = torch.ones(grid.height, grid.width, dtype=torch.bool)
            shown[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = False
            fall = float(whole - without(pixels, shown.view(1, -1))[0, 3])
            assert float(result.values[0, row, column]) == pytest.approx(fall, abs=1e-4)


def written_out(name: str) -> vs.VisionModel:
    explicit = plain(name).model()
    if explicit.library == "transformers":
        explicit.module.set_attn_implementation("eager")
    for child in explicit.module.modules():
        if hasattr(child, "fused_attn"):
            child.fused_attn = False
    return explicit


@pytest.mark.parametrize("name", ["transformers-vit", "timm-vit"])
def test_dropping_is_the_same_whether_attention_is_fused_or_written_out(name: str) -> None:
    _, pixels, without, _ = prepared(name)
    shown = shown_patches(plain(name).grid, 10)
    explicit = written_out(name)
    got = without_hidden(explicit, pixels, answer_of(explicit))(pixels, shown)
    torch.testing.assert_close(got, without(pixels, shown), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["transformers-beit", "timm-beit"])
def test_a_bias_that_is_written_out_is_refused_in_one_line(name: str) -> None:
    explicit = written_out(name)
    with pytest.raises(vs.CallError, match="fused attention") as caught:
        without_hidden(explicit, plain(name).pixels(1), answer_of(explicit))
    assert "\n" not in str(caught.value)
