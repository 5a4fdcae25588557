"""Modules around a vision transformer: the same predictions, attention and pixels as the model inside."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.helpers.live import (
    PHOTO,
    SHAPE,
    SIZE,
    WithOutput,
    hf_vit,
    images,
    seeded,
    timm_swin,
    timm_vit,
    torchvision_vit,
)
from vitscope.errors import CallError, UnsupportedModelError, VitscopeError

HALF = {"cls": 0.5, "patches": 0.5}


class Around(nn.Module):
    """Passes the image to a model that is held by an attribute of any name."""

    def __init__(self, inner: nn.Module, name: str = "anything") -> None:
        super().__init__()
        self.name = name
        setattr(self, name, inner)

    def forward(self, pixels: Tensor) -> Any:
        return getattr(self, self.name)(pixels)


INNER: dict[str, Callable[[], nn.Module]] = {
    "timm": lambda: timm_vit(5),
    "torchvision": lambda: torchvision_vit(5),
    "transformers": lambda: hf_vit(5),
    "timm swin": lambda: timm_swin(5),
}


def dinov2(classes: int = 4) -> nn.Module:
    import transformers

    config = transformers.Dinov2Config(**SHAPE, num_labels=classes)
    return seeded(lambda: transformers.Dinov2ForImageClassification(config))


def rollout(model: vs.VisionModel | nn.Module, target: int | None = None) -> Tensor:
    loaded = vs.load(model) if isinstance(model, nn.Module) else model
    needs_class = loaded.layout is not None and loaded.layout.hierarchy is not None
    return vs.rollout(loaded, images(1), **({"target": 1 if target is None else target} if needs_class else {})).values


def probabilities(model: vs.VisionModel, inputs: Any) -> dict[int, float | None]:
    """Return the predicted probability of each class by its index."""
    return {prediction.index: prediction.probability for prediction in model.predict(inputs)[0]}


def expect_same(outer: vs.VisionModel, inner: vs.VisionModel) -> None:
    """Assert that logits, probabilities and rollout are those of the model inside."""
    with torch.no_grad(), outer.running():
        rows = outer.logits(images())
    with torch.no_grad(), inner.running():
        expected = inner.logits(images())
    assert rows is not None
    assert expected is not None
    assert torch.allclose(rows, expected, atol=1e-5)
    assert probabilities(outer, images(1)) == pytest.approx(probabilities(inner, images(1)), abs=1e-6)
    assert torch.allclose(rollout(outer), rollout(inner), atol=1e-6)


def compiled_in_place(module: Any) -> nn.Module:
    module.compile()
    return module


def compiled_blocks(module: nn.Module) -> nn.Module:
    for child in module.modules():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            for block in child:
                if len(list(block.parameters())):
                    block.compile()
    return module


def compiled_forward(module: Any) -> nn.Module:
    module.forward = torch.compile(module.forward)
    return module


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "compiled": torch.compile,  # type: ignore[dict-item]
    "m.compile()": compiled_in_place,
    "compiled blocks": compiled_blocks,
    "compiled forward": compiled_forward,
    "compiled twice": lambda module: torch.compile(compiled_in_place(module)),  # type: ignore[dict-item, return-value]
    "compiled DataParallel": lambda module: torch.compile(nn.DataParallel(module)),  # type: ignore[dict-item, return-value]
}


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", INNER)
def test_wrappers_change_nothing(kind: str, wrapper: str) -> None:
    inner = vs.load(INNER[kind]())
    outer = vs.load(WRAPPERS[wrapper](INNER[kind]()))
    expect_same(outer, inner)
    assert outer.layout is not None
    assert inner.layout is not None
    assert outer.layout.readout == inner.layout.readout
    assert outer.preprocessing == inner.preprocessing


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["compiled", "m.compile()", "compiled blocks", "compiled forward"])
def test_a_compiled_model_inside_a_container_is_captured(wrapper: str) -> None:
    expect_same(vs.load(Around(WRAPPERS[wrapper](timm_vit(5))), output="logits"), vs.load(timm_vit(5)))


def test_distributed_data_parallel(tmp_path: Any) -> None:
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        outer = vs.load(nn.parallel.DistributedDataParallel(timm_vit(5)))
        expect_same(outer, vs.load(timm_vit(5)))
    finally:
        distributed.destroy_process_group()


class Lightning:
    """Builds modules of Lightning, which may not be installed."""

    @staticmethod
    def build(kind: str) -> nn.Module:
        lightning = pytest.importorskip("lightning")

        class WithoutForward(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = timm_vit(5)

        class WithForward(WithoutForward):
            def forward(self, pixels: Tensor) -> Tensor:
                return self.model(pixels)

        class WithLoss(WithoutForward):
            def __init__(self) -> None:
                super().__init__()
                self.loss = nn.CrossEntropyLoss()

        class WithHead(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.encoder, complete = timm_vit(0), timm_vit(5)
                self.encoder.load_state_dict({k: v for k, v in complete.state_dict().items() if "head" not in k})
                self.head = complete.head

            def forward(self, pixels: Tensor) -> Tensor:
                return self.head(self.encoder(pixels))

        classes = {
            "without forward": WithoutForward,
            "with forward": WithForward,
            "with loss": WithLoss,
            "with head": WithHead,
        }
        return classes[kind]().eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["without forward", "with forward", "with loss", "with head"])
def test_lightning_modules(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of Lightning itself
        module = Lightning.build(kind)
    expect_same(vs.load(module), vs.load(timm_vit(5)))
    assert vs.load(module).prepare(PHOTO)[0].equal(vs.load(timm_vit(5)).prepare(PHOTO)[0])


ADAPTED: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "transformers": (lambda: hf_vit(5), ["q_proj", "v_proj"]),
    "dinov2": (dinov2, ["q_proj", "v_proj"]),
    "timm": (lambda: timm_vit(5), ["qkv"]),
    "torchvision": (lambda: torchvision_vit(5), ["mlp.0"]),
    "timm swin": (lambda: timm_swin(5), ["qkv"]),
}


def lora(module: nn.Module, targets: list[str]) -> nn.Module:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT uses deprecated functions of transformers
        return peft.get_peft_model(module, peft.LoraConfig(target_modules=targets, r=2)).eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ADAPTED)
def test_live_modules_with_adapters(kind: str) -> None:
    build, targets = ADAPTED[kind]
    module = build()
    inner = vs.load(build())
    if kind == "torchvision":
        targets = [name for name, child in module.named_modules() if name.endswith("mlp.0") and child is not None]
    adapted = lora(module, targets)
    outer = vs.load(adapted)
    expect_same(outer, inner)  # LoRA starts at zero
    assert outer.layout is not None
    assert inner.layout is not None
    assert dict(outer.layout.readout) == dict(inner.layout.readout)
    assert outer.labels == inner.labels
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        expected = adapted(images())
    expected = expected if isinstance(expected, Tensor) else expected.logits
    with torch.no_grad(), outer.running():
        rows = outer.logits(images())
        before = inner.logits(images())
    assert rows is not None
    assert torch.allclose(rows, expected, atol=1e-5)
    assert before is not None
    assert not torch.allclose(rows, before, atol=1e-2)


def test_a_dinov2_with_adapters_keeps_its_readout_and_labels() -> None:
    adapted = lora(dinov2(), ["q_proj"])
    model = vs.load(adapted)
    assert model.layout is not None
    assert dict(model.layout.readout) == HALF
    assert model.labels == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["anything", "model", "encoder", "m", "_vit"])
@pytest.mark.parametrize("kind", INNER)
def test_the_model_inside_can_have_any_attribute_name(kind: str, name: str) -> None:
    outer = vs.load(Around(INNER[kind](), name), output="logits")
    assert outer.backbone == name
    expect_same(outer, vs.load(INNER[kind]()))
    assert outer.prepare(PHOTO)[0].equal(vs.load(INNER[kind]()).prepare(PHOTO)[0])


def with_head(head: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(timm_vit(0), head or nn.Linear(32, 5)).eval()


def test_a_backbone_and_a_head_in_a_sequence() -> None:
    module = with_head()
    model = vs.load(module)
    with torch.no_grad():
        expected = module(images(1)).softmax(-1)[0].tolist()
    assert probabilities(model, images(1)) == pytest.approx(dict(enumerate(expected)), abs=1e-6)
    assert torch.allclose(rollout(model), rollout(timm_vit(0)), atol=1e-6)
    trace = vs.capture(model, images(1))
    assert trace.readout is not None
    assert trace.readout[0].tolist() == [1.0, *[0.0] * 16]


@pytest.mark.parametrize("build", [lambda: timm_vit(5), lambda: hf_vit(5), lambda: torchvision_vit(5)])
def test_a_module_that_normalises_its_input_takes_photos_like_the_inner_model(build: Callable[[], nn.Module]) -> None:
    from torchvision.transforms import Normalize

    inner = vs.load(build())
    preprocessing = inner.preprocessing
    assert preprocessing is not None
    outer = vs.load(nn.Sequential(Normalize(preprocessing.mean, preprocessing.std), build()).eval(), output="logits")
    pixels = outer.prepare(PHOTO)[0]
    assert float(pixels.min()) >= 0
    assert float(pixels.max()) <= 1
    received = outer.module[0](pixels)  # type: ignore[index]
    assert torch.allclose(received, inner.prepare(PHOTO)[0], atol=1e-5)
    assert "normalised by the module itself" in outer.preprocessing.source  # type: ignore[union-attr]
    assert probabilities(outer, PHOTO) == pytest.approx(probabilities(inner, PHOTO), abs=1e-5)


@pytest.mark.parametrize(
    "before",
    [lambda: "normalise", lambda: nn.Upsample(size=(SIZE, SIZE), mode="nearest"), lambda: nn.Conv2d(3, 3, 1)],
    ids=["other mean and std", "unchanged by upsampling", "convolution"],
)
def test_a_module_that_changes_its_input_takes_no_photos(before: Callable[[], Any]) -> None:
    from torchvision.transforms import Normalize

    layer = before()
    layer = Normalize([0.1, 0.2, 0.3], [0.4] * 3) if layer == "normalise" else layer
    model = vs.load(nn.Sequential(layer, timm_vit(5)).eval(), output="logits")
    if isinstance(layer, nn.Upsample):
        assert model.prepare(PHOTO)[0].equal(vs.load(timm_vit(5)).prepare(PHOTO)[0])
        return
    with pytest.raises(CallError, match="it changes its input before 1 in its own way") as caught:
        model.predict(PHOTO)
    assert "\n" not in str(caught.value)
    assert len(model.predict(images())) == 2  # tensors need no preprocessing


class TwoModels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.student = timm_vit(5), hf_vit(5)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.student(pixels).logits


def test_with_several_models_inside_the_caller_must_choose() -> None:
    model = vs.load(TwoModels().eval(), output="logits")
    assert model.backbone == ""
    assert model.layout is None
    with pytest.raises(CallError):
        model.predict(PHOTO)
    named = vs.load(TwoModels().eval(), output="logits", backbone="student")
    assert named.backbone == "student"
    assert torch.allclose(rollout(named), rollout(hf_vit(5)), atol=1e-6)


@pytest.mark.parametrize("path", ["studnet", "teacher.blocks.9", "student.vit.nothing"])
def test_a_wrong_path_lists_the_submodules(path: str) -> None:
    with pytest.raises(CallError, match=r"is not in TwoModels, which contains teacher, student$"):
        vs.load(TwoModels().eval(), output="logits", backbone=path)


def test_a_backbone_that_does_not_run_provides_no_preprocessing() -> None:
    model = vs.load(TwoModels().eval(), output="logits", backbone="teacher")
    with pytest.raises(CallError, match="teacher did not run"):
        model.predict(PHOTO)
    with pytest.raises(VitscopeError):
        vs.rollout(model, images(1))


def subclass(module: nn.Module, **methods: Any) -> nn.Module:
    module.__class__ = type("Mine", (type(module),), methods)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*INNER, "dinov2"])
def test_a_subclass_is_described_like_its_parent(kind: str) -> None:
    build = INNER.get(kind, dinov2)
    outer, inner = vs.load(subclass(build())), vs.load(build())
    expect_same(outer, inner)
    assert outer.preprocessing == inner.preprocessing
    assert outer.layout is not None
    assert inner.layout is not None
    assert dict(outer.layout.readout) == dict(inner.layout.readout)


def mean_of_patches(self: Any, pixels: Tensor) -> Tensor:
    return self.head(self.forward_features(pixels)[:, 1:].mean(1))


def test_a_subclass_with_another_readout_is_refused() -> None:
    model = vs.load(subclass(timm_vit(5), forward=mean_of_patches))
    with pytest.raises(
        UnsupportedModelError, match=r"but changing cls .* does not change the output: pass the right readout"
    ) as caught:
        vs.rollout(model, images(1))
    assert "\n" not in str(caught.value)
    described = vs.load(subclass(timm_vit(5), forward=mean_of_patches), readout="patches")
    expected = timm_vit(5, global_pool="avg", fc_norm=False)
    assert vs.rollout(described, images(1)).values.shape == rollout(expected).shape
    trace = vs.capture(described, images(1))
    assert trace.readout is not None
    assert trace.readout[0].tolist() == pytest.approx([0.0, *[1 / 16] * 16])


class Mean(WithOutput):
    def logits(self, pixels: Tensor) -> Tensor:
        return self.head(self.backbone.forward_features(pixels)[:, 1:].mean(1))  # type: ignore[operator]


def test_a_container_with_another_readout_has_an_unknown_one() -> None:
    model = vs.load(Mean())
    assert vs.capture(model, images(1)).readout is None
    readout = vs.capture(vs.load(Mean(), readout="patches"), images(1)).readout
    assert readout is not None
    assert readout[0].tolist() == pytest.approx([0.0, *[1 / 16] * 16])


@pytest.mark.slow
@pytest.mark.parametrize("readout", ["cls", HALF, "tokens"])
def test_a_wrong_readout_for_a_container_is_refused(readout: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"says that the classifier reads .*pass the right readout"):
        vs.capture(vs.load(Mean(), readout=readout), images(1))


@pytest.mark.parametrize("readout", ["clss", {"cls": 0.5}, {"cls": 1.5, "patches": -0.5}, {}])
def test_an_invalid_readout_is_refused(readout: Any) -> None:
    with pytest.raises(CallError, match=r"^readout is .*pass one of .*or weights over them that sum to one$"):
        vs.load(Mean(), readout=readout)


def test_a_container_is_not_changed() -> None:
    module = Mean().train()
    before = torch.get_rng_state()
    model = vs.load(module)
    vs.capture(model, images(1))
    model.predict(images(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(child.training for child in module.modules() if child is not module.backbone) or module.training
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())


def test_fully_sharded(tmp_path: Any) -> None:
    from torch import distributed

    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        pytest.skip("this torch has no fully_shard")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        module = timm_vit(5)
        fully_shard(module, mesh=mesh)
        expect_same(vs.load(module), vs.load(timm_vit(5)))
    finally:
        distributed.destroy_process_group()
