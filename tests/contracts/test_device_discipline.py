"""Device discipline: no method creates a tensor without naming its device, in any family.

No GPU is needed to see it: with the default device set to "meta", a tensor that was created without an explicit device
holds no numbers, and what meets it fails.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import vitscope as vs
from tests.helpers import gradients
from tests.helpers.families import ALL
from tests.helpers.swin_families import ALL as SWIN
from tests.helpers.swin_families import SIZES
from vitscope.errors import UnsupportedModelError, WorkError

# Few samples do for devices; lime says that they do not do for weights.
pytestmark = pytest.mark.filterwarnings("ignore:num_samples is:vitscope.errors.VitscopeWarning")

CLASS: dict[str, Any] = {"target": 0, "output": "logit"}
FEATURES: dict[str, Any] = {"target": "similarity"}
Method = Callable[[vs.VisionModel, Any, dict[str, Any]], Any]


def without_artefacts(model: vs.VisionModel, image: Any) -> torch.Tensor:
    """Return maps without the patches whose norm is above the median."""
    norms = vs.artefact_tokens(model, image)
    patches = norms.norms[0, -1, norms.grid.prefix :]
    threshold = float(patches.median())
    maps = [
        vs.rollout(model, image, discard_ratio=0.5, drop_artefacts=threshold),
        vs.attention_map(model, image, head="max", drop_artefacts=threshold),
    ]
    return torch.cat([result.values.cpu() for result in maps])


METHODS: dict[str, Method] = {
    "capture": lambda model, image, _: vs.capture(model, image).attention(-1),
    "attention_map": lambda model, image, _: vs.attention_map(model, image).values,
    "attention_map of a patch": lambda model, image, _: vs.attention_map(model, image, query=(1, 2), head="max").values,
    "rollout by norm": lambda model, image, _: vs.rollout(model, image, merge="norm", normalize=False).values,
    "rollout": lambda model, image, _: vs.rollout(model, image, head_fusion="max", discard_ratio=0.5).values,
    "rollout_evolution": lambda model, image, _: vs.rollout_evolution(vs.capture(model, image))[-1].values,
    "without artefacts": lambda model, image, _: without_artefacts(model, image),
    "head_statistics": lambda model, image, _: vs.head_statistics(vs.capture(model, image)).distance,
    "head_importance": lambda model, image, target: vs.head_importance(model, image, **target).values,
    "head_importance, zero": lambda model, image, target: (
        vs.head_importance(model, image, replacement="zero", **target).values
    ),
    "attention_flow": lambda model, image, _: vs.attention_flow(model, image, head_fusion="max").values,
    "lime": lambda model, image, target: vs.lime(model, image, segments="patches", num_samples=20, **target).values,
    "lime, dropped": lambda model, image, target: (
        vs.lime(model, image, segments="patches", num_samples=20, hide="drop", **target).values
    ),
    "kernel_shap": lambda model, image, target: vs.kernel_shap(model, image, segments="patches", **target).values,
    "occlusion": lambda model, image, target: vs.occlusion(model, image, **target).values,
    "activation_patching": lambda model, image, target: vs.activation_patching(model, image, **target).values,
    "rise": lambda model, image, target: vs.rise(model, image, num_samples=8, **target).values,
    "faithfulness": lambda model, image, target: (
        vs.faithfulness(model, image, vs.attention_map(model, image), target=target["target"], steps=3).deletion
    ),
    "window_attention": lambda model, image, _: vs.window_attention(model, image, layer=1).values,
    "window_cls": lambda model, image, _: vs.window_cls(model, image).attribution().values,
    "predict": lambda model, image, _: [prediction.probability for prediction in model.predict(image, top_k=2)[0]],
    "check": lambda model, image, _: [float(vs.check(model, image).layers)],
    "compose": lambda model, image, target: (
        vs.compose(model, image, {"thing": (4, 4, 12, 12)}, tests=("split",), target=target["target"]).outputs
    ),
}


def every_gradient_method(model: vs.VisionModel, image: Any, target: dict[str, Any]) -> torch.Tensor:
    """Return the values of all gradient methods that are available for a model, one after the other."""
    calls = [(explain, target) for explain in gradients.METHODS.values()]
    calls += [(explain, {"target": target["target"]}) for explain in (vs.le_grad, vs.transformer_attribution)]
    values = []
    for explain, options in calls:
        try:
            values.append(explain(model, image, **options).values.flatten())
        except UnsupportedModelError:
            continue
    if not values:
        raise UnsupportedModelError("no gradient method is available")
    return torch.cat(values)


METHODS["every gradient method"] = every_gradient_method
METHODS["head_importance by gradient"] = lambda model, image, target: (
    vs.head_importance(model, image, by="gradient", **target).values
)


@pytest.fixture
def meta() -> Iterator[None]:
    """Tensors without an explicit device go to "meta", on which there are no numbers."""
    before = torch.get_default_device()
    torch.set_default_device("meta")
    yield
    torch.set_default_device(before)


def cases() -> list[Any]:
    return [pytest.param(family, name, id=f"{family.name}-{name}") for family in (*ALL, *SWIN) for name in METHODS]


def library_needs_a_default_device(model: vs.VisionModel, pixels: torch.Tensor) -> bool:
    """Return whether the library's own forward pass creates tensors without a device (RoPE of timm's DINOv3 does)."""
    try:
        with torch.no_grad(), model.running():
            model.logits_or_none(pixels)
    except WorkError as error:
        if isinstance(error.__cause__, NotImplementedError):
            return True
        raise
    return False


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), cases())
def test_every_tensor_is_created_on_an_explicit_device(family: Any, name: str, request: Any) -> None:
    model, size = family.model(), getattr(family, "size", SIZES["fitting"])
    pixels = torch.randn(1, 3, *size, generator=torch.Generator("cpu").manual_seed(1), device="cpu")
    with torch.no_grad(), model.running():
        target = FEATURES if model.logits_or_none(pixels) is None else CLASS
    try:
        expected = METHODS[name](model, pixels, target)
    except UnsupportedModelError:
        pytest.skip(f"{name} is not available for {family.name}")
    request.getfixturevalue("meta")
    if library_needs_a_default_device(model, pixels):
        pytest.skip(f"{family.name} itself creates tensors without a device")
    values = METHODS[name](model, pixels, target)
    if isinstance(values, torch.Tensor):
        assert values.device.type == "cpu"
    # Rounding: nn.MultiheadAttention takes another kernel while a default device is set.
    np.testing.assert_allclose(np.asarray(values), np.asarray(expected), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bundled", ["vit-nano", "swin-nano"])
def test_a_photo_too(name: str, bundled: str, chelsea: np.ndarray, request: Any) -> None:
    model = vs.load(bundled)
    request.getfixturevalue("meta")
    try:
        METHODS[name](model, chelsea[::6, ::6], CLASS)
    except UnsupportedModelError:
        pytest.skip(f"{name} is not available for {bundled}")
