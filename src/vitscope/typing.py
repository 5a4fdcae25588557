"""The axis glossary: what the names in every shape mean.

============ ==========================================================================
batch        images
window       windows of one image that attend separately (a plain ViT has one)
head         attention heads
query, key   the token that looks, the token that is looked at
token        prefix tokens (CLS, distillation, registers), then patches row by row
slot         a place in a window: a token, or padding
row          row vectors over tokens that are folded side by side
merged       tokens after patch merging, each made of a group of four
height, width  of the token grid, or of pixels where a name says pixels
============ ==========================================================================
"""

from jaxtyping import Float, Int
from torch import Tensor

Pixels = Float[Tensor, "batch input_channel pixel_height pixel_width"]
Weights = Float[Tensor, "batch window head query key"]
Fused = Float[Tensor, "batch window query key"]
DenseAttention = Float[Tensor, "batch head query key"]
Rows = Float[Tensor, "batch row token"]
ReadoutRow = Float[Tensor, "batch token"]
Maps = Float[Tensor, "batch height width"]
Slots = Int[Tensor, "window slot"]
Groups = Int[Tensor, "merged 4"]
Shares = Float[Tensor, "batch merged 4"]
Fallen = Float[Tensor, "batch row"]
