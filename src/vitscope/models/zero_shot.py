"""Zero-shot classification: the classes of a text-image model are texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from vitscope.errors import CallError
from vitscope.models.text import TextLogits
from vitscope.models.vision_model import VisionModel


def zero_shot_classifier(model: VisionModel, labels: Sequence[str]) -> VisionModel:
    """Return a classifier that compares the features of an image with the vectors of texts.

    The texts reach the tokenizer as they are: no template such as "a photo of a …" is added.

    Args:
        model: a text-image model of transformers, loaded as its vision tower.
        labels: texts of the classes.

    Returns:
        A copy of the model that shares its weights. Its logits are those of the library, its probabilities their
        softmax (CLIP) or sigmoid (SigLIP).

    Raises:
        CallError: a text is empty, too long or listed twice, or the only class of a softmax.
        UnsupportedModelError: the model has no text tower.
        ModelUnavailableError: the text tower or its tokenizer is not available.
    """
    text_logits = model.text_logits(labels)
    assert model.text is not None
    assert model.embed is not None
    repeated = next((label for label in labels if list(labels).count(label) > 1), None)
    if repeated is not None:
        raise CallError(f"labels lists {repeated!r} twice: pass each text once")
    if model.text.meaning == "softmax" and len(labels) < 2:
        raise CallError(
            f"labels lists one text, whose probability in a softmax is always 1: pass two or more, or use the logit "
            f"of {labels[0]!r} from text_logits"
        )
    return replace(
        model, forward=ZeroShot(model.embed, text_logits), labels=text_logits.texts, output=model.text.meaning
    )


@dataclass(frozen=True, eq=False)
class ZeroShot:
    """The forward pass of a zero-shot classifier: the logits of texts from the features of the vision tower."""

    embed: Callable[[Tensor], Tensor]
    text_logits: TextLogits

    def __call__(self, pixels: Tensor) -> Float[Tensor, "batch label"]:
        return self.text_logits(self.embed(pixels))
