"""Texts as classes: the logits that a text-image model computes from the features of an image and a list of texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitscope.errors import CallError, UnsupportedModelError
from vitscope.models.outputs import Output
from vitscope.validation import short_repr

NO_TEXT_TOWER = "{} has no text tower: load a CLIPModel or SiglipModel of transformers with its own weights"


@dataclass(frozen=True, eq=False)
class TextLogits:
    """A function from the features of images to the logits of texts: scale · cos(image, text) + bias.

    The vectors are constants: they were computed once, and no gradient reaches the text tower. The logits are
    differentiable in the features. They are computed in float32 at least, because half precision cannot tell logits
    of similar texts apart.

    Attributes:
        texts: the texts.
        vectors: vector of each text, of length ``scale`` (the model's temperature), (text, channel).
        bias: number added to the logit of each text, (text,); None if the model has none.
        projection: matrix from features to the channels of the vectors, (channel, feature); None if they are the same.

    Reference: CLIP, Radford et al., 2021 (arXiv 2103.00020); SigLIP, Zhai et al., 2023 (arXiv 2303.15343).
    """

    texts: tuple[str, ...]
    vectors: Float[Tensor, "text channel"]
    bias: Float[Tensor, " text"] | None = None
    projection: Float[Tensor, "channel feature"] | None = None

    def __call__(self, features: Float[Tensor, "batch feature"]) -> Float[Tensor, "batch text"]:
        """Return the logits of the texts.

        Args:
            features: features of the images, from :meth:`vitscope.VisionModel.features`.
        """
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        if self.projection is not None:
            features = F.linear(features, self.projection.to(features))
        bias = None if self.bias is None else self.bias.to(features)
        return F.linear(F.normalize(features, dim=-1), self.vectors.to(features), bias)


@runtime_checkable
class TextEncoder(Protocol):
    """The text tower of a text-image model with its tokenizer.

    Attributes:
        meaning: meaning of the logits: ``"softmax"`` for CLIP, ``"sigmoid"`` for SigLIP.
    """

    @property
    def meaning(self) -> Output: ...

    def __call__(self, texts: Sequence[str], device: torch.device) -> TextLogits:
        """Return the logits of texts.

        Args:
            texts: the texts, without empty ones.
            device: device on which a text tower runs that is not loaded yet.
        """
        ...

    def with_tokenizer(self, tokenizer: Any) -> "TextEncoder":
        """Return the text tower with another tokenizer."""
        ...


def require_text_tower(text: TextEncoder | None, name: str) -> TextEncoder:
    """Return the text tower of a model.

    Raises:
        UnsupportedModelError: the model has none.
    """
    if text is None:
        raise UnsupportedModelError(NO_TEXT_TOWER.format(name))
    return text


def require_texts(texts: Any) -> tuple[str, ...]:
    """Return texts as a tuple.

    Raises:
        CallError: there are none, or one of them is empty or not a string.
    """
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
        raise CallError(f"texts is {short_repr(texts)}: pass a list of texts, such as ['a photo of a cat']")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise CallError(f"the text {short_repr(text)} is empty or not a string: pass words that describe an image")
    return tuple(texts)
