"""Copies of a VisionModel: same predictions, independent weights."""

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
from tests.helpers.live import WithOutput, hf_vit, images, timm_vit
from tests.helpers.swin_families import SIZES

COPIERS: dict[str, Callable[[vs.VisionModel], vs.VisionModel]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}
every_copier = pytest.mark.parametrize("copier", COPIERS)


def output(model: vs.VisionModel, pixels: Tensor) -> Tensor:
    """Return logits, or the features of a model without classes."""
    with torch.no_grad(), model.running():
        rows = model.logits_or_none(pixels)
        if rows is None:
            rows = model.features(pixels) if model.embed is not None else vs.attention_map(model, pixels).values
    return rows.clone()


def expect_copy(model: vs.VisionModel, copier: str, pixels: Tensor) -> None:
    """Assert that the copy predicts and attends by weights of its own."""
    before = output(model, pixels)
    twin = COPIERS[copier](model)
    assert twin is not model
    assert twin.module is not model.module
    assert (twin.name, twin.library, twin.labels, twin.meaning) == (
        model.name,
        model.library,
        model.labels,
        model.meaning,
    )
    assert twin.preprocessing == model.preprocessing
    assert torch.equal(output(twin, pixels), before)
    attention = vs.capture(model, pixels).steps[-1].weights()
    assert torch.equal(vs.capture(twin, pixels).steps[-1].weights(), attention)
    with torch.no_grad():
        for parameter in twin.module.parameters():
            parameter.zero_()
    changed = vs.capture(twin, pixels).steps[-1].weights()
    assert not torch.equal(changed, attention)
    assert not torch.equal(output(twin, pixels), before)
    assert torch.equal(output(model, pixels), before)
    assert torch.equal(vs.capture(model, pixels).steps[-1].weights(), attention)


@pytest.mark.slow
@every_copier
@families.every_family
def test_every_plain_transformer(family: families.Family, copier: str) -> None:
    expect_copy(family.model(), copier, family.pixels(1))


@pytest.mark.slow
@every_copier
@swin_families.every_swin
def test_every_window_transformer(family: swin_families.SwinFamily, copier: str) -> None:
    if family.name == "torchvision-swinv2" or family.name == "torchvision-swin":
        torch.manual_seed(0)  # their stochastic depth is drawn in training only
    expect_copy(family.model(SIZES["fitting"]), copier, swin_families.pixels(SIZES["fitting"], 1))


@pytest.mark.slow
@every_copier
def test_rollout_through_windows(copier: str) -> None:
    """The copy uses its own merging layers and norms."""
    family = swin_families.ALL[0]
    model, pixels = family.model(), swin_families.pixels(SIZES["fitting"], 1)
    before = vs.rollout(model, pixels, target=1).values
    twin = COPIERS[copier](model)
    assert torch.equal(vs.rollout(twin, pixels, target=1).values, before)
    with torch.no_grad():
        for parameter in twin.module.parameters():
            parameter.mul_(0.5)
    assert not torch.equal(vs.rollout(twin, pixels, target=1).values, before)
    assert torch.equal(vs.rollout(model, pixels, target=1).values, before)


MODULES: dict[str, Callable[[], vs.VisionModel]] = {
    "container": lambda: vs.load(WithOutput(torch.sigmoid)),
    "stated": lambda: vs.load(WithOutput(torch.tanh), output="softmax", labels=list("abcde")),
    "features": lambda: vs.load(timm_vit(5), output="features"),
    "wrapped": lambda: vs.load(torch.nn.DataParallel(hf_vit(5))),
}


@pytest.mark.slow
@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("kind", MODULES)
def test_models_can_be_copied_before_and_after_their_first_run(kind: str, evaluated: bool) -> None:
    model = MODULES[kind]()
    if evaluated:
        output(model, images(1))
        vs.capture(model, images(1))
    expect_copy(model, "deepcopy", images(1))


def examples() -> dict[str, list[Any]]:
    random = np.random.default_rng(0)
    return {name: [random.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(2)] for name in ("a", "b")}


def assert_independent(model: vs.VisionModel, twin: vs.VisionModel, photo: Any, factor: float) -> None:
    """Assert that the copy predicts the same until its weights change, and that the original does not change."""
    before = model.predict(photo)
    assert twin.labels == model.labels
    assert twin.predict(photo) == before
    with torch.no_grad():
        for parameter in twin.module.parameters():
            parameter.mul_(factor)
    assert twin.predict(photo) != before
    assert model.predict(photo) == before


@every_copier
def test_few_shot_classifiers(copier: str) -> None:
    bare = next(family for family in families.ALL if family.name == "transformers-vit-bare")
    model = vs.few_shot_classifier(bare.model(), examples())
    photo = examples()["a"][0]
    assert_independent(model, COPIERS[copier](model), photo, -0.5)


@pytest.mark.slow
@every_copier
@pytest.mark.usefixtures("little_garbage")
def test_fine_tuned_models(copier: str, tmp_path: Path) -> None:
    from tests.helpers.coloured import coloured, small_vit

    data = coloured()
    vs.finetune(small_vit(), data, out=tmp_path / "run", tuning="lora", epochs=1, batch_size=8)
    model = vs.load(tmp_path / "run")
    photo = data.test.read(0)
    assert_independent(model, COPIERS[copier](model), photo, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit-nano", "swin-nano"])
def test_another_process_predicts_the_same(name: str, tmp_path: Path) -> None:
    model = vs.load(name)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator(device="cpu").manual_seed(2), device="cpu")
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((model, pixels)))
    code = (
        "import pickle, sys, pathlib\n"
        "model, pixels = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "print([(p.label, round(p.probability, 5)) for p in model.predict(pixels)[0]])\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pickle")], capture_output=True, text=True, check=True
    )
    expected = [(p.label, round(p.probability or 0, 5)) for p in model.predict(pixels)[0]]
    assert process.stdout.strip() == str(expected)
