"""Pickles of a VisionModel: bit-identical predictions and attention, or one line that says what prevents it."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.helpers.every_model import LABELS, Case, case, every_case
from tests.helpers.live import WithOutput, hf_vit, images, timm_swin, timm_vit, torchvision_vit
from vitscope.attention.trace import AttentionStep
from vitscope.errors import UnsupportedModelError
from vitscope.models.adapters import add_adapters
from vitscope.models.heads import reset_classifier
from vitscope.models.pickling import check_picklable


def unpickle(model: vs.VisionModel) -> vs.VisionModel:
    """Return the model after a round trip through pickle."""
    result = pickle.loads(pickle.dumps(model))
    assert isinstance(result, vs.VisionModel)
    return result


def rows(model: vs.VisionModel, pixels: Tensor) -> Tensor | None:
    """Return logits, or features, or None if the model computes neither."""
    with torch.no_grad(), model.running():
        logits = model.logits_or_none(pixels)
        if logits is None and model.embed is not None:
            return model.features(pixels)
    return logits


def assert_identical(first: vs.VisionModel, second: vs.VisionModel, pixels: Tensor) -> None:
    """Assert that two models compute the same numbers and the same attention, bit for bit."""
    expected, result = rows(first, pixels), rows(second, pixels)
    assert (expected is None) == (result is None)
    if expected is not None and result is not None:
        assert torch.equal(expected, result)
    traces = [vs.capture(model, pixels) for model in (first, second)]
    assert len(traces[0].steps) == len(traces[1].steps) > 0
    for before, after in zip(traces[0].steps, traces[1].steps, strict=True):
        assert before.module == after.module
        if isinstance(before, AttentionStep):
            assert torch.equal(before.weights(), after.weights())
        else:
            assert torch.equal(before.shares("norm"), after.shares("norm"))
    for name in ("name", "library", "labels", "versions", "preprocessing", "meaning", "backbone", "no_preprocessing"):
        assert getattr(first, name) == getattr(second, name), name
    assert (first.layout is None) == (second.layout is None)
    if first.layout is not None and second.layout is not None:
        assert first.layout.readout == second.layout.readout


@pytest.mark.slow
@every_case
def test_every_family_is_identical_after_pickling(case: Case) -> None:
    model = case.model()
    assert_identical(model, unpickle(model), case.pixels)


@pytest.mark.slow
@every_case
def test_every_family_with_a_new_classifier_is_identical_after_pickling(case: Case) -> None:
    model = reset_classifier(case.model(), LABELS)
    assert_identical(model, unpickle(model), case.pixels)


@pytest.mark.slow
@every_case
def test_every_family_can_be_pickled_again(case: Case) -> None:
    """The pickle of a copy that has run holds the same objects."""
    model = unpickle(case.model())
    rows(model, case.pixels)
    assert_identical(model, unpickle(model), case.pixels)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_works(protocol: int) -> None:
    model = case("transformers-vit").model()
    assert_identical(model, pickle.loads(pickle.dumps(model, protocol)), case("transformers-vit").pixels)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit-nano", "swin-nano"])
def test_bundled_models_are_pickled_with_their_weights(name: str) -> None:
    """Weights in a mapped file are not aligned in memory like those of a copy, which changes the last bit of a sum."""
    model = vs.load(name)
    twin = unpickle(model)
    state = twin.module.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.module.state_dict().items())
    assert_identical(copy.deepcopy(model), twin, images(1))
    torch.testing.assert_close(rows(twin, images(1)), rows(model, images(1)), atol=1e-5, rtol=1e-5)


def take_entry(returned: dict[str, Tensor], key: str) -> Tensor:
    """Return an entry of the output."""
    return returned[key]


def as_entry(returned: Tensor) -> dict[str, Tensor]:
    """Return the rows inside a mapping."""
    return {"rows": returned}


LOADED: dict[str, Callable[[], vs.VisionModel]] = {
    "timm by name": lambda: vs.load("timm:test_vit", pretrained=False, image_size=32),
    "container": lambda: vs.load(WithOutput(torch.sigmoid)),
    "selected entry": lambda: vs.load(WithOutput(as_entry), select="rows", output="logits"),
    "logits=": lambda: vs.load(WithOutput(as_entry), logits=partial(take_entry, key="rows")),
    "embed=": lambda: vs.load(WithOutput(as_entry), embed=partial(take_entry, key="rows")),
    "features": lambda: vs.load(timm_vit(5), output="features"),
    "labels": lambda: vs.load(torchvision_vit(5), labels=list("abcde")),
    "DataParallel": lambda: vs.load(nn.DataParallel(hf_vit(5))),
    "Swin inside a module": lambda: vs.load(nn.Sequential(timm_swin(5)), output="logits"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOADED)
@pytest.mark.parametrize("evaluated", [False, True])
def test_loaded_models_are_identical_after_pickling(kind: str, evaluated: bool) -> None:
    model = LOADED[kind]()
    if evaluated:
        rows(model, images(1))
    assert_identical(model, unpickle(model), images(1))


@pytest.mark.slow
def test_a_swin_read_by_window_tokens_is_identical_after_pickling() -> None:
    model = reset_classifier(case("timm-swin").model(), LABELS, by_windows=True)
    assert_identical(model, unpickle(model), case("timm-swin").pixels)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformers-vit", "timm-swin"])
def test_a_model_with_adapters_is_identical_after_pickling(name: str) -> None:
    model = reset_classifier(case(name).model(), LABELS)
    for parameter in add_adapters(model.module, ("attention", "mlp", "parallel"), 4):
        nn.init.normal_(parameter, std=0.1)
    assert_identical(model, unpickle(model), case(name).pixels)


def test_a_few_shot_classifier_is_identical_after_pickling() -> None:
    random = np.random.default_rng(0)
    examples = {name: random.integers(0, 256, (32, 32, 3), dtype=np.uint8) for name in ("a", "b")}
    bare = case("transformers-vit-bare")
    model = vs.few_shot_classifier(bare.model(), examples)
    assert_identical(model, unpickle(model), bare.pixels)


def test_models_that_share_a_module_share_it_after_pickling() -> None:
    first = vs.load("vit-nano")
    second = vs.load(first.module)
    again = pickle.loads(pickle.dumps((first, second)))
    assert again[0].module is again[1].module


# Modules that pickle does not support


def local_class() -> vs.VisionModel:
    class Local(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = timm_vit(5)

        def forward(self, pixels: Tensor) -> Tensor:
            return self.inner(pixels)

    return vs.load(Local().eval(), output="logits")


def with_hook() -> vs.VisionModel:
    module = hf_vit(5)
    module.register_forward_hook(lambda *_: None)
    return vs.load(module)


def with_generator() -> vs.VisionModel:
    module: Any = timm_vit(5)
    module.batches = (batch for batch in range(3))
    return vs.load(module)


IMPOSSIBLE: dict[str, Callable[[], vs.VisionModel]] = {
    "local class": local_class,
    "lambda in a module": lambda: vs.load(WithOutput(lambda logits: logits), output="logits"),
    "lambda as logits": lambda: vs.load(timm_vit(5), logits=lambda returned: returned),
    "hook": with_hook,
    "generator": with_generator,
}


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_a_model_that_cannot_be_pickled_says_why_in_one_line(kind: str) -> None:
    model = IMPOSSIBLE[kind]()
    with pytest.raises(UnsupportedModelError) as caught:
        pickle.dumps(model)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{model.name} cannot be pickled (")
    assert type(caught.value.__cause__).__name__ in message
    assert message.endswith("define its classes, functions and hooks at the top level of a Python file")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in IMPOSSIBLE if kind != "generator"])
def test_a_model_that_cannot_be_pickled_can_still_be_copied(kind: str) -> None:
    model = IMPOSSIBLE[kind]()
    assert_identical(model, copy.deepcopy(model), images(1))
    assert copy.deepcopy(model).module is not model.module
    assert copy.copy(model).module is model.module


def test_the_check_does_not_copy_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def count(_: Any, data: bytes) -> int:
        sizes.append(len(data))
        return len(data)

    monkeypatch.setattr("vitscope.models.pickling._Discard.write", count)
    model = vs.load("vit-nano")
    check_picklable(model.name, vars(model), pickle.DEFAULT_PROTOCOL)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.module.parameters())
    assert 0 < sum(sizes) < weights / 20
