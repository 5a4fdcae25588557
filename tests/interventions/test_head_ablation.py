"""Ablation of heads and keys: equal to a plain run with hooks, bit for bit nothing for nothing, and no trace left."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitscope as vs
from tests.contracts.test_leaks import assert_same, state
from tests.helpers import families, swin_families
from tests.helpers.families import Family, every_family
from tests.helpers.live import hf_vit, images, timm_vit
from tests.helpers.swin_families import MAXVIT, SwinFamily
from tests.reference import head_ablation as slow
from vitscope.errors import WorkError
from vitscope.interventions.head_ablation import AblatedModel, Ablation, Replacement

KINDS = ("fitting", "padded")
each_swin = pytest.mark.parametrize(
    ("family", "kind"),
    [pytest.param(f, kind, id=f"{f.name}-{kind}") for f in swin_families.ALL for kind in KINDS if kind in f.sizes],
)
each_replacement = pytest.mark.parametrize("replacement", ["mean", "zero"])


def prepared(family: Family | SwinFamily, kind: str = "") -> tuple[vs.VisionModel, Tensor]:
    """Return a model and two images in float64."""
    if isinstance(family, SwinFamily):
        size = family.sizes[kind]
        model, x = family.model(size), swin_families.pixels(size)
    else:
        model, x = family.model(), family.pixels()
    model.module.double()
    return model, x.double()


def outputs(model: vs.VisionModel, pixels: Tensor) -> Tensor:
    with torch.no_grad(), model.running():
        return plain_outputs(model, pixels)


def unfused_outputs(model: vs.VisionModel, pixels: Tensor) -> Tensor:
    """Return the outputs with gradients, without which nn.MultiheadAttention is a single function of other rounding."""
    with torch.enable_grad(), model.running():
        return plain_outputs(model, pixels).detach()


def plain_outputs(model: vs.VisionModel, pixels: Tensor) -> Tensor:
    logits = model.logits(pixels)
    return model.features(pixels) if logits is None else logits


def without(
    ablated: AblatedModel, pixels: Tensor, ablations: list[Ablation], replacement: Replacement = "mean"
) -> Tensor:
    model = ablated.model
    evaluate = model.features if model.logits_or_none(pixels[:1]) is None else model.logits
    with torch.no_grad(), model.running():
        return ablated.run(evaluate, pixels, ablations, replacement)


def heads(*pairs: tuple[int, int]) -> Ablation:
    return Ablation(heads=frozenset(pairs))


def check_equals_reference(family: Any, kind: str, replacement: Replacement) -> None:
    model, pixels = prepared(family, kind)
    before = outputs(model, pixels)
    ablated = AblatedModel(model, pixels)
    blocks = slow.projections(family, model.module, pixels)
    assert [block.num_heads for block in ablated.blocks] == [block.heads for block in blocks]
    unchanged = unfused_outputs(model, pixels) if family.name == "torchvision-vit" else before
    assert torch.equal(without(ablated, pixels, [Ablation(), Ablation()], replacement), unchanged)
    last = len(blocks) - 1
    sets = [
        ablated.heads_of(0),  # a whole block
        ablated.heads - {(0, 1), (last, 0)},  # all but two heads
        frozenset({(0, 0), (1, 1), (last, 1)}),
        ablated.heads,
    ]
    for first, second in zip(sets, [*sets[1:], frozenset()], strict=True):
        result = without(ablated, pixels, [Ablation(first), Ablation(second)], replacement)

        expected = slow.run(lambda: unfused_outputs(model, pixels), 2, blocks, [set(first), set(second)], replacement)
        torch.testing.assert_close(result, expected, atol=2e-6, rtol=2e-6)
        assert not torch.allclose(result[0], before[0], atol=1e-5)


@pytest.mark.slow
@every_family
@each_replacement
def test_ablation_equals_a_plain_run_with_replaced_heads(family: Family, replacement: Replacement) -> None:
    check_equals_reference(family, "", replacement)


@pytest.mark.slow
@each_swin
@each_replacement
def test_ablation_in_windows_equals_a_plain_run(family: SwinFamily, kind: str, replacement: Replacement) -> None:
    check_equals_reference(family, kind, replacement)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm-vit", "timm-beit", "timm-swin-padded", "transformers-vit", "transformers-swin"])
def test_the_mean_is_the_same_under_fused_and_explicit_attention(name: str) -> None:
    swin = next((f for f in swin_families.ALL if name in (f.name, f"{f.name}-padded")), None)
    family = swin or next(f for f in families.ALL if f.name == name)
    model, pixels = family.model(), swin_families.pixels((32, 32)) if swin else family.pixels()
    if name.startswith("timm"):
        attentions = [child for child in model.module.modules() if hasattr(child, "fused_attn")]
        set_fused = lambda fused: [setattr(child, "fused_attn", fused) for child in attentions]  # noqa: E731
    else:
        set_fused = lambda fused: model.module.set_attn_implementation("sdpa" if fused else "eager")  # noqa: E731
    results = []
    for fused in (True, False):
        set_fused(fused)
        ablated = AblatedModel(model, pixels)
        results.append(without(ablated, pixels, [heads((0, 0), (1, 1)), Ablation(ablated.heads)]))
    torch.testing.assert_close(results[0], results[1], atol=2e-5, rtol=2e-5)


def test_maxvit_runs_without_heads() -> None:
    model = MAXVIT.model((64, 64))
    pixels = swin_families.pixels((64, 64))
    ablated = AblatedModel(model, pixels)
    assert torch.equal(without(ablated, pixels, [Ablation(), Ablation()]), outputs(model, pixels))
    result = without(ablated, pixels, [Ablation(ablated.heads), Ablation()])
    assert not torch.allclose(result[0], outputs(model, pixels)[0], atol=1e-5)
    torch.testing.assert_close(result[1], outputs(model, pixels)[1], atol=1e-5, rtol=1e-5)


def masked_softmax(query: Tensor, key: Tensor, value: Tensor, off: list[int], **options: Any) -> Tensor:
    """Return attention without some keys, from the formula."""
    scores = query @ key.mT * (options.get("scale") or query.shape[-1] ** -0.5)
    mask = options.get("attn_mask")
    weights = (scores if mask is None else scores + mask).softmax(-1)
    weights[..., off] = 0
    return weights / weights.sum(-1, keepdim=True) @ value


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm-vit", "transformers-dinov2-registers", "timm-beit", "torchvision-vit"])
def test_keys_that_are_switched_off_get_no_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = next(f for f in families.ALL if f.name == name)
    model, pixels = prepared(family)
    grid, ablated = family.grid, AblatedModel(model, pixels)
    ablation = Ablation(keys=frozenset({family.prefix_names[-1], (0, 0), (3, 2)}))
    result = without(ablated, pixels, [ablation, ablation])
    off = [grid.prefix - 1, grid.token(0, 0), grid.token(3, 2)]

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *_: Any, **options: Any) -> Tensor:
        return masked_softmax(query, key, value, off, attn_mask=attn_mask, scale=options.get("scale"))

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    expected = unfused_outputs(model, pixels)
    monkeypatch.undo()
    torch.testing.assert_close(result, expected, atol=1e-9, rtol=1e-9)
    assert not torch.allclose(result, outputs(model, pixels), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformers-swin", "timm-swin", "timm-swinv2", "torchvision-swin"])
def test_no_token_of_a_window_transformer_attends_to_a_key_that_is_off(name: str) -> None:
    """16 patches become a single token of the last stage: a change in them reaches no other token."""
    model, pixels = prepared(swin_families.family(name), "fitting")
    changed = pixels.clone()
    changed[:, :, :8, 8:16] += 1
    ablated = AblatedModel(model, pixels)
    ablation = Ablation(keys=frozenset((row, column) for row in range(4) for column in range(4, 8)))
    features: list[Tensor] = []
    assert model.layout is not None
    assert model.layout.hierarchy is not None
    last = model.layout.hierarchy.before_pooling
    assert last is not None
    hook = last.register_forward_hook(lambda _, __, output: features.append(output.reshape(2, 16, -1)))
    for x in (pixels, changed):
        without(ablated, x, [ablation, Ablation()])
    hook.remove()
    features = features[1::2] if len(features) == 4 else features
    same = (features[0] - features[1]).abs().amax(-1) < 1e-12
    assert [token for token in range(16) if not same[0, token]] == [1]
    assert not same[1].any()


def test_a_merged_token_is_off_if_all_of_its_patches_are() -> None:
    ablated = AblatedModel(*prepared(swin_families.family("timm-swin"), "fitting"))
    group = {(2, 4), (2, 5), (3, 4), (3, 5)}
    ablations = [Ablation(keys=frozenset(group)), Ablation(keys=frozenset(group - {(3, 5)}))]
    counts = {
        layer: hidden.sum((1, 2)).tolist()
        for layer, hidden in ablated._hidden_slots(ablations, torch.device("cpu")).items()
    }
    assert counts == {0: [4, 3], 1: [4, 3], 2: [1, 0], 3: [1, 0], 4: [0, 0], 5: [0, 0]}


def test_a_window_without_keys_has_no_output() -> None:
    model, pixels = prepared(swin_families.family("timm-swin"), "fitting")
    ablated = AblatedModel(model, pixels)
    everything = frozenset((row, column) for row in range(16) for column in range(16))
    result = without(ablated, pixels, [Ablation(keys=everything), Ablation(keys=everything)])
    expected = without(ablated, pixels, [Ablation(ablated.heads)] * 2, "zero")
    torch.testing.assert_close(result, expected, atol=1e-12, rtol=1e-12)


class Residual(nn.Module):
    """An attention block without a norm or an MLP, and a classifier of the mean: linear in every head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 5)
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).mT
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


def test_effects_add_up_if_the_output_is_linear_in_the_heads() -> None:
    module = Residual().double()
    model = vs.load(module, patch_size=8, prefix=(), readout="patches")
    pixels = images().double()
    ablated = AblatedModel(model, pixels)
    before = outputs(model, pixels)

    def drop(*pairs: tuple[int, int]) -> Tensor:
        return before - without(ablated, pixels, [heads(*pairs)] * 2, "zero")

    singles = [drop((0, head)) for head in range(4)]
    torch.testing.assert_close(drop((0, 1), (0, 3)), singles[1] + singles[3], atol=1e-12, rtol=0)
    torch.testing.assert_close(drop(*ablated.heads), sum(singles), atol=1e-12, rtol=0)
    # Without its heads the block adds the bias of its projection, and nothing else.
    x = module.patches(pixels).flatten(2).mT.mean(1)
    alone = module.head(x + module.attention.out_proj.bias).detach()
    torch.testing.assert_close(before - drop(*ablated.heads), alone, atol=1e-12, rtol=0)
    # The classifier reads the mean over the tokens, which mean ablation preserves.
    torch.testing.assert_close(without(ablated, pixels, [Ablation(ablated.heads)] * 2), before, atol=1e-12, rtol=0)


def explicit(factory: Any = timm_vit) -> tuple[AblatedModel, Tensor]:
    model = vs.load(factory())
    return AblatedModel(model, images()), images()


@pytest.mark.parametrize(
    ("fields", "replacement", "message"),
    [
        ({"heads": {(2, 0)}}, "mean", "layer 2 is out of range: timm:VisionTransformer has layers 0 to 1"),
        ({"heads": {(1, 2)}}, "mean", "head 2 is out of range: layer 1 has heads 0 to 1"),
        ({"heads": {(0, 0)}}, "noise", "unknown replacement 'noise': choose mean or zero"),
        ({"keys": {"dog"}}, "mean", "unknown key 'dog': choose 'cls' or a patch as (row, column)"),
        ({"keys": {3}}, "mean", "unknown key 3: pass the name of a prefix token or (row, column)"),
        ({"keys": {(9, 0)}}, "mean", "patch (9, 0) lies outside the grid"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_ablations_are_refused_in_one_line(fields: dict[str, Any], replacement: Any, message: str) -> None:
    ablated, pixels = explicit()
    ablation = Ablation(**{name: frozenset(values) for name, values in fields.items()})
    with pytest.raises(vs.CallError) as caught:
        without(ablated, pixels, [ablation, ablation], replacement)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_wrong_number_or_size_of_images_is_refused() -> None:
    ablated, pixels = explicit()
    with pytest.raises(vs.CallError, match="1 ablations for 2 images: pass one for each image"):
        without(ablated, pixels, [Ablation()])
    with pytest.raises(vs.CallError, match="3×32×32 is expected"):
        ablated.run(lambda x: x, pixels[..., :24], [Ablation(), Ablation()])
    with pytest.raises(vs.CallError, match="layer 7 is out of range"):
        ablated.heads_of(7)
    assert ablated.heads_of(-1) == {(1, 0), (1, 1)}


def test_attention_that_differs_between_runs_is_an_error() -> None:
    ablated, pixels = explicit(hf_vit)
    with pytest.raises(WorkError, match="did not run"):
        ablated.run(lambda x: x, pixels, [Ablation(), Ablation()])


class TroubleError(Exception):
    pass


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("build", [timm_vit, hf_vit])
def test_nothing_is_left_behind_even_after_an_exception(build: Any) -> None:
    model = vs.load(build())
    ablated = AblatedModel(model, images())
    before = state(model.module)
    without(ablated, images(), [heads((0, 1)), Ablation(ablated.heads)])
    assert_same(state(model.module), before)

    def fail(*_: Any) -> None:
        raise TroubleError

    last = list(model.module.modules())[-1]
    last.forward = fail  # type: ignore[method-assign, assignment]
    before = state(model.module)
    with pytest.raises(TroubleError):
        ablated.run(lambda x: outputs(model, x), images(), [heads((0, 1)), Ablation()])
    assert_same(state(model.module), before)
