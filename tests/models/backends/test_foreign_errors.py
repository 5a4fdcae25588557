"""Errors that a module raises are quoted in one line; the caller's own exceptions pass through unchanged."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

import vitscope as vs
from tests.helpers.live import WithOutput, images, timm_vit
from vitscope.errors import CallError, WorkError


class OwnError(Exception):
    """An exception of the caller's own."""


class OwnRuntimeError(RuntimeError):
    """An exception of the caller's own that derives from RuntimeError, which torch raises."""


class OwnValueError(ValueError):
    pass


class Raising(nn.Module):
    """A module that runs a vision transformer, then raises."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.backbone, self.error = timm_vit(5), error

    def forward(self, pixels: Tensor) -> Tensor:
        self.backbone(pixels)
        raise self.error


METHODS: dict[str, Callable[[vs.VisionModel], Any]] = {
    "predict": lambda model: model.predict(images(1)),
    "capture": lambda model: vs.capture(model, images(1)),
    "rollout": lambda model: vs.rollout(model, images(1)),
    "occlusion": lambda model: vs.occlusion(model, images(1), target=0),
    "rise": lambda model: vs.rise(model, images(1), num_samples=4, target=0),
    "lime": lambda model: vs.lime(model, images(1), num_samples=4, target=0, segments="patches"),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "error",
    [
        TypeError("forward() missing 1 required positional argument: 'text'"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied\n(17x32 and 64x5)"),
        ValueError("Input image size doesn't match model"),
        KeyError("pixel_values"),
        AttributeError("'Tensor' object has no attribute 'x'"),
        IndexError("index 9 is out of bounds"),
        NotImplementedError("Module lacks forward"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_a_module_are_quoted_in_one_line(error: Exception, method: str) -> None:
    module = Raising(error)
    with pytest.raises(WorkError) as caught:
        METHODS[method](vs.load(module))
    message = str(caught.value)
    assert "\n" not in message
    first = str(error).splitlines()[0]
    assert (
        message
        == f"Raising failed on an input of 1×3×32×32 (batch×channel×height×width): {type(error).__name__}: {first}"
    )
    assert caught.value.__cause__ is error
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "error", [OwnError("mine"), OwnRuntimeError("mine"), OwnValueError("mine")], ids=lambda error: type(error).__name__
)
def test_the_callers_own_exceptions_pass_through(error: Exception, method: str) -> None:
    module = Raising(error).train()
    with pytest.raises(type(error)) as caught:
        METHODS[method](vs.load(module))
    assert caught.value is error
    assert all(child.training for child in (module, module.backbone.blocks))  # type: ignore[union-attr]
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)], ids=lambda error: type(error).__name__)
def test_interrupts_pass_through(error: BaseException) -> None:
    with pytest.raises(type(error)):
        vs.load(Raising(error), image_size=32).predict(images(1))


def test_a_missing_argument_is_quoted() -> None:
    class NeedsText(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = timm_vit(5)

        def forward(self, pixels: Tensor, text: Tensor) -> Tensor:
            return self.backbone(pixels) + text

    with pytest.raises(WorkError, match=r"^NeedsText failed on .*missing 1 required positional argument: 'text'$"):
        vs.load(NeedsText()).predict(images(1))


def test_the_error_for_another_size_is_quoted() -> None:
    pixels = images(1)[:, :, :24, :24]
    with pytest.raises(CallError, match=r"^WithOutput does not accept an input of 24×24 pixels: .*24.*") as caught:
        vs.load(WithOutput()).predict(pixels)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["logits", "embed"])
def test_errors_of_the_callers_function_are_quoted(name: str) -> None:
    options: dict[str, Any] = {name: lambda returned: returned["nothing"]}
    model = vs.load(WithOutput(lambda rows: {"rows": rows, "more": rows}), **options)
    with pytest.raises(WorkError, match=r"^WithOutput failed on an input of 1×3×32×32 .*KeyError: 'nothing'$"):
        vs.occlusion(model, images(1), target="similarity" if name == "embed" else 0)
