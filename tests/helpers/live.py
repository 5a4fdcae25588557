"""Tiny live modules of each library, a photo, and a module that contains one of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.tiny import photo

PHOTO = photo(40, 36, seed=3)
SIZE = 32


def seeded(build: Callable[[], nn.Module], scale: float = 0.1) -> nn.Module:
    """Return the module in evaluation mode with noise on all parameters, so that no bias is zero."""
    torch.manual_seed(0)
    module = build().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return module


def timm_vit(classes: int = 5, name: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    import timm

    shape = {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": classes}
    return seeded(lambda: timm.create_model(name, pretrained=False, **(shape | options)))


def timm_swin(classes: int = 5) -> nn.Module:
    import timm

    shape: dict[str, Any] = {"img_size": SIZE, "patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
    name = "swin_tiny_patch4_window7_224"
    return seeded(lambda: timm.create_model(name, pretrained=False, **shape, window_size=4, num_classes=classes))


def torchvision_vit(classes: int = 5) -> nn.Module:
    from torchvision.models import VisionTransformer

    return seeded(lambda: VisionTransformer(SIZE, 8, 2, 2, 32, 48, num_classes=classes))


SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": SIZE,
    "patch_size": 8,
}


def hf_vit(classes: int = 5, **options: Any) -> nn.Module:
    import transformers

    config = transformers.ViTConfig(**SHAPE, num_labels=classes, **options)
    return seeded(lambda: transformers.ViTForImageClassification(config))


class WithOutput(nn.Module):
    """A backbone of timm and a head; ``output`` turns the logits into the output."""

    def __init__(self, output: Callable[[Tensor], Any] = lambda logits: logits, classes: int = 5) -> None:
        super().__init__()
        self.backbone = timm_vit(0)
        torch.manual_seed(1)
        self.head = nn.Linear(32, classes)
        self.output = output
        self.eval()

    def logits(self, pixels: Tensor) -> Tensor:
        return self.head(self.backbone(pixels))

    def forward(self, pixels: Tensor) -> Any:
        return self.output(self.logits(pixels))


def images(batch: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(
        batch, channels, SIZE, SIZE, generator=torch.Generator(device="cpu").manual_seed(1), device="cpu"
    )
