"""Save an untrained model as a transformers folder, with the preprocessing of CIFAR-10."""

from pathlib import Path

from transformers import PreTrainedModel, ViTImageProcessorPil

MEAN = [0.4914, 0.4822, 0.4465]
STD = [0.2470, 0.2435, 0.2616]


def save_start(model: PreTrainedModel, out: Path) -> None:
    """Write a model and its image processor to a folder."""
    model.save_pretrained(out)
    ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD, resample=3).save_pretrained(
        out
    )
    print(f"wrote {out}: {sum(parameter.numel() for parameter in model.parameters()):,} weights")
