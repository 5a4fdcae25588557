"""Activation patching equals its definition in plain hooks, in every family, and obeys its laws."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitscope as vs
from tests.helpers import swin_families
from tests.helpers.gradient_laws import check_nothing_left
from tests.helpers.gradients import FITTING, PLAIN, Case, case, named, target_of, transformers_vit
from tests.helpers.tiny import photo
from tests.reference.activation_patching import activation_patching as reference
from tests.reference.block_streams import AFTER_ATTENTION
from vitscope.errors import CallError, UnknownModelError, UnsupportedModelError, VitscopeWarning

BLOCKS = {*AFTER_ATTENTION, *(name for family in swin_families.ALL for name in family.block_types)}
SEVERAL_GRIDS = [case("transformers-swin-odd"), case("timm-swinv2-padded"), case("torchvision-swin-rectangular")]


def blocks_of(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.modules() if type(child).__name__ in BLOCKS]


def score_of(model: vs.VisionModel, image: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the logit of class 1, or the cosine of features to those of the image."""
    if model.meaning != "features":
        return lambda pixels: model.logits(pixels)[0, 1]  # type: ignore[index]
    features = model.features(image)
    return lambda pixels: F.cosine_similarity(model.features(pixels), features)[0]


def check_reference(case: Case, layers: Any, expected_layers: list[int]) -> None:
    model, pixels = case.in_float64()
    pixels = pixels[:1]
    origin = torch.full_like(pixels, 0.3)
    target = target_of(model) if model.logits_or_none(pixels) is not None else "similarity"
    result = vs.activation_patching(model, pixels, target=target, layers=layers, baseline=origin, batch_size=7)
    grid = result.grid
    with torch.no_grad(), model.running():
        score = score_of(model, pixels)
        args = (expected_layers, grid.prefix, (grid.height, grid.width))
        expected = reference(blocks_of(model.module), score, pixels, origin, *args)
    assert result.provenance["parameters"]["layers"] == expected_layers
    assert float(expected.abs().max()) > 1e-3
    torch.testing.assert_close(result.values[0].double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@named(PLAIN)
def test_plain_transformers_equal_the_reference(case: Case) -> None:
    check_reference(case, None, [1])


@named(FITTING)
def test_window_transformers_equal_the_reference_on_two_grids(case: Case) -> None:
    check_reference(case, [4, 1], [1, 4])


@named(SEVERAL_GRIDS)
def test_grids_that_do_not_halve_equal_the_reference(case: Case) -> None:
    check_reference(case, [1, -1, 2], [1, 2, 5])


def test_the_first_block_is_patched_as_if_pixels_were_pasted() -> None:
    model, pixels = transformers_vit()
    origin = torch.zeros_like(pixels[:1])
    result = vs.activation_patching(model, pixels[:1], target=2, layers=0, baseline=origin)
    for row in range(4):
        for column in range(4):
            pasted, square = origin.clone(), (..., slice(row * 8, row * 8 + 8), slice(column * 8, column * 8 + 8))
            pasted[square] = pixels[:1][square]
            with torch.no_grad(), model.running():
                change = float((model.logits(pasted) - model.logits(origin))[0, 2])  # type: ignore[operator]
            assert float(result.values[0, row, column]) == pytest.approx(change, abs=1e-6)


@pytest.mark.parametrize("name", ["timm-vit-mean", "timm-swin-fitting"])
def test_batches_of_images_and_of_patches_change_nothing(name: str) -> None:
    model, pixels = case(name).in_float64()
    together = vs.activation_patching(model, pixels, target=[1, 2], layers=-1)
    assert together.target is None
    for index, target in enumerate((1, 2)):
        alone = vs.activation_patching(
            model, pixels[index : index + 1], target=target, layers=-1, batch_size=1 + 2 * index
        )
        torch.testing.assert_close(together[index].values, alone.values, rtol=0, atol=1e-6)
        assert together[index].target == alone.target == model.label(target)
        assert float(alone.values.abs().max()) > 1e-4


def test_the_target_decides_and_a_contrast_is_a_difference() -> None:
    model, pixels = transformers_vit()
    first, second, contrast = (vs.activation_patching(model, pixels, target=t).values for t in (1, 2, (1, 2)))
    assert float((first - second).abs().max()) > 1e-3
    torch.testing.assert_close(contrast, first - second, rtol=0, atol=1e-6)
    probability = vs.activation_patching(model, pixels, target=1, output="probability")
    assert float((first - probability.values).abs().max()) > 1e-3
    with torch.no_grad(), model.running():
        top = model.logits(pixels).argmax(-1).tolist()  # type: ignore[union-attr]
    assert torch.equal(
        vs.activation_patching(model, pixels).values, vs.activation_patching(model, pixels, target=top).values
    )


def test_an_image_as_its_own_baseline_has_a_map_of_zeros() -> None:
    model, pixels = transformers_vit()
    with pytest.warns(VitscopeWarning, match="is zero everywhere: no patch changes the logit of the baseline"):
        result = vs.activation_patching(model, pixels[:1], target=1, baseline=pixels[:1], batch_size=5)
    assert not bool(result.values.any())


def test_an_output_that_ignores_the_patches_has_a_map_of_zeros() -> None:
    model, pixels = transformers_vit()

    def constant(logits: Tensor) -> Tensor:
        return logits[:, 0] * 0 + 3

    with pytest.warns(VitscopeWarning, match="zero everywhere"):
        assert not bool(vs.activation_patching(model, pixels[:1], target=constant).values.any())


def test_layers_are_one_block_or_several_from_either_end() -> None:
    model, pixels = transformers_vit()
    results = [vs.activation_patching(model, pixels, target=1, layers=layers) for layers in (2, -1, [2], (-1, 2))]
    for result in results:
        assert result.provenance["parameters"] == {"layers": [2], "baseline": "mean", "output": "logit"}
        assert torch.equal(result.values, results[0].values)
        assert result.signed
    assert not torch.equal(vs.activation_patching(model, pixels, target=1, layers=[0, 2]).values, results[0].values)


@pytest.mark.parametrize("baseline", ["blur", (10, 200, 30)])
def test_every_baseline_of_a_photo(baseline: Any) -> None:
    result = vs.activation_patching(vs.load("vit-nano"), photo(32, 32), target="cat", baseline=baseline)
    assert result.values.shape == (1, 8, 8)
    assert bool(result.values.any())
    assert result.provenance["parameters"]["baseline"] == (list(baseline) if isinstance(baseline, tuple) else baseline)
    assert result.provenance["samples"] == 65


def test_a_run_in_another_thread_is_not_patched() -> None:
    model, pixels = transformers_vit()
    expected = vs.activation_patching(model, pixels, target=1).values
    with torch.no_grad(), model.running():
        logits = model.logits(pixels)
    main, outputs = threading.get_ident(), list[Tensor]()

    def run() -> None:
        with torch.no_grad(), model.running():
            outputs.append(model.logits(pixels))  # type: ignore[arg-type]

    def start(*_: Any) -> None:
        if threading.get_ident() == main:
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()

    handle = model.module.vit.embeddings.register_forward_hook(start)
    result = vs.activation_patching(model, pixels, target=1)
    handle.remove()
    assert len(outputs) > 2
    assert all(torch.equal(output, logits) for output in outputs)  # type: ignore[arg-type]
    assert torch.equal(result.values, expected)


@pytest.mark.parametrize("name", ["transformers-vit", "timm-swin-fitting"])
def test_nothing_is_left_behind(name: str) -> None:
    example = case(name)
    check_nothing_left(vs.activation_patching, example.model(), example.pixels[:1])


def test_a_batch_without_memory_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pixels = transformers_vit()
    expected = vs.activation_patching(model, pixels[:1], target=1).values
    forward = model.module.vit.forward

    def limited(pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(pixel_values) > 4:
            raise torch.OutOfMemoryError
        return forward(pixel_values, *args, **kwargs)

    monkeypatch.setattr(model.module.vit, "forward", limited)
    with pytest.warns(VitscopeWarning, match="continuing with 4"):
        result = vs.activation_patching(model, pixels[:1], target=1, batch_size=8)
    torch.testing.assert_close(result.values, expected, rtol=0, atol=1e-6)


def test_ctrl_c_keeps_the_patches_that_were_evaluated() -> None:
    model, pixels = transformers_vit()
    expected = vs.activation_patching(model, pixels[:1], target=1).values.flatten()

    def press(progress: vs.Progress) -> None:
        if progress.completed >= 6:
            raise KeyboardInterrupt

    with pytest.warns(VitscopeWarning, match="interrupted: the result is based on 6 of 17 samples"):
        result = vs.activation_patching(model, pixels[:1], target=1, batch_size=3, progress=press)
    values = result.values.flatten()
    torch.testing.assert_close(values[:5], expected[:5], rtol=0, atol=1e-6)
    assert not bool(values[5:].any())
    assert result.provenance["interrupted"]


def test_test_time_registers_are_no_patches() -> None:
    model, pixels = transformers_vit()
    with vs.test_time_registers(model, [], count=2) as registered:
        result = vs.activation_patching(registered, pixels, target=1)
    assert result.values.shape == (2, 4, 4)
    assert result.grid.prefix == 3


@pytest.mark.usefixtures("unchecked")
def test_options_out_of_range() -> None:
    model, pixels = transformers_vit()
    for options, text in (
        ({"layers": 3}, "layer 3 is out of range"),
        ({"layers": [0, -4]}, "layer -4 is out of range"),
        ({"layers": []}, "layers is empty"),
        ({"layers": "middle"}, "layers is 'middle'"),
        ({"layers": 1.5}, "layers is 1.5"),
        ({"baseline": "drop"}, "baseline is 'drop'"),
        ({"baseline": "white noise"}, "baseline is 'white noise'"),
        ({"baseline": 300}, "baseline is 300"),
        ({"baseline": torch.zeros(3, 3, 32, 32)}, "baseline has the shape"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"output": "loss"}, "unknown output 'loss'"),
        ({"target": "no such class"}, "no such class"),
        ({"target": [1]}, "target is a list of 1 for 2 images"),
    ):
        with pytest.raises(CallError, match=text) as caught:
            vs.activation_patching(model, pixels, **options)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    with pytest.raises(CallError, match="no image was given"):
        vs.activation_patching(model, [])


def test_models_that_cannot_be_patched_are_refused_in_one_line() -> None:
    maxvit, pixels = swin_families.MAXVIT.model((64, 64)), swin_families.pixels((64, 64), 1)
    with pytest.raises(UnsupportedModelError) as caught:
        vs.activation_patching(maxvit, pixels, target=0, layers=[0, -1])
    assert "\n" not in str(caught.value)
    with pytest.raises(UnsupportedModelError, match="how its 256 tokens become 4"):
        vs.activation_patching(maxvit, pixels, target=0, layers=-1)
    plain = vs.load(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 3)), image_size=8)
    with pytest.raises(UnknownModelError, match="has no blocks"):
        vs.activation_patching(plain, torch.zeros(1, 3, 8, 8), target=0)
