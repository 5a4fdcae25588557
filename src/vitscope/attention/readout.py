"""What the classifier reads: the readout as text, and the contributions of tokens to a logit."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from vitscope.attention.scores import Compact, in_float32
from vitscope.errors import CallError
from vitscope.typing import ReadoutRow


def readout_text(readout: Mapping[str, float]) -> str:
    """Return a readout as text.

    Examples:
        >>> readout_text({"cls": 1.0}), readout_text({"cls": 0.5, "patches": 0.5})
        ('cls', '0.5 cls + 0.5 patches')
    """
    return " + ".join(source if weight == 1 else f"{weight:g} {source}" for source, weight in readout.items())


@dataclass(frozen=True, eq=False)
class PooledClassifier(Compact):
    """A linear classifier on the mean of the tokens, so each logit is exactly a sum over tokens.

    ``logit_c = bias_c + mean_i weight_c · features_i``

    Attributes:
        features: tokens that are averaged: the output of the last LayerNorm.
        weight: weight of the linear layer.
    """

    features: Float[Tensor, "batch token channel"]
    weight: Float[Tensor, "label channel"]

    def contributions(self, index: int) -> Float[Tensor, "batch token"]:
        """Return the contribution of each token to the logit of a class.

        Args:
            index: index of the class.

        Returns:
            float32 (batch, token), weight_c · features_i divided by the number of tokens.
        """
        with in_float32(self.features):
            return self.features.float() @ self.weight[index].float() / self.features.shape[1]

    def shares(self, index: int, label: str) -> ReadoutRow:
        """Return the share of each token in the positive contributions to a class.

        Args:
            index: index of the class.
            label: label of the class, for the error message.

        Returns:
            float32 (batch, token); rows sum to one. Tokens with a negative contribution have a share of 0.

        Raises:
            CallError: no token of an image contributes to the class.
        """
        positive = self.contributions(index).clamp_min(0)
        totals = positive.sum(-1, keepdim=True)
        if not bool((totals > 0).all()):
            raise CallError(f"no token contributes to {label!r}: choose another target, or omit target")
        return positive / totals
