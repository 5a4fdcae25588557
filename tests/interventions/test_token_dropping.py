"""hide="drop" in plain transformers: hidden patches have no effect, in every family."""

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
from tests.helpers import families
from tests.helpers.dropping import evaluator, image, over_pixels
from tests.helpers.families import Family, every_family
from vitscope.attention.tap import AttentionCall, Tap
from vitscope.interventions.token_dropping import similar_batches, without_hidden


def plain(name: str) -> Family:
    return next(family for family in families.ALL if family.name == name)


def visible_patches(grid: vs.Grid, count: int, rows: int = 3, seed: int = 0) -> Tensor:
    """Return rows in which ``count`` patches are visible, chosen at random."""
    ranks = torch.rand(rows, grid.num_patches, generator=torch.Generator().manual_seed(seed)).argsort(1).argsort(1)
    return ranks < count


@cache
def prepared(name: str) -> tuple[vs.VisionModel, Tensor, Callable[[Tensor, Tensor], Tensor], Tensor]:
    """Return a plain family's model and image, the model without hidden patches, and its output for the original."""
    family = plain(name)
    model, pixels = family.model(), image(family.size)
    evaluate = evaluator(model)
    return model, pixels, without_hidden(model, pixels, evaluate), evaluate(pixels)


@pytest.mark.slow
@every_family
def test_with_everything_visible_nothing_changes(family: Family) -> None:
    _, pixels, without, original = prepared(family.name)
    visible = torch.ones(2, family.grid.num_patches, dtype=torch.bool)
    torch.testing.assert_close(without(pixels, visible), original.expand(2, -1), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
        vs.UnsupportedModelError, match="needs a model whose tokens are known, but those of Foreign are not"
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


@pytest.mark.slow
@every_family
def test_a_batch_with_filler_tokens_equals_each_mask_alone(family: Family) -> None:
    if {"patches", "tokens"} & set(family.readout):
        pytest.skip("a model that averages its patches never gets filler tokens")
    _, pixels, without, _ = prepared(family.name)
    generator = torch.Generator().manual_seed(4)
    visible = torch.rand(6, family.grid.num_patches, generator=generator) < torch.linspace(0.2, 1.0, 6)[:, None]
    alone = torch.cat([without(pixels, row[None]) for row in visible])
    torch.testing.assert_close(without(pixels, visible), alone, atol=1e-5, rtol=1e-5)


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
