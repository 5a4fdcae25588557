"""Class names: those of the current head, or those that the caller passes."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.helpers.live import SHAPE, WithOutput, hf_vit, images, seeded, timm_swin, timm_vit, torchvision_vit
from vitscope.errors import CallError, VitscopeError

NUMBERED = {f"class {index}" for index in range(7)}


def names(model: vs.VisionModel, channels: int = 3) -> list[str]:
    """Return the labels of all predictions, in the order of their index."""
    (row,) = model.predict(images(1, channels), top_k=2000)
    return [prediction.label for prediction in sorted(row, key=lambda prediction: prediction.index)]


def replaced(build: Callable[..., Any], path: str, head: nn.Module) -> nn.Module:
    """Return a model of a thousand classes whose classifier was replaced directly, as in tutorials."""
    module = build(1000)
    owner, _, name = path.rpartition(".")
    setattr(module.get_submodule(owner), name, head)
    return module.eval()


def deep(classes: int, width: int = 32) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, classes))


def hf_swin(classes: int = 5) -> nn.Module:
    import transformers

    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, num_labels=classes
    )
    return seeded(lambda: transformers.SwinForImageClassification(config))


REPLACED: dict[str, Callable[[], nn.Module]] = {
    "timm": lambda: replaced(timm_vit, "head", nn.Linear(32, 3)),
    "timm deep": lambda: replaced(timm_vit, "head", deep(3)),
    "timm swin": lambda: replaced(timm_swin, "head.fc", nn.Linear(32, 3)),
    "torchvision": lambda: replaced(torchvision_vit, "heads.head", nn.Linear(32, 3)),
    "torchvision heads": lambda: replaced(torchvision_vit, "heads", nn.Linear(32, 3)),
    "torchvision deep": lambda: replaced(torchvision_vit, "heads", deep(3)),
    "transformers": lambda: replaced(hf_vit, "classifier", nn.Linear(32, 3)),
    "transformers deep": lambda: replaced(hf_vit, "classifier", deep(3)),
    "transformers swin": lambda: replaced(hf_swin, "classifier", nn.Linear(32, 3)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", REPLACED)
@pytest.mark.filterwarnings("ignore:.*so its classes are numbered")
def test_a_replaced_classifier_does_not_keep_the_old_names(kind: str) -> None:
    module = REPLACED[kind]()
    assert names(vs.load(module)) == ["class 0", "class 1", "class 2"]
    assert names(vs.load(module, labels=["ant", "bee", "cat"])) == ["ant", "bee", "cat"]
    trace = vs.capture(vs.load(module), images(1))
    assert trace.labels is None or len(trace.labels) == 3


@pytest.mark.parametrize("build", [timm_vit, torchvision_vit])
def test_a_thousand_classes_are_named_as_in_imagenet(build: Callable[[int], nn.Module]) -> None:
    from torchvision.models import ViT_B_16_Weights

    labels = names(vs.load(build(1000)))
    assert len(labels) == 1000
    for index, label in enumerate(ViT_B_16_Weights.DEFAULT.meta["categories"][:5]):
        assert label in labels[index]


def test_imagenet_21k_has_the_names_of_timm() -> None:
    import timm
    from timm.data import ImageNetInfo

    module = timm_vit(21843, name="vit_tiny_patch16_224.augreg_in21k")
    assert module.pretrained_cfg["num_classes"] == 21843  # type: ignore[index, union-attr]
    subset = timm.data.infer_imagenet_subset(module)
    assert subset == "imagenet-21k-goog"
    expected = ImageNetInfo(subset).label_descriptions()
    labels = vs.load(module).labels
    assert labels is not None
    assert len(labels) == 21843
    assert all(label.split(",")[0] in expected[index] for index, label in enumerate(labels[:50]))


PASSED: dict[str, Any] = {
    "list": ["ant", "bee", "cat", "dog", "elk"],
    "tuple": ("ant", "bee", "cat", "dog", "elk"),
    "mapping": {4: "elk", 0: "ant", 1: "bee", 2: "cat", 3: "dog"},
}
EXPECTED = ["ant", "bee", "cat", "dog", "elk"]
MODULES: dict[str, Callable[[], nn.Module]] = {
    "timm": lambda: timm_vit(5),
    "torchvision": lambda: torchvision_vit(5),
    "transformers": lambda: hf_vit(5),
    "container": WithOutput,
    "swin": lambda: timm_swin(5),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", PASSED)
@pytest.mark.parametrize("kind", MODULES)
def test_passed_labels_name_the_classes(kind: str, form: str) -> None:
    model = vs.load(MODULES[kind](), labels=PASSED[form])
    assert names(model) == EXPECTED
    assert model.labels == tuple(EXPECTED)
    assert vs.capture(model, images(1)).labels == tuple(EXPECTED)
    assert vs.occlusion(model, images(1), target="dog").target == "dog"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("labels.json", json.dumps(EXPECTED)),
        ("labels.json", json.dumps(PASSED["mapping"])),
        ("labels.txt", "\n".join(EXPECTED) + "\n"),
        ("labels.txt", "\r\n".join(EXPECTED)),
        ("labels.txt", "ant\n\nbee\n cat \ndog\nelk\n\n"),
    ],
    ids=["list", "mapping", "lines", "Windows", "empty lines"],
)
def test_labels_from_a_file(file: str, text: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(text, encoding="utf-8", newline="")
    assert names(vs.load(timm_vit(5), labels=tmp_path / file)) == EXPECTED
    assert names(vs.load(timm_vit(5), labels=str(tmp_path / file))) == EXPECTED


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4, 6])
@pytest.mark.parametrize("kind", MODULES)
def test_labels_of_the_wrong_number_are_not_used(kind: str, count: int) -> None:
    model = vs.load(MODULES[kind](), labels=[f"thing {index}" for index in range(count)])
    with pytest.warns(vs.VitscopeWarning, match=f"has 5 outputs and {count} labels, so its classes are numbered"):
        assert set(names(model)) <= NUMBERED
    assert vs.capture(model, images(1)).labels is None


WRONG: dict[str, Any] = {
    "empty": [],
    "gap": {0: "a", 2: "b"},
    "from one": {1: "a", 2: "b"},
    "names to numbers": {"a": 0, "b": 1},
    "numbers": [1, 2, 3],
    "no file": "/nowhere/labels.txt",
    "set": {"a", "b"},
    "a number": 7,
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.usefixtures("unchecked")
def test_invalid_labels_are_refused_in_one_line(kind: str) -> None:
    with pytest.raises(CallError, match=r"^labels") as caught:
        vs.load(timm_vit(5), labels=WRONG[kind])
    assert "\n" not in str(caught.value)


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixels: Tensor) -> Any:
        return self.inner(pixels)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compiled"])
def test_a_wrapped_model_keeps_its_labels(wrap: Callable[[nn.Module], nn.Module]) -> None:
    module = hf_vit(5, id2label=dict(enumerate(EXPECTED)))
    assert names(vs.load(wrap(module))) == EXPECTED


@pytest.mark.parametrize("build", [timm_vit, torchvision_vit])
def test_a_subclass_keeps_imagenets_labels(build: Callable[[int], nn.Module]) -> None:
    module = build(1000)
    expected = vs.load(module).labels
    module.__class__ = type("Mine", (type(module),), {})
    assert expected is not None
    assert vs.load(module).labels == expected


def test_a_subclass_of_transformers_keeps_its_labels() -> None:
    module = hf_vit(5, id2label=dict(enumerate(EXPECTED)))

    def forward(self: Any, pixel_values: Tensor) -> Tensor:
        return type(self).__mro__[1].forward(self, pixel_values=pixel_values).logits

    module.__class__ = type("Mine", (type(module),), {"forward": forward})
    assert names(vs.load(module)) == EXPECTED


def test_a_container_numbers_its_classes_unless_labels_are_passed() -> None:
    module = Wrapped(timm_vit(5))
    assert names(vs.load(module)) == [f"class {index}" for index in range(5)]
    assert names(vs.load(module, labels=EXPECTED)) == EXPECTED


def timm_wrapper(classes: int = 5) -> nn.Module:
    import transformers

    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", model_args=options, num_labels=classes, id2label=dict(enumerate(EXPECTED))
    )
    return seeded(lambda: transformers.TimmWrapperForImageClassification(config))


def test_a_timm_model_in_transformers_has_the_labels_of_its_configuration() -> None:
    module = timm_wrapper()
    assert names(vs.load(module)) == EXPECTED
    with torch.no_grad():
        rows = module(pixel_values=images(1)).logits.softmax(-1)[0]
    (row,) = vs.load(module).predict(images(1))
    assert {prediction.index: prediction.probability for prediction in row} == pytest.approx(
        dict(enumerate(rows.tolist())), abs=1e-6
    )


@pytest.mark.filterwarnings("ignore:.*so its classes are numbered")
def test_a_configuration_with_too_few_labels_is_ignored() -> None:
    module: Any = hf_vit(5)
    module.config.id2label = {0: "ant", 1: "bee"}
    assert names(vs.load(module)) == [f"class {index}" for index in range(5)]


def test_a_bare_backbone_has_no_labels() -> None:
    import transformers

    assert vs.load(seeded(lambda: transformers.ViTModel(transformers.ViTConfig(**SHAPE)))).labels is None
    assert vs.load(timm_vit(0)).labels is None


@pytest.mark.parametrize("argument", ["labels", "processor", "weights"])
def test_only_regular_files_are_opened(argument: str, tmp_path: Path) -> None:
    """Reading a named pipe would block forever."""
    pipe = tmp_path / "pipe.pth"
    os.mkfifo(pipe)
    name = "timm:test_vit" if argument == "weights" else "vit-nano"
    with pytest.raises(VitscopeError, match="not a regular file"):
        vs.load(name, **{argument: pipe})
