"""Methods do not change the model, the libraries or the process, even after a failure or between threads."""

import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import vitscope as vs
from tests.helpers.families import ALL, Family, every_family

# The type checks draw random numbers of their own.
pytestmark = pytest.mark.usefixtures("unchecked")

LOOKS: dict[str, Callable[[Any, Any], Any]] = {
    "capture": vs.capture,
    "capture, one layer": lambda model, images: vs.capture(model, images, layers=[-1]),
    "attention_map": vs.attention_map,
    "rollout": vs.rollout,
    "rollout_evolution": lambda model, images: vs.rollout_evolution(model, images, discard_ratio=0.5),
    "head_statistics": vs.head_statistics,
}

GLOBAL_HOOKS = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_forward_hooks_always_called",
    "_global_forward_hooks_with_kwargs",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
)


def state(module: nn.Module) -> dict[str, Any]:
    """Return everything about a model and the process that a method could change."""
    return {
        "weights": {name: tensor.clone() for name, tensor in module.state_dict().items()},
        "training": {name: child.training for name, child in module.named_modules()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in module.named_parameters()},
        "grad": {name: parameter.grad is not None for name, parameter in module.named_parameters()},
        "attributes": {name: sorted(vars(child)) for name, child in module.named_modules()},
        "hooks": {
            name: [list(value) for key, value in sorted(vars(child).items()) if key.endswith(("_hooks", "_called"))]
            for name, child in module.named_modules()
        },
        "global hooks": {name: list(getattr(torch_module, name)) for name in GLOBAL_HOOKS},
        "attention implementation": getattr(getattr(module, "config", None), "_attn_implementation", None),
        "torch random": torch.get_rng_state(),
        "numpy random": [np.asarray(entry).tolist() for entry in np.random.get_state(legacy=True)],
        "python random": random.getstate(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "kernels": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
            torch.backends.mha.get_fastpath_enabled(),
        ),
        "modes": torch._C._len_torch_function_stack(),
        "functions": (torch.nn.functional.scaled_dot_product_attention, torch.softmax, nn.Module.__call__),
        "pixel limit": Image.MAX_IMAGE_PIXELS,
    }


def assert_same(now: Any, before: Any, path: str = "state") -> None:
    if isinstance(before, Mapping):
        assert list(now) == list(before), path
        for key in before:
            assert_same(now[key], before[key], f"{path}: {key}")
    elif isinstance(before, Tensor):
        assert torch.equal(now, before), path
    else:
        assert now == before, path


def mixed(module: nn.Module) -> nn.Module:
    """Put every other submodule in training mode, freeze every other parameter, and enable dropout."""
    for i, child in enumerate(module.modules()):
        child.training = i % 2 == 0
        if isinstance(child, nn.Dropout):
            child.p = 0.5
    for i, parameter in enumerate(module.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    return module


@pytest.fixture
def photo(chelsea: np.ndarray, tmp_path: Path) -> Path:
    path = tmp_path / "chelsea.png"
    Image.fromarray(chelsea).save(path)
    return path


@pytest.mark.slow
@every_family
def test_a_run_leaves_no_trace(family: Family, photo: Path) -> None:
    model = family.model()
    mixed(model.module)
    before = state(model.module)
    for look in LOOKS.values():
        look(model, photo)
        look(model.module, photo)  # a live module is described again at each call
    assert_same(state(model.module), before)


class TroubleError(Exception):
    pass


@pytest.mark.slow
@every_family
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_run_that_fails_leaves_no_trace(family: Family, moment: str, photo: Path) -> None:
    """The second block raises before or after its attention has run."""
    model = family.model()
    mixed(model.module)
    blocks = [name for name, _ in model.module.named_modules() if name.endswith((".1", "encoder_layer_1"))]
    second = model.module.get_submodule(next(name for name in blocks if "layer" in name or "blocks" in name))

    def fail(*_: Any) -> None:
        raise TroubleError("in block 2")

    if moment == "before":
        second.register_forward_pre_hook(fail)
    else:
        second.register_forward_hook(fail)
    before = state(model.module)
    for look in LOOKS.values():
        with pytest.raises(TroubleError, match="in block 2"):
            look(model, photo)
    assert_same(state(model.module), before)


def test_an_interrupt_leaves_no_trace() -> None:
    model = family("timm-vit").model()
    mixed(model.module)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    model.module.blocks[1].attn.qkv.register_forward_pre_hook(interrupt)
    before = state(model.module)
    for look in LOOKS.values():
        with pytest.raises(KeyboardInterrupt):
            look(model, torch.zeros(1, 3, 32, 48))
    assert_same(state(model.module), before)


def test_results_hold_no_autograd_graph() -> None:
    model = family("timm-vit").model()
    pixels = torch.zeros(1, 3, 32, 48, requires_grad=True)
    trace = vs.capture(model, pixels)
    assert not trace.steps[0].scores.query.requires_grad
    assert not vs.rollout(model, pixels).values.requires_grad
    assert pixels.grad is None


def test_settings_that_differ_from_the_defaults_are_preserved() -> None:
    model = family("torchvision-vit").model()
    pixels = family("torchvision-vit").pixels()
    expected = vs.rollout(model, pixels).values
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        with torch.inference_mode():
            before = state(model.module)
            got = vs.rollout(model, pixels).values
            assert_same(state(model.module), before)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
        torch.backends.cuda.enable_flash_sdp(True)
    assert torch.equal(got, expected)


def family(name: str) -> Family:
    return next(family for family in ALL if family.name == name)


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    """Threads take turns a thousand times more often than usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def together(*works: Callable[[], None]) -> None:
    """Run the functions at the same time, one thread each; the first error is raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(works))

    def run(work: Callable[[], None]) -> None:
        start.wait()
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


Result = tuple[list[Tensor], list[str], Tensor]


def look(model: vs.VisionModel, pixels: Tensor) -> Result:
    trace = vs.capture(model, pixels)
    maps = [trace.attention(layer) for layer in range(trace.num_layers)]
    return maps, [step.module for step in trace.steps], vs.rollout(model, pixels).values


def looking(model: vs.VisionModel, pixels: Tensor, expected: Result, times: int = 15) -> Callable[[], None]:
    def work() -> None:
        for _ in range(times):
            maps, modules, rolled = look(model, pixels)
            assert modules == expected[1]
            for actual, reference in zip([*maps, rolled], [*expected[0], expected[2]], strict=True):
                # The first product of a new thread may differ in the last bit.
                torch.testing.assert_close(actual, reference, atol=1e-6, rtol=0)

    return work


@pytest.mark.slow
@pytest.mark.usefixtures("frequent_switches")
@pytest.mark.parametrize(
    "names", [("transformers-vit", "timm-vit"), ("torchvision-vit", "transformers-siglip")], ids=str
)
def test_two_threads_with_two_models(names: tuple[str, str]) -> None:
    models = [family(name).model() for name in names]
    pixels = [family(name).pixels() for name in names]
    before = [state(mixed(model.module)) for model in models]
    works = [looking(model, x, look(model, x)) for model, x in zip(models, pixels, strict=True)]
    together(*works)
    for model, saved in zip(models, before, strict=True):
        assert_same(state(model.module), saved)


@pytest.mark.slow
@pytest.mark.usefixtures("frequent_switches")
def test_two_threads_with_the_same_model() -> None:
    """The first thread to finish must not enable dropout during the other's run."""
    model, pixels = family("timm-vit").model(), family("timm-vit").pixels(3)
    mixed(model.module)
    for block in model.module.blocks:
        block.attn.proj_drop, block.attn.proj_drop.p = nn.Dropout(0.5), 0.5
    before = state(model.module)
    together(*[looking(model, batch, look(model, batch)) for batch in (pixels[:1], pixels[1:])])
    assert_same(state(model.module), before)


@pytest.mark.slow
@pytest.mark.usefixtures("frequent_switches")
def test_a_thread_that_runs_a_plain_model_is_unaffected(monkeypatch: pytest.MonkeyPatch) -> None:
    watched, pixels = family("transformers-vit").model(), family("transformers-vit").pixels()
    torch.manual_seed(0)
    plain = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    x = torch.randn(2, 5, 8)
    before = state(plain.eval())
    with torch.no_grad():
        expected = plain(x)
    native_calls: list[None] = []
    native = torch._transformer_encoder_layer_fwd

    def counted(*args: Any) -> Tensor:
        native_calls.append(None)
        return native(*args)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", counted)

    def run_plain() -> None:
        with torch.no_grad():
            for _ in range(100):
                torch.testing.assert_close(plain(x), expected, atol=1e-6, rtol=0)
                assert torch._C._len_torch_function_stack() == 0
        plain(x).sum().backward()
        assert all(parameter.grad is not None for parameter in plain.parameters())

    together(looking(watched, pixels, look(watched, pixels)), run_plain)
    assert len(native_calls) == 2 * 100  # both layers took their fast path every time
    plain.zero_grad()
    assert_same(state(plain), before)
