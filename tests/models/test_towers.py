"""Image encoders inside larger models, against the encoder run directly; models without one are refused."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.helpers.live import PHOTO, SHAPE, images, seeded
from vitscope.errors import CallError, UnknownModelError, UnsupportedModelError, VitscopeError

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 100,
}
BERT = TEXT | {"model_type": "bert"}
LLAMA = TEXT | {"model_type": "llama", "num_key_value_heads": 2}


def of(class_name: str, config_name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, config_name)(**options)
        return seeded(lambda: getattr(transformers, class_name)(config), scale=0.05)

    return build


def encoder_decoder(decoder: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        encoder = transformers.ViTConfig(**SHAPE)
        text: Any = transformers.CONFIG_MAPPING[decoder](**options)
        config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, text)
        return seeded(lambda: transformers.VisionEncoderDecoderModel(config=config), scale=0.05)

    return build


TROCR = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 48, "vocab_size": 100}
CLIP_VISION = SHAPE | {"model_type": "clip_vision_model", "projection_dim": 16}

# Each model, and the path of its image encoder.
TOWERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "CLIP": (of("CLIPModel", "CLIPConfig", vision_config=SHAPE, text_config=TEXT, projection_dim=16), "vision_model"),
    "SigLIP": (of("SiglipModel", "SiglipConfig", vision_config=SHAPE, text_config=TEXT), "vision_model"),
    "BLIP": (
        of("BlipForConditionalGeneration", "BlipConfig", vision_config=SHAPE, text_config=TEXT),
        "vision_model",
    ),
    "BLIP retrieval": (
        of("BlipForImageTextRetrieval", "BlipConfig", vision_config=SHAPE, text_config=TEXT),
        "vision_model",
    ),
    "LLaVA": (
        of("LlavaForConditionalGeneration", "LlavaConfig", vision_config=CLIP_VISION, text_config=LLAMA),
        "model.vision_tower",
    ),
    "OWL-ViT": (of("OwlViTModel", "OwlViTConfig", vision_config=SHAPE, text_config=TEXT), "vision_model"),
    "OWL-ViT detection": (
        of("OwlViTForObjectDetection", "OwlViTConfig", vision_config=SHAPE, text_config=TEXT),
        "owlvit.vision_model",
    ),
    "GIT": (of("GitForCausalLM", "GitConfig", vision_config=SHAPE, **TEXT), "git.image_encoder"),
    "encoder and decoder": (encoder_decoder("bert", **TEXT), "encoder"),
    "TrOCR": (encoder_decoder("trocr", **TROCR), "encoder"),
    "vision and text": (
        lambda: of("VisionTextDualEncoderModel", "VisionTextDualEncoderConfig", **dual())(),
        "vision_model",
    ),
}


def dual() -> dict[str, Any]:
    return {"vision_config": SHAPE | {"model_type": "vit"}, "text_config": BERT, "projection_dim": 16}


def library_maps(tower: nn.Module, pixels: Tensor) -> list[Tensor]:
    """Return the attention that the library itself computes."""
    with torch.no_grad():
        implementation = tower.config._attn_implementation  # type: ignore[union-attr]
        tower.set_attn_implementation("eager")  # type: ignore[operator]
        try:
            returned = tower(pixel_values=pixels, output_attentions=True)
        finally:
            tower.set_attn_implementation(implementation)  # type: ignore[operator]
    return list(returned.attentions)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOWERS)
def test_the_image_encoder_is_captured(kind: str) -> None:
    build, path = TOWERS[kind]
    module, pixels = build(), images(1)
    model = vs.load(module)
    tower = module.get_submodule(path)
    assert model.module is tower
    trace = vs.capture(model, pixels)
    assert trace.num_layers == 2
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())
    for layer, expected in enumerate(library_maps(tower, pixels)):
        assert torch.allclose(trace.attention(layer), expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOWERS)
def test_the_encoder_alone_gives_the_same_results(kind: str) -> None:
    build, path = TOWERS[kind]
    module = build()
    outer, inner = vs.load(module), vs.load(module.get_submodule(path))
    assert torch.equal(vs.capture(outer, images(1)).attention(1), vs.capture(inner, images(1)).attention(1))
    with pytest.raises(UnsupportedModelError) as caught:
        outer.predict(images(1))
    assert "\n" not in str(caught.value)
    if outer.embed is not None:
        with torch.no_grad(), outer.running():
            assert torch.equal(outer.features(images(1)), inner.features(images(1)))  # type: ignore[misc]


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOWERS)
def test_a_model_inside_the_callers_module_is_captured_too(kind: str) -> None:
    build, path = TOWERS[kind]

    class Holding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build()

        def forward(self, pixels: Tensor) -> Tensor:
            return self.inner.get_submodule(path)(pixels).last_hidden_state

    model = vs.load(Holding().eval())
    assert model.backbone == f"inner.{path}"
    expected = vs.capture(vs.load(model.module.inner), images(1)).attention(1)
    assert torch.allclose(vs.capture(model, images(1)).attention(1), expected, atol=1e-6)


REFUSED: dict[str, tuple[Callable[[], nn.Module], type[VitscopeError], str]] = {
    "ViLT": (of("ViltModel", "ViltConfig", **(SHAPE | {"vocab_size": 100})), UnsupportedModelError, "input_ids"),
    "Qwen2-VL": (
        of(
            "Qwen2VLForConditionalGeneration",
            "Qwen2VLConfig",
            vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2},
            text_config=TEXT | {"num_key_value_heads": 2},
        ),
        UnsupportedModelError,
        "input_ids",
    ),
    "BERT": (of("BertModel", "BertConfig", **TEXT), UnknownModelError, "does not take images: its input is input_ids"),
    "LLaMA": (
        of("LlamaForCausalLM", "LlamaConfig", **TEXT, num_key_value_heads=2),
        UnknownModelError,
        "does not take images: its input is input_ids",
    ),
    "wav2vec": (
        of("Wav2Vec2Model", "Wav2Vec2Config", **(TEXT | {"conv_dim": [32] * 7, "num_conv_pos_embeddings": 8})),
        UnknownModelError,
        "does not take images: its input is input_values",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_need_more_than_an_image_are_refused_in_one_line(kind: str) -> None:
    build, error, reason = REFUSED[kind]
    module = build()
    with pytest.raises(error) as caught:
        vs.load(module)
    message = str(caught.value)
    assert "\n" not in message
    assert reason in message
    listed = message.partition("more than an image (")[2].partition(")")[0].split(", ")
    if listed != [""]:
        assert set(listed) <= set(inspect.signature(type(module).forward).parameters)


def sam() -> nn.Module:
    import transformers

    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 8}
    vision |= {"output_channels": 16, "global_attn_indexes": [1], "window_size": 4, "mlp_dim": 48}
    prompt = {"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4}
    mask = {"hidden_size": 16, "num_attention_heads": 2, "mlp_dim": 32, "iou_head_hidden_dim": 16}
    config = transformers.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=mask)
    return seeded(lambda: transformers.SamModel(config))


def detr() -> nn.Module:
    import transformers

    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"], num_channels=3
    )
    sizes = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_layers": 2, "decoder_layers": 1, "d_model": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 5}
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        backbone_config=backbone,
        backbone=None,
        use_pretrained_backbone=False,
        **sizes,
        **heads,
    )
    return seeded(lambda: transformers.DetrForObjectDetection(config))


@pytest.mark.parametrize("build", [sam, detr])
def test_a_detector_or_segmenter_predicts_no_classes(build: Callable[[], nn.Module]) -> None:
    size = 64
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator(device="cpu").manual_seed(0), device="cpu")
    with pytest.raises(VitscopeError) as caught:
        vs.load(build()).predict(pixels)
    assert "\n" not in str(caught.value)


def test_a_tower_with_random_weights_has_the_preprocessing_of_its_family() -> None:
    model = vs.load(TOWERS["CLIP"][0]())
    assert model.preprocessing is not None
    assert "default of the model's family" in model.preprocessing.source
    assert vs.attention_map(model, PHOTO).values.shape == (1, 4, 4)


def test_a_submodule_of_a_saved_model_can_be_named(tmp_path: Path) -> None:
    of("LlavaForConditionalGeneration", "LlavaConfig", vision_config=CLIP_VISION, text_config=LLAMA)().save_pretrained(
        tmp_path
    )
    by_name, by_itself = vs.load(tmp_path, backbone="vision_tower"), vs.load(tmp_path)
    assert torch.equal(vs.rollout(by_name, images(1)).values, vs.rollout(by_itself, images(1)).values)
    with pytest.raises(CallError, match=r"^backbone='nope' is not a model inside LlavaModel: it holds vision_tower"):
        vs.load(tmp_path, backbone="nope")
