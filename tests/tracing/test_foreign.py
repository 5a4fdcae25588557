"""Custom modules: attention is captured without a layout, rollout needs one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.helpers.tiny import photo, refusal, tiny_vit
from vitscope.errors import UnsupportedModelError


class ByHand(nn.Module):
    """Multi-head attention as it is commonly written in notebooks."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.fused = nn.Linear(16, 48), nn.Linear(16, 16), fused

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        else:
            mixed = torch.softmax(query @ key.mT / 8**0.5, dim=-1) @ value
        return self.out(mixed.transpose(1, 2).flatten(2))


class TorchAttention(nn.MultiheadAttention):
    def __init__(self) -> None:
        super().__init__(16, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens, tokens, tokens, need_weights=False)[0]


class Homemade(nn.Module):
    """A custom vision transformer: a CLS token, patches of 8 pixels, two layers."""

    def __init__(self, kind: str, output: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, 16, 8, 8)
        self.cls = nn.Parameter(torch.randn(1, 1, 16))
        self.head = nn.Linear(16, 5)
        by_hand = [ByHand(kind == "fused") for _ in range(2)]
        self.stages = nn.ModuleList(TorchAttention() if kind == "torch" else layer for layer in by_hand)
        self.output = output or (lambda logits: logits)
        with torch.no_grad():
            for layer, source in zip(self.stages, by_hand, strict=True):
                source.qkv.weight.mul_(4)
                if kind == "torch":
                    layer.in_proj_weight.copy_(source.qkv.weight)
                    layer.in_proj_bias.copy_(source.qkv.bias)
                    layer.out_proj.load_state_dict(source.out.state_dict())

    def forward(self, pixels: Tensor) -> Any:
        tokens = self.embed(pixels).flatten(2).mT
        tokens = torch.cat([self.cls.expand(len(tokens), -1, -1), tokens], dim=1)
        for layer in self.stages:
            tokens = tokens + layer(tokens)
        return self.output(self.head(tokens[:, 0]))


def expected_attention(pixels: Tensor) -> list[Tensor]:
    """Return the attention of each layer of a Homemade model, computed from the definition."""
    module = Homemade("by hand").double()
    tokens = module.embed(pixels.double()).flatten(2).mT
    tokens = torch.cat([module.cls.expand(len(tokens), -1, -1), tokens], dim=1)
    maps = []
    for layer in module.stages:
        query, key, _ = layer.qkv(tokens).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        scores = (query @ key.mT / 8**0.5).exp()
        maps.append((scores / scores.sum(-1, keepdim=True)).float().detach())
        tokens = tokens + layer(tokens)
    return maps


HOMEMADE = ["torch", "by hand", "fused"]
LAYOUT: dict[str, Any] = {"patch_size": 8, "prefix": ("cls",), "readout": "cls"}


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, LAYOUT], ids=["bare", "with layout"])
@pytest.mark.parametrize("kind", HOMEMADE)
def test_the_attention_of_a_custom_module_is_captured(kind: str, layout: dict[str, Any]) -> None:
    pixels = torch.randn(2, 3, 32, 24)
    trace = vs.capture(vs.load(Homemade(kind), **layout), pixels)
    assert [step.module for step in trace.steps] == ["stages.0", "stages.1"]
    for layer, expected in enumerate(expected_attention(pixels)):
        torch.testing.assert_close(trace.attention(layer), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", HOMEMADE)
def test_a_custom_module_with_a_layout_has_a_rollout(kind: str) -> None:
    pixels = torch.randn(2, 3, 32, 24)
    model = vs.load(Homemade(kind), **LAYOUT)
    assert (model.library, model.name) == ("module", "Homemade")
    row = torch.eye(13)[:1].expand(2, 1, 13)
    for attention in reversed(expected_attention(pixels)):
        row = row @ (attention.mean(1) + torch.eye(13)) / 2
    torch.testing.assert_close(vs.rollout(model, pixels).values, row[:, 0, 1:].unflatten(-1, (4, 3)), atol=1e-6, rtol=0)


def test_a_custom_module_without_a_layout_names_the_missing_arguments() -> None:
    pixels = torch.randn(1, 3, 32, 32)
    model = vs.load(Homemade("fused"))
    trace = vs.capture(model, pixels)
    for call in (lambda: trace.map(-1), lambda: vs.rollout(trace), lambda: vs.rollout(model, pixels)):
        message = r"token grid.* pass patch_size, prefix and readout to vitscope\.load"
        with pytest.raises(UnsupportedModelError, match=message):
            call()


def test_a_custom_module_takes_photos_if_its_size_is_known() -> None:
    with pytest.raises(vs.CallError, match=r"pass a tensor .* or image_size to vitscope\.load"):
        vs.capture(vs.load(Homemade("fused")), photo(40, 40))
    model = vs.load(Homemade("fused"), image_size=(32, 24), **LAYOUT)
    pixels, _ = model.prepare(photo(40, 50))
    assert pixels.shape == (1, 3, 32, 24)
    assert pixels.abs().max() <= 1
    assert vs.rollout(model, photo(40, 50)).values.shape == (1, 4, 3)


@pytest.mark.parametrize(
    ("readout", "expected"),
    [
        ("cls", [1.0, 0, 0, 0, 0]),
        ("patches", [0, 0.25, 0.25, 0.25, 0.25]),
        ({"cls": 0.5, "patches": 0.5}, [0.5, 0.125, 0.125, 0.125, 0.125]),
        ("tokens", [0.2] * 5),
    ],
    ids=str,
)
def test_the_readout_passed_to_load_is_used(readout: Any, expected: list[float]) -> None:
    model = vs.load(Homemade("fused"), **(LAYOUT | {"readout": readout}))
    torch.testing.assert_close(vs.capture(model, torch.randn(1, 3, 16, 16)).readout, torch.tensor([expected]))


@pytest.mark.parametrize(
    "layout",
    [
        {"patch_size": 8},
        {"patch_size": 8, "readout": "cls"},
        {"patch_size": 8, "readout": {"patches": 0.5}},
        {"patch_size": 8, "prefix": ("cls",), "readout": "register_1"},
        {"patch_size": 0, "readout": "patches"},
        {"prefix": ("cls",)},
        {"readout": "patches"},
    ],
    ids=str,
)
def test_an_incomplete_layout_is_refused(layout: dict[str, Any]) -> None:
    refusal(vs.CallError, Homemade("fused"), **layout)


def test_the_output_of_a_custom_module_is_classes_only_if_its_form_fits() -> None:
    pixels = torch.randn(2, 3, 32, 32)
    plain = vs.load(Homemade("fused")).predict(pixels)
    for output in (lambda logits: {"logits": logits}, lambda logits: logits[:, None], lambda logits: (logits,)):
        assert vs.load(Homemade("fused", output)).predict(pixels) == plain
    for output in (lambda _: None, lambda _: {"loss": 1}):
        model = vs.load(Homemade("fused", output))
        assert vs.capture(model, pixels).num_layers == 2
        with pytest.raises(UnsupportedModelError, match="Homemade has no classifier"):
            model.predict(pixels)


def test_a_compiled_module_is_captured_through_the_original_module() -> None:
    module = tiny_vit()
    pixels = torch.randn(1, 3, 32, 32)
    expected = vs.rollout(vs.load(module), pixels).values
    model = vs.load(torch.compile(module))
    assert model.module is module
    assert torch.equal(vs.rollout(model, pixels).values, expected)
