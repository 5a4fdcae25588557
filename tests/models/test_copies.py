"""Copies of a VisionModel: they answer alike, and they have weights of their own."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vitscope as vs
from tests.helpers import families, swin_families
from tests.helpers.live import Answering, hf_vit, images, timm_vit
from tests.helpers.swin_families import SIZES

WAYS: dict[str, Callable[[vs.VisionModel], vs.VisionModel]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}
each_way = pytest.mark.parametrize("way", WAYS)


def answer(model: vs.VisionModel, pixels: Tensor) -> Tensor:
    """Logits, or the features of a model without classes."""
    with torch.no_grad(), model.running():
        rows = model.answer_or_none(pixels)
        if rows is None:
            rows = model.features(pixels) if model.embed is not None else vs.attention_map(model, pixels).values
    return rows.clone()


def expect_copy(model: vs.VisionModel, way: str, pixels: Tensor) -> None:
    """Whatever is asked of the copy is answered by the copy's own weights."""
    before = answer(model, pixels)
    twin = WAYS[way](model)
    assert twin is not model
    assert twin.module is not model.module
    assert (twin.name, twin.library, twin.labels, twin.meaning) == (
        model.name,
        model.library,
        model.labels,
        model.meaning,
    )
    assert twin.preprocessing == model.preprocessing
    assert torch.equal(answer(twin, pixels), before)
    attention = vs.capture(model, pixels).steps[-1].weights()
    assert torch.equal(vs.capture(twin, pixels).steps[-1].weights(), attention)
    with torch.no_grad():
        for parameter in twin.module.parameters():
            parameter.zero_()
    changed = vs.capture(twin, pixels).steps[-1].weights()
    assert not torch.equal(changed, attention)
    assert not torch.equal(answer(twin, pixels), before)
    assert torch.equal(answer(model, pixels), before)
    assert torch.equal(vs.capture(model, pixels).steps[-1].weights(), attention)


@each_way
@families.every_family
def test_every_family(family: families.Family, way: str) -> None:
    expect_copy(family.model(), way, family.pixels(1))


@each_way
@swin_families.every_swin
def test_every_window_transformer(family: swin_families.SwinFamily, way: str) -> None:
    if family.name == "torchvision-swinv2" or family.name == "torchvision-swin":
        torch.manual_seed(0)  # their stochastic depth is drawn in training only
    expect_copy(family.model(SIZES["fitting"]), way, swin_families.pixels(SIZES["fitting"], 1))


@each_way
def test_a_rollout_through_windows(way: str) -> None:
    """Merging layers and norms are looked up by the copy's own modules."""
    family = swin_families.ALL[0]
    model, pixels = family.model(), swin_families.pixels(SIZES["fitting"], 1)
    before = vs.rollout(model, pixels, target=1).values
    twin = WAYS[way](model)
    assert torch.equal(vs.rollout(twin, pixels, target=1).values, before)
    with torch.no_grad():
        for parameter in twin.module.parameters():
            parameter.mul_(0.5)
    assert not torch.equal(vs.rollout(twin, pixels, target=1).values, before)
    assert torch.equal(vs.rollout(model, pixels, target=1).values, before)


CONTAINERS: dict[str, Callable[[], vs.VisionModel]] = {
    "container": lambda: vs.load(Answering(torch.sigmoid)),
    "stated": lambda: vs.load(Answering(torch.tanh), output="softmax", labels=list("abcde")),
    "features": lambda: vs.load(timm_vit(5), output="features"),
    "wrapped": lambda: vs.load(torch.nn.DataParallel(hf_vit(5))),
}


@pytest.mark.parametrize("asked_before", [False, True])
@pytest.mark.parametrize("kind", CONTAINERS)
def test_models_that_have_been_asked_before_or_not(kind: str, asked_before: bool) -> None:
    model = CONTAINERS[kind]()
    if asked_before:
        answer(model, images(1))
        vs.capture(model, images(1))
    expect_copy(model, "deepcopy", images(1))


def examples() -> dict[str, list[Any]]:
    random = np.random.default_rng(0)
    return {name: [random.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(2)] for name in ("a", "b")}


def assert_apart(model: vs.VisionModel, twin: vs.VisionModel, photo: Any, factor: float) -> None:
    """A copy answers alike, until its own weights are multiplied; the original goes on as before."""
    before = model.predict(photo)
    assert twin.labels == model.labels
    assert twin.predict(photo) == before
    with torch.no_grad():
        for parameter in twin.module.parameters():
            parameter.mul_(factor)
    assert twin.predict(photo) != before
    assert model.predict(photo) == before


@each_way
def test_classes_by_example(way: str) -> None:
    bare = next(family for family in families.ALL if family.name == "transformers-vit-bare")
    model = vs.few_shot_classifier(bare.model(), examples())
    photo = examples()["a"][0]
    assert_apart(model, WAYS[way](model), photo, -0.5)


@each_way
@pytest.mark.usefixtures("little_garbage")
def test_tuned_models(way: str, tmp_path: Path) -> None:
    from tests.helpers.coloured import coloured, small_vit

    data = coloured()
    vs.finetune(small_vit(), data, out=tmp_path / "run", tuning="lora", epochs=1, batch_size=8)
    model = vs.load(tmp_path / "run")
    photo = data.test.read(0)
    assert_apart(model, WAYS[way](model), photo, 0.0)


@pytest.mark.parametrize("name", ["vit-nano", "swin-nano"])
def test_another_process_answers_alike(name: str, tmp_path: Path) -> None:
    model = vs.load(name)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator(device="cpu").manual_seed(2), device="cpu")
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((model, pixels)))
    code = (
        "import pickle, sys, pathlib\n"
        "model, pixels = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "print([(one.label, round(one.probability, 5)) for one in model.predict(pixels)[0]])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pickle")], capture_output=True, text=True, check=True
    )
    expected = [(one.label, round(one.probability or 0, 5)) for one in model.predict(pixels)[0]]
    assert done.stdout.strip() == str(expected)
