"""Equality with LXT and torch-cam on their own ground; skipped without these packages.

LXT's own entry point patches classes of torch for the whole process, and its models of text do not import with
transformers 5. Here its rules are bound to the modules of one copy, and those models are not imported.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from types import MethodType, ModuleType
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.helpers import families
from tests.helpers.gradient_laws import in_float64

TOLERANCE = 2e-6  # relative to the largest value: results are float32
TARGET = 1
Rules = Literal["libra", "attn_lrp"]


def model_and_pixels(name: str) -> tuple[vs.VisionModel, Tensor]:
    family = next(family for family in families.ALL if family.name == name)
    return in_float64(family.model()), family.pixels()[..., :32].double()


def difference(values: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest expected value."""
    return float((values.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("start_layer", [0, 1, -1])
def test_le_grad_equals_torch_cam(start_layer: int) -> None:
    methods = pytest.importorskip("torchcam.methods")
    model, pixels = model_and_pixels("torchvision-vit")
    module: Any = deepcopy(model.module)
    with methods.LeGrad(module, list(module.encoder.layers)[start_layer:]) as extractor:
        scores = module(pixels)
        (expected,) = extractor(class_idx=[1, 4], scores=scores, normalized=False)
    result = vs.le_grad(model, pixels, target=[1, 4], start_layer=start_layer)
    assert difference(result.values, expected) < TOLERANCE


@dataclass(frozen=True)
class Lxt:
    """The modules of LXT that import with every version of transformers."""

    patches: Any
    zennit: Any
    vit: Any


@pytest.fixture
def lxt(monkeypatch: pytest.MonkeyPatch) -> Lxt:
    folder = pytest.importorskip("lxt").__path__[0]
    pytest.importorskip("zennit")
    for name, path in (("lxt.efficient", "efficient"), ("lxt.efficient.models", "efficient/models")):
        package = ModuleType(name)
        package.__path__ = [f"{folder}/{path}"]
        monkeypatch.setitem(sys.modules, name, package)
    names = ("patches", "zennit_patches", "models.vit_torch")
    return Lxt(*(importlib.import_module(f"lxt.efficient.{name}") for name in names))


def bind(module: nn.Module, kinds: dict[type[nn.Module], Callable[..., Tensor]]) -> None:
    """Give the modules of some classes a forward function of LXT."""
    for child in module.modules():
        function = kinds.get(type(child))
        if function is not None:
            child.original_forward = child.forward  # type: ignore[assignment]
            child.forward = MethodType(function, child)


def relevance(module: nn.Module, block: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return input × gradient of the input of the first block, (batch, token), and of the pixels."""
    streams: list[Tensor] = []
    handle = block.register_forward_pre_hook(lambda _, args: streams.append(args[0]))
    image = pixels.clone().requires_grad_()
    output = module(image)
    handle.remove()
    logits = output if isinstance(output, Tensor) else output.logits
    gradients = torch.autograd.grad(logits[:, TARGET].sum(), [streams[0], image])
    return (streams[0] * gradients[0]).sum(-1).detach(), (image * gradients[1]).sum(1).detach()


@contextmanager
def attention_of_transformers(wrap: Callable[..., Any]) -> Iterator[None]:
    """Wrap transformers' attention function inside a context."""
    functions = importlib.import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(functions, "sdpa", wrap(functions["sdpa"]))
        yield


@contextmanager
def gamma_rules(lxt: Lxt, module: nn.Module, gamma: float, conv_gamma: float) -> Iterator[None]:
    """Give all linear and convolution modules the γ-rule of zennit, as LXT calls it, inside a context."""
    rules, hook = importlib.import_module("zennit.rules"), importlib.import_module("zennit.core").BasicHook
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hook, "forward", lxt.zennit.forward)
        patch.setattr(hook, "backward", lxt.zennit.backward)
        for child in module.modules():
            value = {nn.Linear: gamma, nn.Conv2d: conv_gamma}.get(type(child))
            if value:
                rules.Gamma(gamma=value).register(child)
        yield


def relevance_of_lxt(
    lxt: Lxt, module: Any, pixels: Tensor, rules: Rules, gamma: float, conv_gamma: float
) -> tuple[Tensor, Tensor]:
    """Return the relevance of a ViT of transformers by LXT's rules: of tokens and of pixels."""
    module = deepcopy(module)
    activation = type(module.vit.layers[0].mlp.activation_fn)
    bind(module, {nn.LayerNorm: lxt.patches.layer_norm_forward, activation: lxt.patches.non_linear_forward})
    wrap = lxt.patches.wrap_attention_forward if rules == "attn_lrp" else lxt.patches.cp_wrap_attention_forward
    with attention_of_transformers(wrap), gamma_rules(lxt, module, gamma, conv_gamma):
        return relevance(module, module.vit.layers[0], pixels)


@pytest.mark.parametrize(("gamma", "conv_gamma"), [(0.0, 0.0), (0.05, 0.0), (0.1, 0.25)])
@pytest.mark.parametrize("rules", ["attn_lrp", "libra"])
def test_attn_lrp_and_libra_equal_lxt(lxt: Lxt, rules: Rules, gamma: float, conv_gamma: float) -> None:
    model, pixels = model_and_pixels("transformers-vit")
    tokens, image = relevance_of_lxt(lxt, model.module, pixels, rules, gamma, conv_gamma)
    options: Any = {"variant": "input_x_gradient"} if rules == "libra" else {}
    options |= {"target": TARGET, "gamma": gamma, "conv_gamma": conv_gamma}
    method: Any = vs.libra if rules == "libra" else vs.attn_lrp
    assert difference(method(model, pixels, **options).values.flatten(1), tokens[:, 1:]) < TOLERANCE
    assert difference(method(model, pixels, at="pixels", **options).values, image) < TOLERANCE


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


class Attention(nn.Module):
    """Attention of torch whose projections are modules, so that hooks see them."""

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads, self.out_proj = original.num_heads, linear(original.out_proj.weight, original.out_proj.bias)
        projections = zip(original.in_proj_weight.chunk(3), original.in_proj_bias.chunk(3), strict=True)
        self.in_proj = nn.ModuleList(linear(weight, bias) for weight, bias in projections)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> tuple[Tensor, None]:
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in zip(self.in_proj, (query, key, value), strict=True)
        )
        weights = (query.detach() @ key.detach().mT * query.shape[-1] ** -0.5).softmax(-1)
        return self.out_proj((weights @ value).transpose(1, 2).flatten(2)), None


@pytest.mark.parametrize("gamma", [0.0, 0.1])
def test_libra_equals_the_vit_example_of_lxt(lxt: Lxt, gamma: float) -> None:
    """With γ, the example leaves out the projections of attention, which are no modules; here every linear has it."""
    model, pixels = model_and_pixels("torchvision-vit")
    example: Any = deepcopy(model.module)
    bind(example, {kind: patch.args[0] for kind, patch in lxt.vit.cp_LRP.items()})
    with gamma_rules(lxt, example, gamma, 0.0):
        tokens, _ = relevance(example, example.encoder.layers[0], pixels)
    result = vs.libra(model, pixels, target=TARGET, variant="input_x_gradient", gamma=gamma)
    values = result.values.flatten(1)
    if gamma == 0:
        assert difference(values, tokens[:, 1:]) < TOLERANCE
        return
    assert difference(values, tokens[:, 1:]) > 0.1
    complete: Any = deepcopy(model.module)
    for layer in complete.encoder.layers:
        layer.self_attention = Attention(layer.self_attention)
    bind(complete, {nn.LayerNorm: lxt.patches.layer_norm_forward, nn.GELU: lxt.patches.non_linear_forward})
    with gamma_rules(lxt, complete, gamma, 0.0):
        tokens, _ = relevance(complete, complete.encoder.layers[0], pixels)
    assert difference(values, tokens[:, 1:]) < TOLERANCE
