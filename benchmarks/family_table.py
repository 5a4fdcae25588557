"""The model families of families.py: how to build each with random weights, and the size of its input."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
SMALL: dict[str, Any] = {**TINY, "image_size": 32, "patch_size": 8}
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 99,
}
VIT: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "num_classes": 5,
    "dim": 32,
    "depth": 3,
    "heads": 4,
    "mlp_dim": 48,
}


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        library: name of the package that defines it.
        name: name of the architecture or class.
        build: builds the model with random weights.
        size: height and width of the input in pixels.
    """

    library: str
    name: str
    build: Callable[[], nn.Module]
    size: int


# Names of timm models, with the size of the input after a colon; 224 pixels without one.
TIMM = """
vit_tiny_patch16_224 vit_base_patch16_gap_224 vit_xsmall_patch16_clip_224 vit_base_patch16_xp_224
vit_small_patch16_36x1_224 vit_medium_patch16_reg4_gap_256:256 vit_pwee_patch16_reg1_gap_256:256
vit_wee_patch16_reg1_gap_256:256 vit_base_patch16_siglip_224 vit_base_patch16_siglip_gap_224 vit_base_patch16_rpn_224
flexivit_small:240 deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224
eva02_tiny_patch14_224 beit_base_patch16_224 beitv2_base_patch16_224 vit_small_patch14_reg4_dinov2:518
vit_small_patch16_dinov3:256 swin_tiny_patch4_window7_224 swin_s3_tiny_224 swinv2_tiny_window8_256:256
test_vit:160 test_vit2:160 test_vit3:160 test_vit4:160
vit_tiny_r_s16_p8_224 vit_small_r26_s32_224 vitamin_small_224 vit_base_mci_224 cait_xxs24_224 convit_tiny davit_tiny
edgenext_xx_small:256 efficientformerv2_s0 efficientvit_m0 hiera_tiny_224 hiera_small_abswin_256:256
samvit_base_patch16_224 vit_small_patch16_18x2_224 vit_dlittle_patch16_reg1_gap_256:256
vit_dpwee_patch16_reg1_gap_256:256 vit_dwee_patch16_reg1_gap_256:256 xcit_nano_12_p16_224 crossvit_tiny_240:240
levit_128s levit_conv_128s mobilenetv4_hybrid_medium:256 mvitv2_tiny mvitv2_base_cls nextvit_small pvt_v2_b0
pvt_v2_b2_li twins_pcpvt_small twins_svt_small volo_d1_224 sam2_hiera_tiny mobilevit_xs:256 coatnet_nano_rw_224
maxvit_rmlp_pico_rw_256:256 tnt_s_patch16_224 pit_ti_224 nest_tiny gcvit_xxtiny tiny_vit_5m_224 caformer_s18
visformer_tiny fastvit_sa12:256 swinv2_cr_tiny_224 vit_relpos_small_patch16_224 naflexvit_base_patch16_gap
efficientformer_l1 botnet26t_256:256 shvit_s1
"""

# Classes and configurations of transformers, with the size of the input.
TRANSFORMERS: list[tuple[str, str, int, dict[str, Any]]] = [
    ("ViTForImageClassification", "ViTConfig", 32, SMALL),
    ("ViTModel", "ViTConfig", 32, SMALL),
    ("ViTForMaskedImageModeling", "ViTConfig", 32, SMALL),
    ("DeiTForImageClassification", "DeiTConfig", 32, SMALL),
    ("DeiTForImageClassificationWithTeacher", "DeiTConfig", 32, SMALL),
    ("Dinov2Model", "Dinov2Config", 32, SMALL),
    ("Dinov2ForImageClassification", "Dinov2Config", 32, SMALL),
    ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", 32, SMALL),
    ("DINOv3ViTModel", "DINOv3ViTConfig", 32, SMALL),
    ("BeitForImageClassification", "BeitConfig", 32, SMALL),
    ("BeitForMaskedImageModeling", "BeitConfig", 32, SMALL),
    ("CLIPVisionModel", "CLIPVisionConfig", 32, SMALL),
    ("CLIPVisionModelWithProjection", "CLIPVisionConfig", 32, SMALL),
    ("SiglipVisionModel", "SiglipVisionConfig", 32, SMALL),
    (
        "SwinForImageClassification",
        "SwinConfig",
        64,
        {"image_size": 64, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]},
    ),
    (
        "Swinv2ForImageClassification",
        "Swinv2Config",
        64,
        {"image_size": 64, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]},
    ),
    ("HieraForImageClassification", "HieraConfig", 224, {"embed_dim": 16, "depths": [1, 1, 2, 1]}),
    ("Sam2VisionModel", "Sam2VisionConfig", 224, {}),
    ("ViTMAEModel", "ViTMAEConfig", 32, SMALL),
    ("VitDetBackbone", "VitDetConfig", 64, {**TINY, "image_size": 64, "patch_size": 8, "window_size": 4}),
    ("SegformerForImageClassification", "SegformerConfig", 64, {}),
    ("SegformerForSemanticSegmentation", "SegformerConfig", 64, {}),
    ("PvtForImageClassification", "PvtConfig", 224, {}),
    ("PvtV2ForImageClassification", "PvtV2Config", 64, {}),
    ("GLPNForDepthEstimation", "GLPNConfig", 64, {}),
    ("LevitForImageClassification", "LevitConfig", 224, {}),
    ("MobileViTForImageClassification", "MobileViTConfig", 64, {}),
    ("YolosForObjectDetection", "YolosConfig", 64, {**SMALL, "image_size": [64, 64]}),
    ("CvtForImageClassification", "CvtConfig", 64, {}),
    ("GroupViTVisionModel", "GroupViTVisionConfig", 224, {}),
    ("Data2VecVisionForImageClassification", "Data2VecVisionConfig", 32, SMALL),
    ("ViTMSNForImageClassification", "ViTMSNConfig", 32, SMALL),
    ("IJepaModel", "IJepaConfig", 32, SMALL),
    ("PixtralVisionModel", "PixtralVisionConfig", 32, SMALL),
    ("MgpstrForSceneTextRecognition", "MgpstrConfig", 32, {"image_size": [32, 128], "num_hidden_layers": 2}),
    ("VideoMAEModel", "VideoMAEConfig", 32, {**SMALL, "num_frames": 4}),
    ("VivitModel", "VivitConfig", 32, {**TINY, "image_size": 32, "num_frames": 4}),
    ("TimesformerModel", "TimesformerConfig", 32, {**SMALL, "num_frames": 4}),
    ("VJEPA2Model", "VJEPA2Config", 32, {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}),
    ("SegGptModel", "SegGptConfig", 32, {**TINY, "image_size": [32, 32], "patch_size": 8}),
    ("Siglip2VisionModel", "Siglip2VisionConfig", 32, TINY),
    ("ImageGPTForImageClassification", "ImageGPTConfig", 32, {"n_embd": 16, "n_layer": 1, "n_head": 2}),
    ("PerceiverForImageClassificationLearned", "PerceiverConfig", 32, {"num_latents": 8, "d_latents": 32}),
    ("ViltModel", "ViltConfig", 32, SMALL),
    ("LayoutLMv3Model", "LayoutLMv3Config", 32, {**TINY, "input_size": 32}),
    ("Idefics3VisionTransformer", "Idefics3VisionConfig", 32, SMALL),
    ("MllamaVisionModel", "MllamaVisionConfig", 32, {"image_size": 32, "patch_size": 8, "num_hidden_layers": 1}),
    ("BlipVisionModel", "BlipVisionConfig", 32, SMALL),
    ("GitForCausalLM", "GitConfig", 32, {**TINY, "vocab_size": 99, "vision_config": SMALL}),
    ("OwlViTForObjectDetection", "OwlViTConfig", 32, {"vision_config": SMALL, "text_config": TINY}),
    ("SamModel", "SamConfig", 64, {"vision_config": {**TINY, "image_size": 64, "patch_size": 8}}),
    (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        32,
        {"vision_config": {"model_type": "clip_vision_model", **SMALL}, "text_config": {"model_type": "llama", **TEXT}},
    ),
    (
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        32,
        {
            "vision_config": {"model_type": "siglip_vision_model", **SMALL, "vision_use_head": False},
            "text_config": {"model_type": "gemma", **TEXT, "head_dim": 16},
        },
    ),
    (
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        32,
        {"vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2}, "text_config": TEXT},
    ),
    (
        "DetrForObjectDetection",
        "DetrConfig",
        64,
        {
            "use_timm_backbone": True,
            "use_pretrained_backbone": False,
            "backbone": "resnet18",
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
        },
    ),
]

# Modules and classes of vit_pytorch, with the size of the input and the arguments.
VIT_PYTORCH: list[tuple[str, str, int, dict[str, Any]]] = [
    ("vit", "ViT", 32, VIT),
    ("simple_vit", "SimpleViT", 32, VIT),
    ("ats_vit", "ViT", 32, {**VIT, "max_tokens_per_depth": (16, 8, 4)}),
    ("cait", "CaiT", 32, {**VIT, "cls_depth": 2}),
    ("deepvit", "DeepViT", 32, VIT),
    ("xcit", "XCiT", 32, {**VIT, "cls_depth": 2}),
    ("parallel_vit", "ViT", 32, {**VIT, "num_parallel_branches": 2}),
    ("twins_svt", "TwinsSVT", 224, {"num_classes": 5}),
    ("vit_with_patch_merger", "ViT", 32, {**VIT, "patch_merge_layer": 1, "patch_merge_num_tokens": 8}),
    ("na_vit", "NaViT", 32, VIT),
    ("cvt", "CvT", 64, {"num_classes": 5}),
    ("regionvit", "RegionViT", 224, {"num_classes": 5}),
    ("crossformer", "CrossFormer", 224, {"num_classes": 5}),
    ("rvt", "RvT", 32, VIT),
    ("vit_for_small_dataset", "ViT", 32, VIT),
]

TORCHVISION = ("vit_b_32", "swin_t", "swin_v2_t", "maxvit_t")
OPEN_CLIP = ("ViT-B-32", "coca_ViT-B-32", "RN50")


def families(library: str) -> Iterator[Family]:
    """Yield every family of a library."""
    if library == "timm":
        for entry in TIMM.split():
            name, _, size = entry.partition(":")
            yield Family(library, name, lambda name=name: _module("timm").create_model(name), int(size or 224))
    elif library == "transformers":
        for cls, config, size, options in TRANSFORMERS:
            yield Family(library, cls, lambda c=cls, g=config, o=options: _transformers(c, g, o), size)
    elif library == "torchvision":
        for name in TORCHVISION:
            yield Family(library, name, lambda name=name: _module("torchvision.models").get_model(name), 224)
    elif library == "vit_pytorch":
        for home, cls, size, options in VIT_PYTORCH:
            build = lambda h=home, c=cls, o=options: getattr(_module(f"vit_pytorch.{h}"), c)(**o)  # noqa: E731
            yield Family(library, f"{home} {cls}", build, size)
    elif library == "open_clip":
        for name in OPEN_CLIP:
            yield Family(library, name, lambda name=name: _module("open_clip").create_model(name).visual, 224)


def _module(name: str) -> Any:
    return importlib.import_module(name)


def _transformers(cls: str, config: str, options: dict[str, Any]) -> nn.Module:
    library = _module("transformers")
    return getattr(library, cls)(getattr(library, config)(**options))
