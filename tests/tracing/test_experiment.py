"""A forward pass of three images reveals random tokens, attention between channels, and windows among heads."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.attention.test_flow import random, timm_named, vit_pytorch
from tests.helpers.families import TINY, from_timm
from tests.tracing.test_foreign import LAYOUT, Homemade
from vitscope.errors import UnsupportedModelError
from vitscope.tracing import experiment as experiments

transformers = pytest.importorskip("transformers")


def mae(**options: Any) -> Callable[[], nn.Module]:
    config = transformers.ViTMAEConfig(**(TINY | {"image_size": 32, "patch_size": 8} | options))
    return lambda: transformers.ViTMAEModel(config)


class Shuffled(Homemade):
    """A model that shuffles the patches of a batch in the same order, so identical images have identical tokens."""

    def forward(self, pixels: Tensor) -> Tensor:
        order = torch.randperm(pixels.shape[-1], device=pixels.device)
        return super().forward(pixels[..., order])


REFUSED: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "ViT-MAE": (mae(), 32, r"^the attention of layers\.0\.attention is .*two identical images have different tokens"),
    "ViT-MAE, nothing masked": (mae(mask_ratio=0.0), 32, "two identical images have different tokens"),
    "token sampling": (
        vit_pytorch("ats_vit", "ViT", depth=3, max_tokens_per_depth=(16, 8, 4)), 32,
        "two identical images have different tokens",
    ),
    "shuffled": (lambda: Shuffled("fused"), 32, "of Shuffled .* because it draws random numbers"),
    "XCiT": (timm_named("xcit_nano_12_p16_224", depth=2), 224, r"attention of blocks\.0\.attn .* between channels"),
    "EdgeNeXt": (timm_named("edgenext_xx_small"), 256, r"attention of stages\.1\.blocks\.1\.xca .* between channels"),
    "DaViT": (timm_named("davit_tiny"), 224, r"attention of stages\.0\.blocks\.0\.1\.attn .* between channels"),
    "vit_pytorch XCiT": (vit_pytorch("xcit", "XCiT", cls_depth=1), 32, "attends between channels, not tokens"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_attention_that_is_not_between_patches_is_refused(case: tuple[Any, ...]) -> None:
    build, size, message = case
    torch.manual_seed(0)
    model = vs.load(build().eval())
    for _ in range(2):  # the second time from the cache
        with pytest.raises(UnsupportedModelError, match=message) as caught:
            vs.capture(model, random(1, 3, size, size))
        assert "\n" not in str(caught.value)


def test_windows_in_an_axis_of_their_own_are_not_taken_for_heads() -> None:
    class Windows(nn.Module):
        """Four windows of four tokens in an axis that looks like heads."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 16, 8, 8)

        def forward(self, pixels: Tensor) -> Tensor:
            tokens = self.embed(pixels).unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).flatten(2, 3).permute(0, 2, 3, 1)
            return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens).mean((1, 2))

    with pytest.raises(UnsupportedModelError, match=r"some of its 4 apparent heads are windows .* affects only 1 of 4"):
        vs.capture(Windows().eval(), random(1, 3, 32, 32))


def test_heads_before_images_in_one_axis_are_recognized() -> None:
    class HeadsFirst(Homemade):
        def forward(self, pixels: Tensor) -> Tensor:
            tokens = self.embed(pixels).flatten(2).mT
            query, key, value = self.stages[0].qkv(tokens).unflatten(-1, (3, 2, 8)).permute(2, 3, 0, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(
                *(tensor.flatten(0, 1) for tensor in (query, key, value))
            )
            return mixed.unflatten(0, (2, -1)).mean((0, 2))

    module, pixels = HeadsFirst("fused").eval(), random(3, 3, 32, 32)
    query, key, _ = (
        module.stages[0].qkv(module.embed(pixels).flatten(2).mT).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    )
    expected = (query @ key.mT / 8**0.5).softmax(-1).detach()
    trace = vs.capture(module, pixels)
    torch.testing.assert_close(trace.attention(0), expected)


def test_the_experiment_runs_once_per_module_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tuple[int, int]] = []
    findings = experiments._findings
    monkeypatch.setattr(
        experiments, "_findings", lambda m, size, channels: (runs.append(size), findings(m, size, channels))[1]
    )
    model = vs.load(Homemade("fused").eval(), **LAYOUT)
    for size in (32, 32, 40, 32):
        vs.capture(model, random(1, 3, size, size))
    assert runs == [(32, 32), (40, 40)]
    vs.capture(vs.load(from_timm("vit_small_patch16_224")().eval()), random(1, 3, 32, 48))
    assert len(runs) == 2  # a model of a known class is not run


@pytest.mark.parametrize("build", [mae(), lambda: Homemade("fused")], ids=["random", "plain"])
def test_random_state_and_training_flags_are_preserved(build: Callable[[], nn.Module]) -> None:
    module = build().train()
    model = vs.load(module)
    torch.manual_seed(3)
    before, numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    if isinstance(module, Homemade):
        experiments.experiment(model, (64, 64))
    else:
        with pytest.raises(UnsupportedModelError):
            experiments.experiment(model, (32, 32))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy)
    assert all(child.training for child in module.modules())
    assert not torch.nn.modules.module._global_forward_hooks


def test_a_model_that_takes_single_images_only_is_still_captured() -> None:
    class Single(Homemade):
        def forward(self, pixels: Tensor) -> Tensor:
            if len(pixels) != 1:
                raise ValueError("one image, please")
            return super().forward(pixels)

    assert vs.capture(vs.load(Single("fused").eval(), **LAYOUT), random(1, 3, 32, 32)).num_layers == 2
