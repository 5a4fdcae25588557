"""Modules around a model, and states of torch: each method gives the map of the model inside, or refuses in a line."""

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import vitscope as vs
from tests.helpers.live import hf_vit, images, timm_vit
from vitscope.errors import UnsupportedModelError, VitscopeError
from vitscope.tracing.gradients import GradientOptions, capture_gradients

METHODS: dict[str, Callable[..., Any]] = {
    "input_x_gradient": vs.input_x_gradient,
    "input_x_gradient of pixels": lambda *args, **options: vs.input_x_gradient(*args, at="pixels", **options),
    "integrated_gradients": lambda *args, **options: vs.integrated_gradients(*args, steps=2, **options),
    "smooth_grad": lambda *args, **options: vs.smooth_grad(*args, samples=2, **options),
    "grad_cam": vs.grad_cam,
    "generic_attention": vs.generic_attention,
    "gradient_rollout": vs.gradient_rollout,
    "le_grad": vs.le_grad,
    "transformer_attribution": vs.transformer_attribution,
    "attn_lrp": lambda *args, **options: vs.attn_lrp(*args, gamma=0.1, conv_gamma=0.1, at="pixels", **options),
    "libra": vs.libra,
    "token_tm": vs.token_tm,
    "att_cat": lambda *args, **options: vs.att_cat(*args, rules="libra", **options),
    "transition_attention": lambda *args, **options: vs.transition_attention(*args, steps=2, **options),
    "activation_patching": vs.activation_patching,
    "head_importance": lambda *args, **options: vs.head_importance(*args, by="gradient", **options),
    "rollout": lambda model, pixels, **_: vs.rollout(model, pixels),
    "attention_map": lambda model, pixels, **_: vs.attention_map(model, pixels),
}
# The type checks draw random numbers of their own.
pytestmark = pytest.mark.usefixtures("unchecked")


def explain(method: str, model: Any, pixels: Tensor, **options: Any) -> Tensor:
    """Return the map of the second class."""
    values: Tensor = METHODS[method](model, pixels, target=1, **options).values
    return values


def deep_vit(**options: Any) -> nn.Module:
    """Return a ViT with three blocks: with two, some maps are zero."""
    return timm_vit(5, depth=3, **options)


def assert_same(method: str, values: Tensor, expected: Tensor, relative: float = 2e-5) -> None:
    # The relevance of a random model is a sum of much larger terms.
    relative = max(relative, 1e-3) if method == "transformer_attribution" else relative
    torch.testing.assert_close(values, expected, rtol=0, atol=relative * float(expected.abs().max()))


class Around(nn.Module):
    """A module that computes with a ViT."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.vit, self.run = deep_vit(), run
        self.eval()

    def forward(self, pixels: Tensor) -> Any:
        return self.run(self.vit, pixels)


def two_views(change: Callable[[Tensor], Tensor]) -> vs.VisionModel:
    return vs.load(Around(lambda vit, pixels: (vit(pixels) + vit(change(pixels))) / 2), output="logits")


def with_two_heads(vit: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    logits = vit(pixels)
    return {"a": logits, "b": -logits[:, :3]}


def checkpointed(module: Any) -> nn.Module:
    module.set_grad_checkpointing()
    return module


def weight_norm(module: nn.Module) -> nn.Module:
    for child in list(module.modules()):
        if isinstance(child, nn.Linear):
            parametrizations.weight_norm(child)
    return module


def with_hooks(module: nn.Module) -> nn.Module:
    for child in module.modules():
        child.register_forward_pre_hook(lambda _, args: args)
        child.register_forward_hook(lambda _, __, output: output.clone())
        child.register_full_backward_hook(lambda *_: None)
    return module


def in_training(module: nn.Module) -> nn.Module:
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.5
    return module.train()


MODULES: dict[str, Callable[[], Any]] = {
    "resized": lambda: Around(lambda vit, pixels: vit(F.interpolate(pixels, size=(32, 32)))),
    "in a DataParallel": lambda: Around(lambda vit, pixels: nn.DataParallel(vit)(pixels)),
    "select of two heads": lambda: vs.load(Around(with_two_heads), select="a", output="logits"),
    "parametrized": lambda: weight_norm(deep_vit()),
    "hooks": lambda: with_hooks(deep_vit()),
    "training": lambda: in_training(deep_vit()),
    "frozen": lambda: deep_vit().requires_grad_(False),
    "copy of a VisionModel": lambda: copy.deepcopy(vs.load(deep_vit())),
    "checkpointing": lambda: checkpointed(deep_vit()),
}


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return {method: explain(method, deep_vit(), images()) for method in METHODS}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # the hook is the user's own
@pytest.mark.parametrize("name", MODULES)
def test_modules_that_change_nothing_give_the_same_maps(name: str, expected: dict[str, Tensor]) -> None:
    model, training = MODULES[name](), name == "training"
    for method, values in expected.items():
        assert_same(method, explain(method, model, images()), values)
    if isinstance(model, nn.Module):
        assert model.training == training
        assert all(parameter.grad is None for parameter in model.parameters())


class Subclass(Tensor):
    """A tensor of a class of its own."""


PIXELS: dict[str, Callable[[], Tensor]] = {
    "subclass": lambda: images().as_subclass(Subclass),
    "parameter": lambda: nn.Parameter(images()),
    "with a graph": lambda: images().requires_grad_() * 1.0,
}


@pytest.mark.parametrize("kind", PIXELS)
def test_kinds_of_tensors(kind: str, expected: dict[str, Tensor]) -> None:
    model, pixels = vs.load(deep_vit()), PIXELS[kind]()
    for method, values in expected.items():
        result = explain(method, model, pixels)
        assert type(result) is Tensor
        assert not result.requires_grad
        assert_same(method, result, values)
    assert pixels.grad is None if pixels.is_leaf else True


class DefaultDtype:
    """A context in which torch's default dtype is float64."""

    def __enter__(self) -> None:
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(torch.float32)


class Deterministic:
    """A context in which torch refuses operations that are not deterministic."""

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)


STATES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "grad off": lambda: torch.set_grad_enabled(False),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "deterministic": Deterministic,
    "float64": DefaultDtype,
    "meta": lambda: torch.device("meta"),
}


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES)
def test_states_of_torch_change_nothing(state: str, expected: dict[str, Tensor]) -> None:
    model, pixels = vs.load(deep_vit()), images()
    context: AbstractContextManager[Any] = STATES[state]()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Anomaly Detection")
        with context:
            results = {method: explain(method, model, pixels) for method in METHODS}
    for method, values in results.items():
        assert_same(method, values, expected[method])


@pytest.mark.slow
def test_autocast_of_the_caller(expected: dict[str, Tensor]) -> None:
    """The model runs in bfloat16, as the caller wants; the backward pass and the folds do not, and it is recorded."""
    model, pixels = vs.load(deep_vit()), images()
    model.module.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        result = vs.attn_lrp(model, pixels, target=1, gamma=0.1)
        for method in METHODS:
            if method not in ("transformer_attribution", "activation_patching"):  # differences of rounded numbers
                assert_same(method, explain(method, model, pixels), expected[method], 0.1)
        model.module(pixels).float().sum().backward()  # the cache of autocast holds no weights without a graph
    assert all(parameter.grad is not None for parameter in model.module.parameters())
    assert result.provenance["dtype"] == "bfloat16"
    assert vs.attn_lrp(model, pixels, target=1).provenance["dtype"] == "float32"
    plain = vs.attn_lrp(model, pixels, target=1, gamma=0.1).values
    assert_same("attn_lrp", result.values, plain, 0.05)


def test_the_backward_pass_is_not_under_autocast() -> None:
    options = GradientOptions(rules="attn_lrp", gamma=0.1, weights=False)
    with torch.autocast("cpu", torch.bfloat16), capture_gradients(deep_vit(), images(), options) as run:
        score, start = run.output[:, 1], [run.start]
        (inside,) = run.gradients(score, start, keep_graph=True)
        with torch.autocast("cpu", enabled=False):
            (outside,) = run.gradients(score, start, keep_graph=True)
        assert torch.equal(inside, outside)
        with pytest.raises(UnsupportedModelError, match="has no gradient with respect to its tokens"):
            run.gradients(score, [torch.zeros(1, device="cpu")])


@pytest.mark.parametrize("flipped", [False, True])
def test_two_views_of_an_image(flipped: bool) -> None:
    model = two_views((lambda x: x.flip(-1)) if flipped else (lambda x: 0.9 * x))
    pixels = images()
    for method in METHODS:
        if not flipped and method in ("input_x_gradient of pixels", "attn_lrp", "attention_map"):
            continue
        with pytest.raises(UnsupportedModelError) as caught:
            explain(method, model, pixels)
        message = str(caught.value)
        assert "\n" not in message
        assert ("flipped or cropped views" in message) == flipped
        assert flipped or any(text in message for text in ("several times", "in parallel", "one after the other"))
    if flipped:
        return
    leaf = pixels.double().requires_grad_()
    module = copy.deepcopy(model.module).double()
    (gradient,) = torch.autograd.grad(module(leaf)[:, 1].sum(), leaf)
    result = explain("input_x_gradient of pixels", model, pixels)
    assert_same("input_x_gradient", result.double(), (leaf * gradient).sum(1).detach())
    first = vs.attention_map(model.module.vit, pixels).values
    assert_same("attention_map", vs.attention_map(model, pixels, layer=2).values, first)


def test_a_module_that_splits_the_batch() -> None:
    model = Around(lambda vit, pixels: torch.cat([vit(image) for image in pixels.split(1)]))
    for batch in (1, 2):
        for method in (vs.rollout, vs.libra):
            with pytest.raises(UnsupportedModelError, match="does not attend in all images of a batch at once"):
                method(model, images()[:batch])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_backbone_without_gradients(mode: Any) -> None:
    def run(vit: nn.Module, pixels: Tensor) -> Tensor:
        with mode():
            features = vit(pixels)
        return features.clone() * 2

    model = vs.load(Around(run), output="logits")
    for method in METHODS:
        if method in ("rollout", "attention_map", "activation_patching"):
            assert bool(explain(method, model, images()).isfinite().all())
            continue
        with pytest.raises(UnsupportedModelError, match="has no gradient with respect to its tokens") as caught:
            explain(method, model, images())
        assert "\n" not in str(caught.value)


def test_a_block_that_detaches_is_refused() -> None:
    module = deep_vit()
    module.blocks[1].register_forward_hook(lambda _, __, output: output.detach())
    for method in ("libra", "att_cat", "grad_cam", "input_x_gradient", "token_tm"):
        with pytest.raises(UnsupportedModelError, match=r"the graph ends in blocks\.1;"):
            explain(method, module, images())


def test_probabilities_are_not_logits() -> None:
    model = vs.load(Around(lambda vit, pixels: vit(pixels).softmax(-1)))
    with pytest.raises(VitscopeError, match="gives probabilities, not logits"):
        vs.libra(model, images(), target=1)
    leaf = images().double().requires_grad_()
    twin = deep_vit().double()
    (gradient,) = torch.autograd.grad(twin(leaf).softmax(-1)[:, 1].sum(), leaf)
    result = vs.input_x_gradient(model, images(), target=1, output="probability", at="pixels").values
    assert_same("input_x_gradient", result.double(), (leaf * gradient).sum(1).detach())


@pytest.mark.slow
def test_a_target_that_explains_another_model() -> None:
    model, pixels = vs.load(deep_vit()), images()
    other = hf_vit(5)
    inner: list[Tensor] = []

    def target(output: Tensor) -> Tensor:
        inner.append(vs.generic_attention(other, pixels, target=2).values)
        inner.append(vs.rollout(model, pixels).values)
        return output[:, 1]

    for method in ("input_x_gradient", "generic_attention", "libra", "le_grad", "token_tm"):
        values = METHODS[method](model, pixels, target=target).values
        assert_same(method, values, explain(method, model, pixels))
    alone = vs.generic_attention(other, pixels, target=2).values, vs.rollout(model, pixels).values
    for index, values in enumerate(inner):
        assert torch.equal(values, alone[index % 2])


@pytest.mark.filterwarnings("error")
def test_the_swapped_attention_of_a_library_model_is_missed() -> None:
    """A user replaces the attention of one block of timm by attention without a softmax."""

    class Linear(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, tokens: Tensor, **_: Any) -> Tensor:
            q, k, v = self.inner.qkv(tokens).chunk(3, -1)
            return self.inner.proj((q.relu() @ (k.relu().mT @ v)) / tokens.shape[1])

    module = deep_vit()
    module.blocks[1].attn = Linear(module.blocks[1].attn)
    for method in ("rollout", "generic_attention", "gradient_rollout", "transformer_attribution", "le_grad"):
        with pytest.raises(UnsupportedModelError, match=r"blocks\.1 mixes tokens without attention"):
            explain(method, module, images())
    with pytest.raises(UnsupportedModelError):
        explain("libra", module, images())
