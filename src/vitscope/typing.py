"""Array types, and the glossary of their axes.

==============  ============================================================================
batch           images
window          windows of an image, whose tokens attend to each other (one in a plain ViT)
head            attention heads
query, key      the token that attends, the token that is attended to
token           prefix tokens (CLS, distillation, registers), then patches row by row
slot            a position in a window, which holds a token or padding
row             vectors over tokens that are processed together
merged          tokens after patch merging, each made of a group of four
height, width   of the token grid; of an image if the name contains "pixel"
==============  ============================================================================
"""

from jaxtyping import Float, Int
from torch import Tensor

Pixels = Float[Tensor, "batch input_channel pixel_height pixel_width"]
"""Model input."""

Weights = Float[Tensor, "batch window head query key"]
"""Attention, one matrix per head and window."""

Fused = Float[Tensor, "batch window query key"]
"""Attention with its heads combined."""

DenseAttention = Float[Tensor, "batch head query key"]
"""Attention between all tokens of an image, without windows."""

Rows = Float[Tensor, "batch row token"]
"""Row vectors over the tokens of a block."""

ReadoutRow = Float[Tensor, "batch token"]
"""One value per token."""

Maps = Float[Tensor, "batch height width"]
"""One value per patch or pixel."""

Slots = Int[Tensor, "window slot"]
"""The token in each slot; −1 for padding."""

Groups = Int[Tensor, "merged 4"]
"""The four tokens that patch merging joins; −1 for padding."""

Shares = Float[Tensor, "batch merged 4"]
"""One value for each of the four tokens that patch merging joins."""

PaddingMass = Float[Tensor, "batch row"]
"""The sum of each row's values on padding."""

Target = int | str
"""A class: its index, or its label."""
