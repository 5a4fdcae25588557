"""Write the untrained vit-nano: a plain transformers ViT for CIFAR-10 that can be trained on a CPU.

    python training/vit_nano.py start/vit-nano
    vitscope finetune cifar10 --model start/vit-nano --tuning full --recipe training/vit-nano.toml --out out/vit-nano

Heads start as a convolution, an idea of Zheng et al., 2024 (arXiv 2404.01139), here with Fourier features: sixteen
dimensions of the residual stream hold sines and cosines of the patch position, and in nine heads of each block the
query is the position shifted by one of the nine 3×3 offsets. Training is free to change this.
"""

import argparse
import math
from pathlib import Path

import torch
from starting import save_start
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

POSITION_DIMS = 16  # sine and cosine of four frequencies on two axes
FREQUENCIES = (0.4, 0.9, 1.6, 2.6)  # radians per patch: the cosines add up at distance 0 only
SHARPNESS = 5.0  # initial lead of the preferred neighbour over the others, in logits
OFFSETS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]


def build_model(hidden_size: int, layers: int, heads: int, mlp_ratio: int) -> ViTForImageClassification:
    """Return a ViT for images of 32 × 32 pixels, with the library's initialisation."""
    config = ViTConfig(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=hidden_size * mlp_ratio,
        image_size=32,
        patch_size=4,
    )
    return ViTForImageClassification(config)


def position_features(grid: int) -> Tensor:
    """Return (grid², 16): for each axis and frequency the pair (cos, sin) of the patch's position."""
    y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    features = []
    for axis in (y.flatten(), x.flatten()):
        for frequency in FREQUENCIES:
            features += [torch.cos(axis * frequency), torch.sin(axis * frequency)]
    return torch.stack(features, dim=1)


def shift_matrix(dy: int, dx: int) -> Tensor:
    """Return the matrix (16, 16) that turns the features of position p into those of p + (dy, dx)."""
    turn = torch.zeros(POSITION_DIMS, POSITION_DIMS)
    place = 0
    for step in (dy, dx):
        for frequency in FREQUENCIES:
            angle = step * frequency
            cos, sin = math.cos(angle), math.sin(angle)
            turn[place : place + 2, place : place + 2] = torch.tensor([[cos, -sin], [sin, cos]])
            place += 2
    return turn


@torch.no_grad()
def start_as_convolution(model: ViTForImageClassification) -> None:
    """Initialise the first 16 dimensions to the position, and the first nine heads to the 3×3 neighbours."""
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    embeddings = model.vit.embeddings
    embeddings.position_embeddings[:, 1:, :POSITION_DIMS] = position_features(8)
    embeddings.position_embeddings[:, :, POSITION_DIMS:].normal_(std=0.02)
    embeddings.position_embeddings[:, 0, :POSITION_DIMS] = 0
    embeddings.cls_token.normal_(std=0.5)
    embeddings.cls_token[..., :POSITION_DIMS] = 0
    projection = embeddings.patch_embeddings.projection
    nn.init.orthogonal_(projection.weight.view(config.hidden_size, -1), gain=1.0)
    projection.weight[:POSITION_DIMS] = 0
    # After the LayerNorm a position pair has about length one, and four pairs agree on each axis.
    gain = math.sqrt(SHARPNESS * math.sqrt(head_dim) / 4)
    for layer in model.vit.layers:
        attention = layer.attention
        for name in ("q_proj", "k_proj"):
            nn.init.normal_(getattr(attention, name).weight, std=0.02)
        for head, offset in enumerate(OFFSETS):
            rows = slice(head * head_dim, (head + 1) * head_dim)
            attention.q_proj.weight[rows] = 0
            attention.k_proj.weight[rows] = 0
            attention.q_proj.weight[rows, :POSITION_DIMS] = gain * shift_matrix(*offset)
            attention.k_proj.weight[rows, :POSITION_DIMS] = gain * torch.eye(head_dim, POSITION_DIMS)
        nn.init.orthogonal_(attention.v_proj.weight)
        nn.init.orthogonal_(attention.o_proj.weight, gain=0.5)
        nn.init.orthogonal_(layer.mlp.fc1.weight)
        nn.init.orthogonal_(layer.mlp.fc2.weight, gain=0.3)
        # At the start, no layer overwrites the position.
        attention.o_proj.weight[:POSITION_DIMS] = 0
        layer.mlp.fc2.weight[:POSITION_DIMS] = 0


def main() -> None:
    """Write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the transformers folder to write")
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--mlp-ratio", type=int, default=2)
    parser.add_argument("--plain-start", action="store_true", help="keep the library's own initialisation")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = build_model(args.hidden_size, args.layers, args.heads, args.mlp_ratio)
    if not args.plain_start:
        start_as_convolution(model)
    save_start(model, args.out)


if __name__ == "__main__":
    main()
