"""Methods do not change a window transformer, although its library may alter it during a run."""

import pickle
import threading
import time
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.contracts.test_leaks import (
    LOOKS,
    TroubleError,
    assert_same,
    frequent_switches,  # noqa: F401, a fixture
    look,
    looking,
    mixed,
    state,
    together,
)
from tests.helpers.swin_families import ALL, CLASSES, MAXVIT, SIZES, Size, SwinFamily, every_swin, family, pixels
from vitscope.tracing.capture import run_and_capture

# The type checks draw random numbers of their own.
pytestmark = pytest.mark.usefixtures("unchecked")


def supported_class(model: Any, images: Tensor) -> int:
    """Return a class with a positive contribution of some token in each image."""
    classifier = vs.capture(model, images).classifier
    return max(range(CLASSES), key=lambda index: float(classifier.contributions(index).amax(1).min()))


def by_class(model: Any, images: Tensor) -> vs.Attribution:
    return vs.rollout(model, images[:1], merge="norm", target=supported_class(model, images[:1]))


def predict(model: Any, images: Tensor) -> list[list[Any]]:
    return (vs.load(model) if isinstance(model, nn.Module) else model).predict(images)


LOOKS = LOOKS | {"rollout by class": by_class, "predict": predict}
LARGER = (64, 64)  # 32, 16 and 8 tokens: shifted even in the last stage
UNSIZED = [f for f in ALL if not f.sized]
unsized = pytest.mark.parametrize("family", UNSIZED, ids=lambda family: family.name)


def settings(module: nn.Module) -> dict[str, Any]:
    """Return windows, shifts and masks of all blocks."""
    names = ("window_size", "shift_size", "input_resolution", "target_shift_size", "partition_size", "attn_mask")
    return {
        f"{path}.{name}": deepcopy(getattr(child, name))
        for path, child in module.named_modules()
        for name in names
        if hasattr(child, name)
    }


def full_state(module: nn.Module) -> dict[str, Any]:
    return {**state(module), "settings": settings(module)}


def logits_of(module: nn.Module, x: Tensor) -> Tensor:
    """Return the logits of a copy of the module in a plain run."""
    with torch.no_grad():
        output = deepcopy(module).eval()(x)
    return getattr(output, "logits", output)


def attentions(model: vs.VisionModel, x: Tensor) -> list[Tensor]:
    trace = vs.capture(model, x)
    return [trace.attention(layer) for layer in range(trace.num_layers)]


@pytest.mark.slow
@every_swin
@pytest.mark.parametrize("kind", ["first", "smallest"])
def test_a_run_leaves_no_trace(family: SwinFamily, kind: str) -> None:
    size = family.sizes[family.kinds[0] if kind == "first" else kind]
    model, x = family.model(size), pixels(size)
    mixed(model.module)
    before = full_state(model.module)
    for see in LOOKS.values():
        see(model, x)
        see(model.module, x)  # a live module is described again at each call
    assert_same(full_state(model.module), before)


def test_maxvit_leaves_no_trace() -> None:
    model, x = MAXVIT.model((64, 64)), pixels((64, 64))
    mixed(model.module)
    before = full_state(model.module)
    vs.capture(model, x)
    with pytest.raises(vs.UnsupportedModelError):
        vs.rollout(model, x)
    assert_same(full_state(model.module), before)


@pytest.mark.slow
@every_swin
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_run_that_fails_leaves_no_trace(family: SwinFamily, moment: str) -> None:
    """The last block raises before or after its attention has run, when the library has already altered its state."""
    model, x = family.model(family.least), pixels(family.least)
    mixed(model.module)
    block = list(family.blocks(model.module).values())[-1]

    def fail(*_: Any) -> None:
        raise TroubleError("in the last block")

    hook = block.register_forward_pre_hook(fail) if moment == "before" else block.register_forward_hook(fail)
    before = full_state(model.module)
    for see in LOOKS.values():
        with pytest.raises(TroubleError, match="last block"):
            see(model, x)
    assert_same(full_state(model.module), before)
    hook.remove()
    fresh = family.model(family.least)
    for actual, expected in zip(attentions(model, x), attentions(fresh, x), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(24, 24), (24, 64), (64, 8), (2, 2)], ids=str)
def test_a_size_that_transformers_refuses_is_refused_before_it_runs(size: Size) -> None:
    chosen = family("transformers-swin")
    model, x = chosen.model(), pixels(SIZES["padded"])
    logits, before = logits_of(model.module, x), full_state(model.module)
    for see in LOOKS.values():
        with pytest.raises(vs.CallError, match="need at least 25 pixels per side") as caught:
            see(model, pixels(size))
        assert f"{size[0]}×{size[1]}" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert_same(full_state(model.module), before)
    assert torch.equal(logits_of(model.module, x), logits)
    vs.capture(model, pixels((25, 25)))
    assert torch.equal(logits_of(model.module, x), logits)


def test_a_size_that_timm_refuses_leaves_no_trace() -> None:
    for name in ("timm-swin", "timm-swinv2", "timm-swin-dynamic"):
        model = family(name).model(SIZES["fitting"])
        before = full_state(model.module)
        for see in LOOKS.values():
            with pytest.raises(vs.CallError, match="does not accept an input of 35×32 pixels"):
                see(model, pixels((35, 32)))
        assert_same(full_state(model.module), before)


def test_a_position_embedding_fits_one_size_only() -> None:
    import transformers

    config = transformers.SwinConfig(
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
        window_size=4,
        use_absolute_embeddings=True,
    )
    model = vs.load(transformers.SwinForImageClassification(config).eval())
    assert vs.rollout(model, pixels((32, 32))).values.shape == (2, 16, 16)
    with pytest.raises(vs.CallError, match="position embedding fits 32×32 only"):
        vs.capture(model, pixels((36, 32)))


@pytest.mark.slow
@unsized
def test_a_small_image_before_a_large_one_changes_nothing(family: SwinFamily) -> None:
    expected = attentions(family.model(), pixels(LARGER))
    model = family.model()
    logits = logits_of(model.module, pixels(LARGER))
    for see in LOOKS.values():
        see(model, pixels(family.least))
    for actual, reference in zip(attentions(model, pixels(LARGER)), expected, strict=True):
        assert torch.equal(actual, reference)
    assert torch.equal(logits_of(model.module, pixels(LARGER)), logits)


def test_transformers_alone_keeps_the_windows_of_a_small_image() -> None:
    """The unguarded library shows the fault that the tests above guard against."""
    model = family("transformers-swin").model()
    before = settings(model.module)
    with torch.no_grad():
        model.module(pixels((25, 25)))
    changed = [name for name, value in settings(model.module).items() if value != before[name]]
    assert changed
    assert all(name.endswith("shift_size") for name in changed)


def test_a_module_altered_outside_is_refused() -> None:
    model = family("transformers-swin").model()
    with torch.no_grad(), pytest.raises(RuntimeError):
        model.module(pixels((12, 20)))
    for see in LOOKS.values():
        with pytest.raises(vs.CallError, match="outside vitscope: load it again") as caught:
            see(model, pixels(SIZES["padded"]))
        assert "\n" not in str(caught.value)


@pytest.mark.slow
@every_swin
def test_capture_does_not_change_the_logits(family: SwinFamily) -> None:
    for size in (family.sizes[family.kinds[0]], family.least):
        model, x = family.model(size), pixels(size)
        logits = logits_of(model.module, x)
        for fuse in (None, "mean"):
            torch.testing.assert_close(run_and_capture(model, x, fuse=fuse).logits, logits, atol=1e-5, rtol=1e-5)
        assert torch.equal(logits_of(model.module, x), logits)


@pytest.mark.slow
@every_swin
def test_a_trace_outlives_its_model_and_pickles(family: SwinFamily) -> None:
    size = family.sizes[family.kinds[-1]]
    model, x = family.model(size), pixels(size)
    options = {"merge": "norm", "target": supported_class(model, x), "head_fusion": "max"}
    trace = vs.capture(model, x)
    expected = vs.rollout(trace, **options).values
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.zero_()
    del model
    packed = pickle.dumps(trace)
    restored = pickle.loads(packed)
    for copy in (trace, restored):
        assert torch.equal(vs.rollout(copy, **options).values, expected)
        assert copy.map(0, query="readout").shape[0] == 2
    numbers = sum(step.scores.num_bytes for step in trace.blocks)
    numbers += sum(
        step.reduction.tokens.nbytes + step.reduction.weight.nbytes for step in trace.steps if step not in trace.blocks
    )
    assert len(packed) < 1.5 * numbers + 200_000  # not the slabs that hold the tensors


@pytest.mark.slow
@every_swin
def test_a_selection_of_layers_keeps_every_merging(family: SwinFamily) -> None:
    size = family.sizes[family.kinds[0]]
    model, x = family.model(size), pixels(size)
    full = vs.capture(model, x)
    for layers in ([0], [0, 3], [-1], [-1, 2], [-6]):
        trace = vs.capture(model, x, layers=layers)
        selected = sorted(layer % 6 for layer in layers)
        assert [step.layer for step in trace.blocks] == selected
        assert [type(step) for step in trace.steps].count(vs.MergeStep) == 2
        assert trace.grid == full.grid
        assert trace.num_layers == 6
        for layer in selected:
            assert torch.equal(trace.map(layer, query="readout"), full.map(layer, query="readout"))
        with pytest.raises(vs.CallError, match="was not captured"):
            vs.rollout(trace)
    last = vs.capture(model, x, layers=[-1])
    assert torch.equal(vs.rollout(last, start_layer=5).values, vs.rollout(full, start_layer=5).values)


@pytest.mark.slow
@pytest.mark.usefixtures("frequent_switches")
@pytest.mark.parametrize("name", ["transformers-swin", "timm-swin-dynamic", "torchvision-swin"])
def test_two_threads_at_different_sizes(name: str) -> None:
    chosen = family(name)
    model = chosen.model()
    before = settings(model.module)
    sizes = ((26, 26), LARGER)  # 13, 7 and 4 tokens; transformers alters the last block
    together(*[looking(model, pixels(size), look(model, pixels(size)), times=6) for size in sizes])
    assert settings(model.module) == before


@pytest.mark.slow
def test_a_large_image_waits_for_a_small_one() -> None:
    """While the last stage has a single window for one thread, another thread must not run."""
    chosen = family("transformers-swin")
    expected = attentions(chosen.model(), pixels(LARGER))
    model = chosen.model()
    reached = threading.Event()

    def linger(_: nn.Module, args: Any) -> None:
        if args[0].shape[1] == 16:  # the small image's last tokens
            reached.set()
            time.sleep(0.5)

    model.module.swin.layernorm.register_forward_pre_hook(linger)

    def small() -> None:
        vs.capture(model, pixels((26, 26)))

    def large() -> None:
        assert reached.wait(timeout=30)
        for actual, reference in zip(attentions(model, pixels(LARGER)), expected, strict=True):
            torch.testing.assert_close(actual, reference, atol=1e-6, rtol=0)

    together(small, large)
