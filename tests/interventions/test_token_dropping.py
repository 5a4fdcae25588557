"""hide="drop": hidden patches have no effect, in every plain family and every window family at every size."""

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


def evaluator(model: vs.VisionModel) -> Callable[[Tensor], Tensor]:
    """Return a function of pixels that returns logits, or features if there is no classifier."""

    def evaluate(pixels: Tensor) -> Tensor:
        with torch.no_grad(), model.running():
            logits = model.answer(pixels)
            return model.features(pixels) if logits is None else logits

    return evaluate


def plain(name: str) -> Family:
    return next(family for family in families.ALL if family.name == name)


def image(size: tuple[int, int], seed: int = 1) -> Tensor:
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed))


def visible_patches(grid: vs.Grid, count: int, rows: int = 3, seed: int = 0) -> Tensor:
    """Return rows in which ``count`` patches are visible, chosen at random."""
    ranks = torch.rand(rows, grid.num_patches, generator=torch.Generator().manual_seed(seed)).argsort(1).argsort(1)
    return ranks < count


def over_pixels(visible: Tensor, grid: vs.Grid, patch: int, size: tuple[int, int]) -> Tensor:
    """Return (patch,) as (height, width); pixels outside all patches are visible."""
    blocks = visible.view(grid.height, grid.width).repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    original = torch.ones(max(size[0], len(blocks)), max(size[1], blocks.shape[1]), dtype=torch.bool)
    original[: len(blocks), : blocks.shape[1]] = blocks
    return original[: size[0], : size[1]]


@cache
def prepared(name: str) -> tuple[vs.VisionModel, Tensor, Callable[[Tensor, Tensor], Tensor], Tensor]:
    """Return a plain family's model and image, the model without hidden patches, and its output for the original."""
    family = plain(name)
    model, pixels = family.model(), image(family.size)
    evaluate = evaluator(model)
    return model, pixels, without_hidden(model, pixels, evaluate), evaluate(pixels)


# Plain transformers


@every_family
def test_with_everything_visible_nothing_changes(family: Family) -> None:
    _, pixels, without, original = prepared(family.name)
    visible = torch.ones(2, family.grid.num_patches, dtype=torch.bool)
    torch.testing.assert_close(without(pixels, visible), original.expand(2, -1), atol=1e-5, rtol=1e-5)


@every_family
@pytest.mark.parametrize("count", [1, 9, 23])
def test_the_content_of_hidden_patches_is_irrelevant(family: Family, count: int) -> None:
    _, pixels, without, original = prepared(family.name)
    visible = visible_patches(family.grid, count % family.grid.num_patches)
    got = without(pixels, visible)
    for row, output in zip(visible, got, strict=True):
        visible_pixels = over_pixels(row, family.grid, family.patch, family.size)
        spoilt = torch.where(visible_pixels, pixels, image(family.size, seed=9) * 50)
        torch.testing.assert_close(without(spoilt, row[None])[0], output, atol=1e-5, rtol=1e-5)
        assert float((output - original[0]).abs().max()) > 1e-4


@every_family
def test_images_of_one_batch_are_independent(family: Family) -> None:
    _, pixels, without, _ = prepared(family.name)
    visible = visible_patches(family.grid, 7, rows=4)
    together = without(pixels, visible)
    for row in range(4):
        torch.testing.assert_close(without(pixels, visible[row : row + 1])[0], together[row], atol=1e-5, rtol=1e-5)
    assert float((together[0] - together[1]).abs().max()) > 1e-4


@contextmanager
def means_of_visible(module: nn.Module, last: nn.Module, visible: Tensor, prefix: int) -> Iterator[None]:
    """Set hidden tokens to the mean of the visible ones after the last block, so that a mean over all ignores them."""
    passed: list[bool] = []
    hidden = prefix + (~visible).nonzero()[:, 0]
    seen = prefix + visible.nonzero()[:, 0]

    def level(child: nn.Module, _: Any, output: Any) -> None:
        if child is last:
            passed.append(True)
        tokens = output[0] if isinstance(output, tuple) else output
        if passed and isinstance(tokens, Tensor) and tokens.shape[:2] == (1, prefix + len(visible)):
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


def with_masked_keys(model: vs.VisionModel, pixels: Tensor, visible: Tensor, prefix: int) -> Tensor:
    """Evaluate the slow reference: all tokens run, but none attends to hidden ones, and no mean includes them."""
    closed = torch.zeros(prefix + len(visible)).masked_fill(~F.pad(visible, (prefix, 0), value=True), -torch.inf)

    def attend(call: AttentionCall) -> Tensor:
        if call.num_keys != len(closed):
            return call.run()
        if call.logits is not None:
            return (call.logits + closed).softmax(-1)
        weights = (call.query * call.scale) @ call.key.transpose(-1, -2) + closed
        if call.bias is not None:
            weights = weights + call.bias
        return weights.softmax(-1) @ call.value

    with Tap(model.module, attend), means_of_visible(model.module, last_block(model.module), visible, prefix):
        return evaluator(model)(pixels)


@every_family
@pytest.mark.parametrize("count", [2, 11, 20])
def test_dropping_equals_a_full_run_with_masked_keys(family: Family, count: int) -> None:
    model, pixels, without, _ = prepared(family.name)
    visible = visible_patches(family.grid, min(count, family.grid.num_patches - 1), seed=count)
    for row, got in zip(visible, without(pixels, visible), strict=True):
        expected = with_masked_keys(model, pixels, row, len(family.prefix_names))[0]
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_the_reference_depends_on_which_patches_are_hidden() -> None:
    """Other patches give another output, in the reference too."""
    model, pixels, without, _ = prepared("timm-vit")
    first, second = visible_patches(plain("timm-vit").grid, 11, rows=2)
    assert float((without(pixels, first[None]) - with_masked_keys(model, pixels, second, 1)).abs().max()) > 1e-3


@every_family
def test_blocks_receive_only_the_visible_tokens(family: Family) -> None:
    model, pixels, without, _ = prepared(family.name)
    lengths: list[int] = []

    def record(call: AttentionCall) -> Tensor:
        if call.num_queries == call.num_keys:
            lengths.append(call.num_keys)
        return call.run()

    with Tap(model.module, record):
        without(pixels, visible_patches(family.grid, 5))
    assert set(lengths) == {len(family.prefix_names) + 5}
    assert len(lengths) % 3 == 0


@every_family
def test_with_everything_hidden_only_the_prefix_remains(family: Family) -> None:
    """A model that reads patches gets an empty image instead. The hidden content matters to no model."""
    model, pixels, without, _ = prepared(family.name)
    nothing = torch.zeros(1, family.grid.num_patches, dtype=torch.bool)
    output = without(pixels, nothing)
    different = image(family.size, seed=5) * 10
    torch.testing.assert_close(without(different, nothing), output, atol=1e-5, rtol=1e-5)
    if not family.prefix_names or "patches" in family.readout:
        torch.testing.assert_close(output, evaluator(model)(torch.zeros_like(pixels)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [family.name for family in families.ALL if "patches" in family.readout])
def test_a_mean_over_no_patches_is_finite(name: str) -> None:
    model, pixels = plain(name).model(), plain(name).pixels(1)
    labels = np.zeros(plain(name).size, int)
    labels[0, 0] = 1  # the first segment covers all patches
    result = vs.lime(model, pixels, target=0, num_samples=20, segments=labels, hide="drop")
    assert torch.isfinite(result.weights).all()
    assert result.weights.abs().max() > 0


def test_positions_stay_with_their_tokens() -> None:
    """Of two equal patches it matters which one is visible, because positions are added before tokens are dropped."""
    for name in ("timm-vit", "transformers-dinov3", "timm-dinov3", "transformers-beit"):
        family = plain(name)
        model, pixels = family.model(), image(family.size)
        pixels[..., 8:16, 8:16] = pixels[..., :8, :8]
        without = without_hidden(model, pixels, evaluator(model))
        visible = torch.zeros(2, 24, dtype=torch.bool)
        visible[:, [3, 20]] = True
        visible[0, 0], visible[1, 7] = True, True
        first, second = without(pixels, visible)
        assert float((first - second).abs().max()) > 1e-4


def test_kernel_shap_with_drop_evaluates_the_visible_patches() -> None:
    """The intercept and the sum of the weights are the outputs without any patch and with all patches."""
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
    """Return labels of the six columns of patches."""
    return np.broadcast_to(np.arange(48) // 8, (32, 48)).copy()


@pytest.mark.parametrize(("hidden_pixels", "dropped"), [(31, False), (32, False), (33, True), (64, True)])
def test_a_patch_is_dropped_if_more_than_half_of_it_is_hidden(hidden_pixels: int, dropped: bool) -> None:
    model, pixels, without, original = prepared("timm-vit")
    labels = np.zeros((32, 48), int)
    block = np.zeros(64, int)
    block[:hidden_pixels] = 1
    labels[8:16, 8:16] = block.reshape(8, 8)
    result = vs.kernel_shap(model, pixels, target=0, num_samples=2, segments=labels, hide="drop", output="logit")
    visible = torch.ones(1, 24, dtype=torch.bool)
    visible[0, 7] = False
    drop = float(original[0, 0] - without(pixels, visible)[0, 0])
    cls_alone = float(without(pixels, torch.zeros(1, 24, dtype=torch.bool))[0, 0])
    alone = float(without(pixels, ~visible)[0, 0]) if dropped else cls_alone
    background = torch.zeros(1, 24, dtype=torch.bool)
    background[0, 7] = not dropped and hidden_pixels >= 32
    rest = float(without(pixels, background)[0, 0])
    # Shapley values of two players, from the four outputs.
    full, first_alone = float(original[0, 0]), float(original[0, 0]) - (drop if dropped else 0.0)
    second_alone = alone if dropped else rest
    nothing = cls_alone
    expected = [
        ((first_alone - nothing) + (full - second_alone)) / 2,
        ((second_alone - nothing) + (full - first_alone)) / 2,
    ]
    assert result.weights.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["transformers-vit", "timm-dinov3", "transformers-beit", "torchvision-vit"])
def test_half_precision_runs(name: str) -> None:
    family = plain(name)
    model = vs.load(family.model().module.bfloat16())
    pixels = image(family.size)
    result = vs.lime(model, pixels, target=1, num_samples=60, segments="patches", hide="drop", output="logit")
    assert torch.isfinite(result.weights).all()
    assert bool(result.weights.any())
    without = without_hidden(model, pixels.bfloat16(), evaluator(model))
    visible = torch.ones(1, family.grid.num_patches, dtype=torch.bool)
    expected = evaluator(model)(pixels.bfloat16())
    torch.testing.assert_close(without(pixels.bfloat16(), visible), expected, atol=0.1, rtol=0.1)


def test_a_module_with_unknown_tokens_cannot_drop_any() -> None:
    class Foreign(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return pixels.mean((2, 3))

    model = vs.load(Foreign(), image_size=16)
    with pytest.raises(
        vs.UnsupportedModelError, match="needs a model whose tokens are known, Foreign is not"
    ) as caught:
        vs.lime(model, image((16, 16)), segments="slic", hide="drop")
    assert "\n" not in str(caught.value)


def test_a_model_without_a_list_of_blocks_cannot_drop_tokens() -> None:
    """Its attention is not inside a list of blocks."""

    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 8, stride=8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, pixels: Tensor) -> Tensor:
            tokens = self.patches(pixels).flatten(2).transpose(1, 2)
            return self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1)

    model = vs.load(Single().eval(), patch_size=8, readout="patches", output="logits")
    with pytest.raises(vs.UnsupportedModelError, match="where its tokens enter the first block is unknown") as caught:
        vs.lime(model, image((16, 16)), segments="patches", hide="drop")
    assert "\n" not in str(caught.value)


def test_a_foreign_module_with_a_given_layout_can_drop_tokens() -> None:
    family = plain("timm-vit")

    class Foreign(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, pixels: Tensor) -> Tensor:
            return self.inner(pixels)

    original, pixels, without, _ = prepared("timm-vit")
    model = vs.load(Foreign(original.module), patch_size=8, prefix=["cls"], readout="cls")
    visible = visible_patches(family.grid, 6)
    got = without_hidden(model, pixels, evaluator(model))(pixels, visible)
    torch.testing.assert_close(got, without(pixels, visible), atol=1e-6, rtol=1e-5)


def some_masks(counts: list[int], patches: int) -> np.ndarray:
    return np.stack([np.arange(patches) < count for count in counts])


def test_a_model_that_averages_gets_batches_of_one_number_of_patches() -> None:
    visible = some_masks([3, 5, 3, 3, 0, 5, 3], 8)
    assert sorted(similar_batches(plain("timm-vit-mean").model(), visible, 2)) == [[0, 2], [1, 5], [3, 6], [4]]
    assert sorted(similar_batches(plain("timm-vit-mean").model(), visible, 99)) == [[0, 2, 3, 6], [1, 5], [4]]


def test_other_models_get_batches_of_similar_numbers_of_patches() -> None:
    visible = some_masks([100, 50, 105, 52, 0, 111, 50, 110], 200)
    assert sorted(similar_batches(plain("timm-vit").model(), visible, 9)) == [[0, 2, 7], [1, 6, 3], [4], [5]]
    assert sorted(similar_batches(plain("timm-siglip").model(), visible, 2)) == [[0, 2], [1, 6], [3], [4], [7, 5]]
    assert similar_batches(plain("timm-vit").model(), visible[:0], 2) == []


@every_family
def test_a_batch_with_filler_tokens_equals_each_mask_alone(family: Family) -> None:
    if {"patches", "tokens"} & set(family.readout):
        pytest.skip("a model that averages its patches never gets filler tokens")
    _, pixels, without, _ = prepared(family.name)
    generator = torch.Generator().manual_seed(4)
    visible = torch.rand(6, family.grid.num_patches, generator=generator) < torch.linspace(0.2, 1.0, 6)[:, None]
    alone = torch.cat([without(pixels, row[None]) for row in visible])
    torch.testing.assert_close(without(pixels, visible), alone, atol=1e-5, rtol=1e-5)


# Window transformers


@cache
def windowed(name: str, kind: str) -> tuple[vs.VisionModel, Tensor, Callable[[Tensor, Tensor], Tensor], vs.Grid]:
    family = swin_families.family(name)
    size = family.sizes[kind]
    model, pixels = family.model(size), image(size)
    return model, pixels, without_hidden(model, pixels, evaluator(model)), family.grid(size)


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


def with_explicit_attention(name: str) -> vs.VisionModel:
    explicit = plain(name).model()
    if explicit.library == "transformers":
        explicit.module.set_attn_implementation("eager")
    for child in explicit.module.modules():
        if hasattr(child, "fused_attn"):
            child.fused_attn = False
    return explicit


@pytest.mark.parametrize("name", ["transformers-vit", "timm-vit"])
def test_dropping_is_the_same_with_fused_and_explicit_attention(name: str) -> None:
    _, pixels, without, _ = prepared(name)
    visible = visible_patches(plain(name).grid, 10)
    explicit = with_explicit_attention(name)
    got = without_hidden(explicit, pixels, evaluator(explicit))(pixels, visible)
    torch.testing.assert_close(got, without(pixels, visible), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["transformers-beit", "timm-beit"])
def test_a_bias_in_explicit_attention_is_refused_in_one_line(name: str) -> None:
    explicit = with_explicit_attention(name)
    with pytest.raises(vs.UnsupportedModelError, match="fused attention") as caught:
        without_hidden(explicit, plain(name).pixels(1), evaluator(explicit))
    assert "\n" not in str(caught.value)
