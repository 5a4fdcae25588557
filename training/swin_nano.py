"""Write the untrained swin-nano: a transformers Swin for CIFAR-10 that can be trained on a CPU.

    python training/swin_nano.py start/swin-nano
    vitscope finetune cifar10 --model start/swin-nano --tuning full --recipe training/swin-nano.toml --out out/swin-nano

Patches of 2 × 2 pixels, windows of 4 × 4 tokens, three stages on 16 × 16, 8 × 8 and 4 × 4 tokens; the blocks of the
first two stages alternate between plain and shifted windows; in the last stage one window covers the grid. Each head
starts with a relative position bias that prefers one neighbour, as a convolution does. Training is free to change it.
"""

import argparse
from pathlib import Path

import torch
from starting import save_start
from torch import nn
from transformers import SwinConfig, SwinForImageClassification

SHARPNESS = 1.0  # logits lost per squared step away from the preferred neighbour
NEIGHBOURS = [(dy, dx) for dy in (0, -1, 1) for dx in (0, -1, 1)]


def build_model(embed_dim: int, depths: list[int], heads: list[int], mlp_ratio: float) -> SwinForImageClassification:
    """Return a Swin for images of 32 × 32 pixels, with the library's initialisation."""
    config = SwinConfig(
        image_size=32,
        patch_size=2,
        embed_dim=embed_dim,
        depths=depths,
        num_heads=heads,
        window_size=4,
        mlp_ratio=mlp_ratio,
        drop_path_rate=0.0,
    )
    return SwinForImageClassification(config)


@torch.no_grad()
def start_as_convolution(model: SwinForImageClassification) -> None:
    """Initialise every head to prefer one of the nine 3×3 neighbours mildly, almost regardless of content."""
    nn.init.orthogonal_(model.swin.embeddings.patch_embeddings.projection.weight.flatten(1))
    size = model.config.window_size
    steps = torch.arange(-(size - 1), size)
    dy, dx = torch.meshgrid(steps, steps, indexing="ij")
    for stage in model.swin.encoder.layers:
        for block in stage.blocks:
            attention = block.attention
            table = attention.relative_position_bias.relative_position_bias_table
            for head in range(attention.num_attention_heads):
                y, x = NEIGHBOURS[head % len(NEIGHBOURS)]
                # The table is indexed by query minus key.
                table[:, head] = -SHARPNESS * ((-dy - y) ** 2 + (-dx - x) ** 2).flatten()
            for projection in (attention.q_proj, attention.k_proj):
                nn.init.normal_(projection.weight, std=0.02)
            nn.init.orthogonal_(attention.v_proj.weight)
            nn.init.orthogonal_(attention.o_proj.weight, gain=0.5)
            nn.init.orthogonal_(block.mlp.fc1.weight)
            nn.init.orthogonal_(block.mlp.fc2.weight, gain=0.3)
        if stage.downsample is not None:
            nn.init.orthogonal_(stage.downsample.reduction.weight)


def main() -> None:
    """Write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the transformers folder to write")
    parser.add_argument("--embed-dim", type=int, default=64)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 2])
    parser.add_argument("--heads", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--mlp-ratio", type=float, default=2.0)
    parser.add_argument("--plain-start", action="store_true", help="keep the library's own initialisation")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = build_model(args.embed_dim, args.depths, args.heads, args.mlp_ratio)
    if not args.plain_start:
        start_as_convolution(model)
    save_start(model, args.out)


if __name__ == "__main__":
    main()
