"""A tiny seeded model of every supported family, with facts from the source of its library."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import vitscope as vs

REGISTERS = tuple(f"register_{i}" for i in range(1, 5))
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_labels": 7,
}


@dataclass(frozen=True)
class Family:
    """A family: how to build its model, and its tokens."""

    name: str
    build: Callable[[], nn.Module]
    prefix_names: tuple[str, ...]
    readout: Mapping[str, float]
    size: tuple[int, int] = (32, 48)
    patch: int = 8

    @property
    def library(self) -> str:
        return self.name.split("-")[0]

    @property
    def grid(self) -> vs.Grid:
        return vs.Grid(self.size[0] // self.patch, self.size[1] // self.patch, len(self.prefix_names))

    def model(self) -> vs.VisionModel:
        """Return the seeded model with noise on all weights, so that no bias or token is zero."""
        pytest.importorskip(self.library)
        torch.manual_seed(0)
        module = self.build().eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return vs.load(module)

    def pixels(self, batch: int = 2) -> torch.Tensor:
        return torch.randn(batch, 3, *self.size, generator=torch.Generator().manual_seed(1))


def hf(class_name: str, config_name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, config_name)(**(TINY | {"image_size": 32, "patch_size": 8} | options))
        return getattr(transformers, class_name)(config)

    return build


def hf_tower(class_name: str, config_name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        vision = TINY | {"image_size": 32, "patch_size": 8} | options
        config = getattr(transformers, config_name)(vision_config=vision, num_labels=7)
        return getattr(transformers, class_name)(config)

    return build


def from_timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        tiny = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 7}
        return timm.create_model(name, pretrained=False, **(tiny | options))

    return build


def from_torchvision() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 3, 4, 32, 48, num_classes=7)


CLS = {"cls": 1.0}
PATCHES = {"patches": 1.0}
HALF = {"cls": 0.5, "patches": 0.5}
TWO_HEADS = {"cls": 0.5, "distillation": 0.5}

ALL = [
    Family("transformers-vit", hf("ViTForImageClassification", "ViTConfig"), ("cls",), CLS),
    Family("transformers-vit-bare", hf("ViTModel", "ViTConfig"), ("cls",), CLS),
    Family("transformers-deit", hf("DeiTForImageClassification", "DeiTConfig"), ("cls", "distillation"), CLS),
    Family(
        "transformers-deit-distilled",
        hf("DeiTForImageClassificationWithTeacher", "DeiTConfig"),
        ("cls", "distillation"),
        TWO_HEADS,
    ),
    Family("transformers-dinov2", hf("Dinov2Model", "Dinov2Config"), ("cls",), CLS),
    Family("transformers-dinov2-head", hf("Dinov2ForImageClassification", "Dinov2Config"), ("cls",), HALF),
    Family(
        "transformers-dinov2-registers",
        hf("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig"),
        ("cls", *REGISTERS),
        HALF,
    ),
    Family(
        "transformers-dinov3",
        hf("DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=4),
        ("cls", *REGISTERS),
        CLS,
    ),
    Family(
        "transformers-beit",
        hf("BeitForImageClassification", "BeitConfig", use_relative_position_bias=True),
        ("cls",),
        PATCHES,
    ),
    Family(
        "transformers-beit-cls",
        hf("BeitForImageClassification", "BeitConfig", use_mean_pooling=False, use_absolute_position_embeddings=True),
        ("cls",),
        CLS,
    ),
    Family("transformers-clip", hf("CLIPVisionModel", "CLIPVisionConfig"), ("cls",), CLS),
    Family("transformers-clip-head", hf_tower("CLIPForImageClassification", "CLIPConfig"), ("cls",), PATCHES),
    Family("transformers-siglip", hf("SiglipVisionModel", "SiglipVisionConfig"), (), {"pooling": 1.0}),
    Family("transformers-siglip-head", hf_tower("SiglipForImageClassification", "SiglipConfig"), (), PATCHES),
    Family("timm-vit", from_timm("vit_small_patch16_224"), ("cls",), CLS),
    Family("timm-vit-mean", from_timm("vit_small_patch16_224", global_pool="avg"), ("cls",), PATCHES),
    Family("timm-deit-distilled", from_timm("deit_tiny_distilled_patch16_224"), ("cls", "distillation"), TWO_HEADS),
    Family("timm-dinov2-registers", from_timm("vit_small_patch14_reg4_dinov2"), ("cls", *REGISTERS), CLS),
    Family("timm-dinov3", from_timm("vit_small_patch16_dinov3"), ("cls", *REGISTERS), PATCHES),
    Family("timm-beit", from_timm("beit_base_patch16_224"), ("cls",), PATCHES),
    Family("timm-siglip", from_timm("vit_base_patch16_siglip_224"), (), {"pooling": 1.0}),
    Family("torchvision-vit", from_torchvision, ("cls",), CLS, size=(32, 32)),
]

every_family = pytest.mark.parametrize("family", ALL, ids=lambda family: family.name)
