"""Data flow: blocks form a chain only if each depends on the one before; a softmax must multiply values."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitscope as vs
from tests.helpers.families import from_timm
from tests.tracing.test_foreign import LAYOUT, ByHand, Homemade
from vitscope.attention.flow import IMAGE, Flow
from vitscope.attention.tap import Tap
from vitscope.errors import UnsupportedModelError

timm = pytest.importorskip("timm")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu")


def output_mask(run: Callable[[Tensor], Tensor], module: nn.Module | None = None) -> int | None:
    """Return the mask of the output of ``run`` for an image of shape (2, 3, 4)."""
    flow, image = Flow(), random(2, 3, 4)
    flow.set_mask(image, IMAGE)
    tap = Tap(module or nn.Identity(), lambda call: call.run(), flow)
    with torch.no_grad(), tap, tap.follow():
        return flow.mask_or_none(run(image))


def assign_by_index(x: Tensor) -> Tensor:
    buffer = torch.zeros(3, 3, 4, device="cpu")
    buffer[1:] = x
    return buffer


def write_into_view(x: Tensor) -> Tensor:
    buffer = torch.zeros(2, 3, 4, device="cpu")
    buffer[:, 1:].add_(x[:, 1:])
    return buffer


def write_into_out(x: Tensor) -> Tensor:
    buffer = torch.zeros(2, 3, 4, device="cpu")
    torch.add(x, 1, out=buffer)
    return buffer


def add_in_place(x: Tensor) -> Tensor:
    buffer = torch.zeros(2, 3, 4, device="cpu")
    buffer += x
    return buffer


class Unobserved(torch.autograd.Function):
    """Code that no function mode observes."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x * 2


class UnobservedModule(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Unobserved.apply(x) + 1


PROPAGATING: dict[str, Callable[[Tensor], Tensor]] = {
    "arithmetic": lambda x: (1 - x / 3).relu(),
    "cat": lambda x: torch.cat([torch.zeros(2, 3, 4, device="cpu"), x]),
    "chunk": lambda x: x.chunk(2, dim=-1)[1],
    "attribute": lambda x: x.mT,
    "half": lambda x: x.half().float(),
    "keyword": lambda x: F.linear(torch.ones(4, 4, device="cpu"), weight=x[0]),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "indexed assignment": assign_by_index,
    "write into a view": write_into_view,
    "out": write_into_out,
    "in place": add_in_place,
    "unobserved code": UnobservedModule(),
}


@pytest.mark.parametrize("run", PROPAGATING.values(), ids=PROPAGATING)
def test_functions_propagate_the_mask_of_the_image(run: Callable[[Tensor], Tensor]) -> None:
    mask = output_mask(run)
    assert mask is not None
    assert mask & IMAGE


def test_tensors_independent_of_the_image_have_no_image_bit() -> None:
    assert output_mask(lambda x: torch.zeros(x.shape, device="cpu") + 1) == 0
    assert output_mask(lambda _: F.scaled_dot_product_attention(*[torch.ones(2, 3, 4, device="cpu")] * 3)) == 2


@pytest.mark.parametrize("need_weights", [False, True])
def test_masks_pass_through_multi_head_attention(need_weights: bool) -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=True).eval()
    assert output_mask(lambda x: attention(x, x, x, need_weights=need_weights)[0], attention) == IMAGE | 2


class Ensemble(nn.Module):
    """The mean output of two networks, or of one network on an image and its mirror image."""

    def __init__(self, first: nn.Module, second: nn.Module, *, mirror: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.mirror = first, second, mirror

    def forward(self, pixels: Tensor) -> Tensor:
        return (self.first(pixels) + self.second(pixels.flip(-1) if self.mirror else pixels)) / 2


def homemade_ensemble() -> nn.Module:
    return Ensemble(Homemade("fused"), Homemade("by hand"))


def homemade_mirror() -> nn.Module:
    network = Homemade("fused")
    return Ensemble(network, network, mirror=True)


def timm_parallel() -> nn.Module:
    return from_timm("vit_small_patch16_18x2_224", depth=2)()


def vit_pytorch_parallel() -> nn.Module:
    parallel = pytest.importorskip("vit_pytorch.parallel_vit")
    options = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 32, "depth": 2, "heads": 4, "mlp_dim": 48}
    return parallel.ViT(**options, num_parallel_branches=2)


PARALLEL: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], int, str, str]] = {
    "ensemble": (homemade_ensemble, LAYOUT, 4, "first.stages.1", "second.stages.0"),
    "image and mirror": (homemade_mirror, LAYOUT, 4, "first.stages.1", "first.stages.0"),
    "timm 18x2": (timm_parallel, {}, 4, "blocks.0.attns.0.attn", "blocks.0.attns.1.attn"),
    "vit_pytorch parallel": (
        vit_pytorch_parallel, LAYOUT, 4, "transformer.layers.0.0.fns.0.attend", "transformer.layers.0.0.fns.1.attend",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", PARALLEL.values(), ids=PARALLEL)
def test_parallel_blocks_have_no_rollout(case: tuple[Any, ...]) -> None:
    build, layout, count, first, second = case
    torch.manual_seed(0)
    module = build().eval()
    pixels = random(2, 3, 32, 48 if first.startswith("blocks") else 32)
    model = vs.load(module, **layout)
    trace = vs.capture(model, pixels)
    assert trace.num_layers == count
    for call in (lambda: vs.rollout(trace), lambda: vs.rollout(model, pixels), lambda: vs.rollout_evolution(trace)):
        with pytest.raises(UnsupportedModelError, match="in parallel") as caught:
            call()
        message = str(caught.value)
        assert f"{first} and {second} run in parallel" in message
        assert "\n" not in message
    result = vs.attention_map(trace, layer=0, query=(1, 1))
    torch.testing.assert_close(result.values.flatten(1), trace.attention(0).mean(1)[:, 1 + result.grid.width + 1, 1:])


def test_attention_in_parallel_with_an_mlp_is_a_single_block() -> None:
    """timm's parallel scaling block runs attention and MLP in parallel; its blocks form a chain."""
    torch.manual_seed(0)
    model = vs.load(from_timm("vit_base_patch16_xp_224")().eval())
    pixels = random(2, 3, 32, 48)
    trace = vs.capture(model, pixels)
    tokens = trace.grid.num_tokens
    row = trace.readout[:, None]
    for layer in reversed(range(3)):
        row = row @ (trace.attention(layer).mean(1) + torch.eye(tokens, device="cpu")) / 2
    torch.testing.assert_close(vs.rollout(model, pixels).values.flatten(1), row[:, 0, trace.grid.prefix :])


class Towers(nn.Module):
    """An image tower and a text tower with the same number of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = ByHand(fused=True), Homemade("fused")
        self.words = nn.Parameter(random(1, 17, 16))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.image(pixels) * self.text(self.words).mean()


def test_attention_of_a_text_tower_is_omitted() -> None:
    pixels = random(2, 3, 32, 32)
    with pytest.warns(vs.VitscopeWarning, match=r"1 of 3 attention calls .* independent of the image, e\.g\. text"):
        trace = vs.capture(vs.load(Towers().eval(), **LAYOUT), pixels)
    assert [step.module for step in trace.steps] == ["image.stages.0", "image.stages.1"]
    assert [call.reason for call in trace.omitted] == ["not the image"]
    expected = vs.rollout(vs.load(Homemade("fused"), **LAYOUT), pixels).values
    torch.testing.assert_close(vs.rollout(trace).values, expected)


class UnusedBlock(nn.Module):
    """A model whose output does not depend on its second block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Conv2d(3, 16, 8, 8), nn.ModuleList(ByHand(fused=True) for _ in range(2))

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.blocks[0](self.embed(pixels).flatten(2).mT)
        self.blocks[1](tokens)
        return tokens.mean(1)


def test_a_model_that_ignores_its_last_block_has_no_rollout() -> None:
    model = vs.load(UnusedBlock().eval(), patch_size=8, readout="patches")
    with pytest.raises(UnsupportedModelError, match=r"does not depend on its last block, blocks\.1"):
        vs.rollout(model, random(1, 3, 32, 32))


def vit_pytorch(module: str, name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        library = pytest.importorskip(f"vit_pytorch.{module}")
        tiny = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 32, "depth": 2, "heads": 4, "mlp_dim": 48}
        return getattr(library, name)(**(tiny | options))

    return build


def timm_named(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, pretrained=False, **options)


def unfused_differential() -> nn.Module:
    module = timm.create_model("vit_dlittle_patch16_reg1_gap_256", pretrained=False, depth=2, img_size=64)
    for block in module.blocks:
        block.attn.fused_attn = False
    return module


NOT_ATTENTION: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "CaiT": (timm_named("cait_xxs24_224", depth=2, img_size=64), 64, r"blocks\.0\.attn .*changes .*softmax \(linear\)"),
    "ConViT": (timm_named("convit_tiny", depth=2, img_size=64), 64, r"blocks\.0\.attn .*changes .*softmax \(mul\)"),
    "EfficientFormerV2": (timm_named("efficientformerv2_s0"), 224, r"stages\.2\.blocks\.4\.token_mixer .*\(conv2d\)"),
    "differential": (
        timm_named("vit_dlittle_patch16_reg1_gap_256", depth=2, img_size=64), 64, r"blocks\.0\.attn .* in parallel",
    ),
    "differential, unfused": (unfused_differential, 64, r"blocks\.0\.attn .* axes of 1×10 .* and 5 heads"),
    "differential, parallel to an MLP": (
        timm_named("vit_dpwee_patch16_reg1_gap_256", depth=2, img_size=64), 64, r"blocks\.0 .* in parallel",
    ),
    "DeepViT": (vit_pytorch("deepvit", "DeepViT"), 32, r"transformer\.layers\.0\.0 .*changes .*\(einsum\)"),
    "vit_pytorch CaiT": (
        vit_pytorch("cait", "CaiT", cls_depth=1), 32, r"patch_transformer\.layers\.0\.0\.fn\.attend .*\(einsum\)",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", NOT_ATTENTION.values(), ids=NOT_ATTENTION)
def test_weights_that_do_not_multiply_the_values_are_refused(case: tuple[Any, ...]) -> None:
    build, size, message = case
    torch.manual_seed(0)
    with pytest.raises(UnsupportedModelError, match=f"^the attention of {message}") as caught:
        vs.capture(vs.load(build().eval()), random(1, 3, size, size))
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(": use a method that needs no attention, such as vitscope.lime")


class ExplicitBlock(nn.Module):
    """One block with a given use of the softmax result."""

    def __init__(self, mix: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.qkv, self.mix = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 48), mix
        self.drop = nn.Dropout(0.5)

    def weights_and_values(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = self.qkv(self.embed(pixels).flatten(2).mT).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return (query @ key.mT).softmax(-1), value

    def forward(self, pixels: Tensor) -> Tensor:
        return self.mix(*self.weights_and_values(pixels)).flatten(1)


UNCHANGED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda a, v: a @ v,
    "bmm": lambda a, v: torch.bmm(a.reshape(-1, *a.shape[2:]), v.flatten(0, 1)),
    "transposed": lambda a, v: v.mT @ a.transpose(-2, -1),
    "permuted by keyword": lambda a, v: torch.permute(a, dims=(0, 1, 3, 2)).permute(0, 1, 3, 2) @ v,
    "permuted, back": lambda a, v: a.permute(0, 2, 3, 1).permute(0, 3, 1, 2).contiguous() @ v,
    "einsum": lambda a, v: torch.einsum("bhij,bhjd->bihd", a, v),
    "einsum with an ellipsis": lambda a, v: torch.einsum("...ij,...jd->...id", a, v),
    "dropout": lambda a, v: F.dropout(a, 0.5, training=False) @ v,
    "dtype": lambda a, v: a.to(torch.float64) @ v.double(),
    "baddbmm": lambda a, v: torch.baddbmm(v.flatten(0, 1), a.flatten(0, 1), v.flatten(0, 1)),
}
CHANGED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "scaled": lambda a, v: (a * 0.5) @ v,
    "in place": lambda a, v: a.mul_(0.5) @ v,
    "heads mixed": lambda a, v: torch.einsum("bhij,hg->bgij", a, torch.ones(2, 2, device="cpu")) @ v,
    "over queries": lambda a, v: a.mT @ v,
    "mean of heads": lambda a, v: a.mean(1, keepdim=True) @ v,
    "assigned": lambda a, v: (a.__setitem__((..., 0), 0.0), a @ v)[1],
    "dropped": lambda a, v: F.dropout(a, 0.5, training=True) @ v,
}


@pytest.mark.slow
@pytest.mark.parametrize("mix", UNCHANGED.values(), ids=UNCHANGED)
def test_a_softmax_result_may_change_its_shape_or_dtype(mix: Callable[[Tensor, Tensor], Tensor]) -> None:
    module, pixels = ExplicitBlock(mix).eval(), random(2, 3, 32, 24)
    trace = vs.capture(module, pixels)
    torch.testing.assert_close(trace.attention(0), module.weights_and_values(pixels)[0].detach())


@pytest.mark.parametrize("mix", CHANGED.values(), ids=CHANGED)
def test_any_other_change_of_the_softmax_result_is_refused(mix: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(UnsupportedModelError, match="changes the result of its softmax"):
        vs.capture(ExplicitBlock(mix).eval(), random(2, 3, 32, 24))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_flow_is_recorded_in_half_precision_and_in_any_gradient_mode(dtype: torch.dtype, guard: Any) -> None:
    model = vs.load(Homemade("by hand").to(dtype).eval(), **LAYOUT)
    pixels = random(1, 3, 32, 32).to(dtype)
    with guard():
        assert vs.capture(model, pixels).why_unchained is None
        with pytest.raises(UnsupportedModelError, match="in parallel"):
            vs.rollout(vs.load(homemade_mirror().to(dtype).eval(), **LAYOUT), pixels)


def test_the_images_get_no_attributes() -> None:
    pixels = random(1, 3, 32, 32)
    vs.capture(vs.load(Homemade("fused").eval(), **LAYOUT), pixels)
    assert not vars(pixels)


def test_the_repr_of_a_trace_is_short() -> None:
    trace = vs.capture(vs.load(Homemade("fused").eval(), **LAYOUT), random(2, 3, 32, 32))
    assert repr(trace) == (
        "<Trace of Homemade: 2 images, 2 attention blocks, 2 heads × 17 tokens, grid 4×4 after cls, readout cls>"
    )
    assert repr(trace.steps[1]) == "<AttentionStep 1 stages.1: 2 heads × 17 tokens, grid 4×4 + 1>"
