"""predict(): ranked classes, batches of mixed images, and unchanged training flags."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vitscope as vs
from tests.helpers.tiny import LABELS, photo, tiny_vit
from vitscope.errors import ImageNotFoundError, NoAttentionError, WorkError


def test_classes_are_ranked_and_named(folder: Path) -> None:
    model = vs.load(folder)
    pixels, _ = model.prepare([photo(40, 50), photo(50, 40, 1)])
    with torch.no_grad():
        expected = tiny_vit()(pixels).logits.softmax(-1)
    rows = model.predict([photo(40, 50), photo(50, 40, 1)], top_k=7)
    for row, probabilities in zip(rows, expected, strict=True):
        assert [p.probability for p in row] == sorted((p.probability for p in row), reverse=True)
        assert {p.index for p in row} == set(range(7))
        assert sum(p.probability for p in row) == pytest.approx(1)
        for prediction in row:
            assert prediction.probability == pytest.approx(probabilities[prediction.index].item(), abs=1e-6)
            assert prediction.label == LABELS[prediction.index]
    assert [row[:2] for row in rows] == model.predict([photo(40, 50), photo(50, 40, 1)], top_k=2)
    assert [len(row) for row in model.predict(photo(40, 50))] == [5]
    assert model.predict(photo(40, 50), top_k=100) == rows[:1]


def test_classes_without_names_are_numbered() -> None:
    timm = pytest.importorskip("timm")
    model = vs.load(timm.create_model("test_vit", num_classes=3))
    assert {p.label for p in model.predict(photo(40, 50))[0]} == {"class 0", "class 1", "class 2"}


@pytest.mark.parametrize("top_k", [0, -1])
def test_top_k_below_one_is_refused(folder: Path, top_k: int) -> None:
    with pytest.raises(vs.CallError, match=f"top_k is {top_k}"):
        vs.load(folder).predict(photo(40, 50), top_k=top_k)


def test_logits_with_nan_are_an_error(folder: Path) -> None:
    model = vs.load(folder)
    with torch.no_grad():
        model.module.classifier.bias[0] = torch.nan
    with pytest.raises(WorkError, match="returned NaN or infinity"):
        model.predict(photo(40, 50))


def test_images_of_mixed_sizes_and_types_are_predicted_as_if_alone(folder: Path, tmp_path: Path) -> None:
    model = vs.load(folder)
    photo(33, 90, 2).save(tmp_path / "third.png")
    mixed = [photo(80, 40), np.asarray(photo(40, 80, 1)), tmp_path / "third.png", str(tmp_path / "third.png")]
    together = vs.rollout(model, mixed)
    assert len(together) == 4
    rows = model.predict(mixed)
    for i, image in enumerate(mixed):
        torch.testing.assert_close(together.values[i : i + 1], vs.rollout(model, image).values)
        assert together.images[i].photo.size == [(80, 40), (40, 80), (33, 90), (33, 90)][i]
        (row,) = model.predict(image)
        assert [p.index for p in row] == [p.index for p in rows[i]]
        assert [p.probability for p in row] == pytest.approx([p.probability for p in rows[i]])
    assert torch.equal(together.values[2], together.values[3])
    assert not torch.allclose(together.values[0], together.values[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(1, 3, 32, 32).index_fill(-1, torch.tensor(5), torch.nan), "NaN or infinity"),
        (torch.zeros(1, 3, 32, 32).index_fill(-1, torch.tensor(5), torch.inf), "NaN or infinity"),
        (torch.zeros(1, 1, 32, 32), r"\(1, 1, 32, 32\) is not a batch of images"),
        (torch.zeros(1, 32, 32, 3), r"\(1, 32, 32, 3\) is not a batch of images"),
        (torch.zeros(3, 32, 32), r"\(3, 32, 32\) is not a batch of images"),
        (torch.zeros(0, 3, 32, 32), r"\(0, 3, 32, 32\) is not a batch of images"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "torch.uint8 is not preprocessed"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int64), "torch.int64 is not preprocessed"),
        (torch.zeros(1, 3, 5, 32), "5×32 pixels is smaller than one patch of 8×8"),
    ],
    ids=lambda value: "" if isinstance(value, str) else f"{tuple(value.shape)}-{value.dtype}",
)
def test_a_tensor_that_is_not_a_batch_of_images_is_refused(folder: Path, tensor: Tensor, message: str) -> None:
    model = vs.load(folder)
    for run in (model.predict, lambda images: vs.capture(model, images)):
        with pytest.raises(vs.CallError, match=message) as caught:
            run(tensor)
        assert "\n" not in str(caught.value)


def test_empty_lists_and_missing_files_are_refused(folder: Path) -> None:
    model = vs.load(folder)
    with pytest.raises(vs.CallError, match="no image was given"):
        model.predict([])
    with pytest.raises(ImageNotFoundError, match=r"nowhere\.png does not exist"):
        model.predict([photo(40, 40), "nowhere.png"])


def test_a_double_tensor_is_cast_to_the_models_dtype(folder: Path) -> None:
    model = vs.load(folder)
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert model.prepare(pixels)[0].dtype == model.dtype == torch.float32
    assert model.predict(pixels) == model.predict(pixels.float())


@pytest.mark.parametrize("fails", [False, True])
def test_training_flags_are_restored(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny_vit().train()
    module.vit.layers[1].eval()
    before = {name: child.training for name, child in module.named_modules()}
    assert len(set(before.values())) == 2
    model = vs.load(module)
    during: list[bool] = []
    module.classifier.register_forward_hook(lambda *_: during.append(any(c.training for c in module.modules())))
    if fails:
        monkeypatch.setattr(module.classifier, "forward", lambda _: (_ for _ in ()).throw(ArithmeticError("no")))
    for run in (model.predict, lambda images: vs.capture(model, images)):
        try:
            run(photo(40, 40))
        except ArithmeticError:
            assert fails
    assert during == ([] if fails else [False, False])
    assert {name: child.training for name, child in module.named_modules()} == before


# Models without attention


def resnets() -> dict[str, Any]:
    def of_transformers() -> vs.VisionModel:
        import transformers

        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=7)
        return vs.load(transformers.ResNetForImageClassification(config), image_size=64)

    return {
        "torchvision": lambda: vs.load("torchvision:resnet18", pretrained=False, image_size=(64, 96)),
        "timm": lambda: vs.load("timm:test_resnet", pretrained=False),
        "transformers": of_transformers,
    }


@pytest.mark.slow
@pytest.mark.parametrize("library", resnets())
def test_a_convolutional_network_predicts_and_has_no_attention(library: str) -> None:
    pytest.importorskip(library)
    torch.manual_seed(0)
    model = resnets()[library]()
    (row,) = model.predict(photo(70, 50), top_k=3)
    assert 1 > row[0].probability >= row[1].probability >= row[2].probability > 0
    with pytest.raises(NoAttentionError, match="has no attention that vitscope can observe"):
        vs.capture(model, photo(70, 50))
