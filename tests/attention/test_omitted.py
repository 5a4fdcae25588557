"""Omitted attention calls are listed and reported; blocks of a trace have the correct heads and windows."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitscope as vs
from tests.attention.test_flow import ExplicitBlock, random, timm_named
from tests.tracing.test_foreign import LAYOUT, ByHand, Homemade
from vitscope.attention.axes import axes_of
from vitscope.attention.omitted import OmittedCall
from vitscope.errors import NoAttentionError, UnsupportedModelError

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")


def detr() -> nn.Module:
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "num_queries": 6}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    backbone = {"use_timm_backbone": True, "use_pretrained_backbone": False, "backbone": "resnet18"}
    config = transformers.DetrConfig(**sizes, **heads, **backbone)
    return transformers.DetrForObjectDetection(config)


def segformer() -> nn.Module:
    return transformers.SegformerForImageClassification(transformers.SegformerConfig())


OMITTING: dict[str, tuple[Callable[[], nn.Module], int, int, int, OmittedCall]] = {
    "PVTv2": (
        timm_named("pvt_v2_b0"), 64, 2, 6, OmittedCall("stages.0.blocks.0.attn", 256, 4, "other tokens"),
    ),
    "SegFormer": (
        segformer, 64, 2, 6, OmittedCall("segformer.stages.0.blocks.0.attention", 256, 4, "other tokens"),
    ),
    "LeViT": (
        timm_named("levit_128s"), 224, 9, 2,
        OmittedCall("stages.1.downsample.attn_downsample", 49, 196, "other tokens"),
    ),
    "DETR": (detr, 64, 2, 4, OmittedCall("model.decoder.layers.0.self_attn", 6, 6, "not the image")),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", OMITTING.values(), ids=OMITTING)
def test_omitted_calls_raise_a_single_warning(case: Any) -> None:
    build, size, num_blocks, count, first = case
    torch.manual_seed(0)
    model = vs.load(build().eval())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trace = vs.capture(model, random(2, 3, size, size))
    (warning,) = [item for item in caught if item.category is vs.VitscopeWarning]
    message = str(warning.message)
    assert f"{count} of {num_blocks + count} attention calls" in message
    assert str(first) in message
    assert "\n" not in message
    assert trace.num_layers == num_blocks
    assert len(trace.omitted) == count
    assert trace.omitted[0] == first
    with pytest.raises(UnsupportedModelError, match=r"^rollout is not available for .* not among the blocks"):
        trace.require_chain()


@pytest.mark.slow
def test_a_model_that_reduces_the_keys_in_every_call_has_no_block() -> None:
    torch.manual_seed(0)
    cvt = transformers.CvtForImageClassification(transformers.CvtConfig()).eval()
    with pytest.raises(UnsupportedModelError, match=r"none of the 13 attention calls of .* is among image tokens"):
        vs.capture(vs.load(cvt), random(1, 3, 64, 64))


def test_learned_queries_of_a_decoder_are_not_image_tokens() -> None:
    torch.manual_seed(0)
    with pytest.warns(vs.VitscopeWarning, match="among learned queries"):
        trace = vs.capture(vs.load(detr().eval()), random(2, 3, 64, 64))
    assert [step.module for step in trace.steps] == [f"model.encoder.layers.{i}.self_attn" for i in range(2)]
    assert [call.reason for call in trace.omitted] == [
        "not the image",
        "other tokens",
        "learned queries",
        "other tokens",
    ]


def test_an_unused_side_branch_is_listed_without_a_warning() -> None:
    """SigLIP with a classifier (transformers) runs a pooling layer, but reads the mean of the patches."""
    config = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    module = transformers.SiglipForImageClassification(
        transformers.SiglipConfig(vision_config=config.to_dict(), num_labels=5)
    )
    trace = vs.capture(vs.load(module.eval()), random(1, 3, 32, 32))
    assert all(call.reason == "not read" for call in trace.omitted)
    trace.require_chain()


def test_a_wrong_number_of_tokens_names_the_layout() -> None:
    for layout, size in (
        (LAYOUT | {"prefix": ("cls", "register_1")}, 18),
        ({"patch_size": 8, "readout": "tokens"}, 16),
    ):
        message = rf"attends among 17 tokens \(2 calls\), but its layout says {size} tokens"
        with pytest.raises(UnsupportedModelError, match=message):
            vs.capture(vs.load(Homemade("fused").eval(), **layout), random(1, 3, 32, 32))


def test_a_model_without_attention_raises_no_attention_error() -> None:
    with pytest.raises(NoAttentionError, match="ResNet has no attention that vitscope can observe"):
        vs.capture(vs.load(timm.create_model("resnet18").eval()), random(1, 3, 64, 64))


def test_the_softmax_of_a_router_is_not_attention() -> None:
    class Routed(Homemade):
        def forward(self, pixels: Tensor) -> Tensor:
            logits = super().forward(pixels)
            return logits * self.embed(pixels).flatten(2).softmax(-1).amax((1, 2))[:, None]

    trace = vs.capture(vs.load(Routed("fused").eval(), **LAYOUT), random(1, 3, 32, 32))
    assert (trace.num_layers, trace.omitted) == (2, ())


class BackboneAndBlock(nn.Module):
    """A backbone and a block outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.after = Homemade("fused", lambda logits: logits), ByHand(fused=True)

    def forward(self, pixels: Tensor) -> Tensor:
        logits = self.net(pixels)
        tokens = self.net.embed(pixels).flatten(2).mT
        return logits + self.after(tokens).mean(1)[:, :5]


def test_only_calls_of_the_backbone_are_blocks() -> None:
    model = replace(vs.load(BackboneAndBlock().eval(), **LAYOUT), backbone="net")
    trace = vs.capture(model, random(1, 3, 32, 32))
    assert [step.module for step in trace.steps] == ["net.stages.0", "net.stages.1"]
    assert trace.omitted == (OmittedCall("after", 16, 16, "outside the backbone"),)
    trace.require_chain()
    with pytest.raises(
        UnsupportedModelError, match=r"none of the 3 attention calls of .* is inside its backbone 'nowhere'"
    ):
        vs.capture(replace(model, backbone="nowhere"), random(1, 3, 32, 32))


@pytest.mark.parametrize("prefix", [False, True])
def test_the_readout_of_attention_pooling_is_its_attention(prefix: bool) -> None:
    """Attention pooling of timm reads the patches or all tokens; the readout is 0 for tokens that it does not read."""
    torch.manual_seed(0)
    tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
    options = {"global_pool": "map", "class_token": True, "pool_include_prefix": prefix}
    module = timm.create_model("vit_tiny_patch16_224", pretrained=False, **tiny, **options).eval()
    pixels = random(2, 3, 32, 32)
    trace = vs.capture(vs.load(module), pixels)
    pool = module.attn_pool
    with torch.no_grad():
        tokens = module.forward_features(pixels)[:, 0 if prefix else 1 :]
        query = pool.q_norm(pool.q(pool.latent).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2))
        key, _ = pool.kv(tokens).unflatten(-1, (2, pool.num_heads, -1)).permute(2, 0, 3, 1, 4)
        rows = (query @ pool.k_norm(key).mT * key.shape[-1] ** -0.5).softmax(-1).mean((1, 2))
    torch.testing.assert_close(trace.readout, rows if prefix else F.pad(rows, (1, 0)))


def test_windows_of_segment_anything_are_not_heads() -> None:
    """Windows and images share an axis; the weights of each window equal those that the module returns."""
    torch.manual_seed(0)
    config = transformers.SamVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=8, window_size=4,
        global_attn_indexes=[1], output_channels=16, attn_implementation="eager",
    )  # fmt: skip
    module = transformers.SamVisionModel(config).eval()
    returned: list[Tensor] = []
    attention = module.vision_encoder.layers[0].attn
    attention.register_forward_hook(lambda *call: returned.append(call[-1][1]))
    with torch.no_grad():
        module(random(2, 3, 64, 64), output_attentions=True)
    trace = vs.capture(vs.load(module), random(2, 3, 64, 64))
    assert [tuple(step.scores.shape[1:4]) for step in trace.steps] == [(4, 4, 16), (1, 4, 64)]
    torch.testing.assert_close(trace.steps[0].weights().flatten(0, 1), returned[0].reshape(8, 4, 16, 16))


@pytest.mark.slow
def test_windows_of_hiera_are_not_heads() -> None:
    torch.manual_seed(0)
    module = timm.create_model("hiera_tiny_224", pretrained=False).eval()
    with pytest.warns(vs.VitscopeWarning, match=r"3 of 12 attention calls .* blocks\.1\.attn \(16 queries, 64 keys\)"):
        trace = vs.capture(vs.load(module), random(1, 3, 224, 224))
    for step in trace.steps:
        assert step.num_heads == module.get_submodule(step.module).heads


@pytest.mark.parametrize(
    ("leading", "batch", "heads", "expected"),
    [
        ((8,), 2, 4, (2, 1, 4)),
        ((24,), 2, 4, (2, 3, 4)),
        ((2, 4), 2, 4, (2, 1, 4)),
        ((6, 4), 2, 4, (2, 3, 4)),
        ((4, 2), 2, 4, (2, 1, 4)),
        ((8, 1), 2, 4, (2, 1, 4)),
        ((2, 3, 4), 2, 4, (2, 3, 4)),
        ((2, 4, 3), 2, 4, (2, 3, 4)),
        ((2, 4, 4), 2, None, (2, 4, 4)),
    ],
)
def test_the_number_of_heads_determines_the_order_of_axes(
    leading: tuple[int, ...], batch: int, heads: int | None, expected: tuple[int, int, int]
) -> None:
    axes = axes_of(leading, batch, heads, "m")
    tensor = random(*leading, 5, 6)
    split = axes.split(tensor)
    assert split.shape == (*expected, 5, 6)
    if leading == (4, 2):
        assert torch.equal(split[1, 0, 3], tensor[3, 1])
    if leading == (2, 4, 3):
        assert torch.equal(split[1, 2, 3], tensor[1, 3, 2])


@pytest.mark.parametrize(
    ("leading", "batch", "heads", "message"),
    [
        ((2, 4, 4), 2, 4, "4 heads do not show which are heads and which are windows"),
        ((2, 49), 2, 4, "axes of 2×49 for 2 images and 4 heads"),
        ((10,), 2, 4, "axes of 10 for 2 images and 4 heads"),
        ((1, 4), 2, 4, "packs the 2 images of a batch into 1 sequence: pass one image at a time"),
        ((3, 5), 2, None, "axes of 3×5 for 2 images and an unknown number of heads"),
    ],
)
def test_axes_that_contradict_the_module_are_refused(leading: Any, batch: int, heads: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        axes_of(leading, batch, heads, "m")


def test_a_packed_batch_is_refused_but_a_single_image_is_captured() -> None:
    class Packed(ExplicitBlock):
        def forward(self, pixels: Tensor) -> Tensor:
            tokens = self.embed(pixels).flatten(2).mT.flatten(0, 1)[None]
            query, key, value = self.qkv(tokens).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            return self.mix((query @ key.mT).softmax(-1), value).flatten(1)

    module = Packed(lambda weights, value: weights @ value).eval()
    module.num_heads = 2
    with pytest.raises(UnsupportedModelError, match="pass one image at a time"):
        vs.capture(module, random(2, 3, 32, 24))
    assert vs.capture(module, random(1, 3, 32, 24)).attention(0).shape == (1, 2, 12, 12)


@pytest.mark.slow
def test_attention_of_a_window_transformer_outside_its_layers_is_reported() -> None:
    """A subclass pools by attention in its own forward method, outside all submodules."""
    timm = pytest.importorskip("timm")

    class Pooling(timm.models.SwinTransformer):
        def forward(self, pixels: Tensor) -> Tensor:
            tokens = self.forward_features(pixels).flatten(1, 2)
            query = tokens.mean(1, keepdim=True)
            return self.head.fc(F.scaled_dot_product_attention(query, tokens, tokens)[:, 0])

    options = {
        "img_size": 32,
        "patch_size": 2,
        "window_size": 4,
        "embed_dim": 16,
        "depths": (2, 2),
        "num_heads": (2, 4),
    }
    model = vs.load(Pooling(**options, num_classes=5).eval(), output="logits", labels=list("abcde"))
    with pytest.warns(vs.VitscopeWarning, match=r"1 of 5 attention calls .*1 queries, 64 keys"):
        trace = vs.capture(model, random(1, 3, 32, 32))
    assert [(call.queries, call.keys) for call in trace.omitted] == [(1, 64)]
    assert trace.num_layers == 4
