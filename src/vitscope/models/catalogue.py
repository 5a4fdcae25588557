"""What can be loaded, for people to read. Needs none of the libraries it speaks of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One library: its families and a name to try."""

    library: str
    families: str
    example: str


CATALOGUE = (
    Entry("vitscope", "vit-nano: a small ViT trained on CIFAR-10, bundled, works offline", "vit-nano"),
    Entry(
        "transformers",
        "ViT, DeiT, DINOv2 (also with registers), DINOv3, BEiT, CLIP and SigLIP vision towers; local folders",
        "google/vit-base-patch16-224",
    ),
    Entry("timm", "ViT, DeiT, DINOv2 with registers, DINOv3, BEiT, SigLIP vision towers", "timm:vit_small_patch16_224"),
    Entry("torchvision", "ViT", "torchvision:vit_b_16"),
)
