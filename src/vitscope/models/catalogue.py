"""The list of supported model families that the command line prints; it imports none of the libraries."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One library, its supported families and an example name."""

    library: str
    families: str
    example: str


CATALOGUE = (
    Entry(
        "vitscope", "vit-nano, swin-nano: a small ViT and Swin trained on CIFAR-10, bundled, work offline", "vit-nano"
    ),
    Entry(
        "transformers",
        "ViT, DeiT, DINOv2 (also with registers), DINOv3, BEiT, CLIP and SigLIP vision towers, Swin, Swin v2; folders",
        "google/vit-base-patch16-224",
    ),
    Entry(
        "timm",
        "ViT, DeiT, DINOv2 with registers, DINOv3, BEiT, SigLIP vision towers, Swin, Swin v2; MaxViT's attention maps",
        "timm:swin_tiny_patch4_window7_224",
    ),
    Entry("torchvision", "ViT, Swin, Swin v2", "torchvision:swin_t"),
)
