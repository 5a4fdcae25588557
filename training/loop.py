"""The training loop of the bundled models: CIFAR-10 on a CPU, Muon for the matrices, AdamW for the rest.

The learning rate is constant, then falls linearly to zero over the last part of the run, so a
run can be stopped, resumed and shortened: the checkpoint is written after every epoch.
"""

import argparse
import json
import time
from pathlib import Path

import cifar10
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, ViTImageProcessorPil


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


class Muon(torch.optim.Optimizer):
    """Muon (Jordan, 2024): momentum whose singular values are all moved to about one, by Newton and Schulz.

    torch's own works in bfloat16, which takes twenty times as long on a processor without it.
    """

    def __init__(self, parameters: list[Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # noqa: ARG002
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonal(parameter.grad.lerp(average, group["momentum"]))
                # As large as an AdamW step, so that both take the same learning rates.
                rate = group["lr"] * 0.2 * max(parameter.shape) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """The matrix with its singular values moved to about one."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def optimizers(model: nn.Module, muon_lr: float, adam_lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    matrices, tables, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and ".layers." in name and "bias_table" not in name:
            matrices.append(parameter)
        elif parameter.ndim >= 2 and "classifier" not in name:
            tables.append(parameter)
        else:
            vectors.append(parameter)
    return [
        Muon(matrices, lr=muon_lr, weight_decay=weight_decay),
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


def save(model: PreTrainedModel, out: Path) -> None:
    model.config._attn_implementation = "sdpa"
    model.save_pretrained(out)
    model.config._attn_implementation = "eager"
    ViTImageProcessorPil(
        size={"height": 32, "width": 32}, image_mean=list(cifar10.MEAN), image_std=list(cifar10.STD), resample=3
    ).save_pretrained(out)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every run has; a model adds its own."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("data", type=Path, help="the folder with the six PNG files")
    made.add_argument("out", type=Path, help="where the transformers folder goes")
    made.add_argument("--epochs", type=int, default=12)
    made.add_argument("--batch-size", type=int, default=256)
    made.add_argument("--muon-lr", type=float, default=4e-3)
    made.add_argument("--adam-lr", type=float, default=2e-3)
    made.add_argument("--weight-decay", type=float, default=0.05)
    made.add_argument("--decay-share", type=float, default=0.6)
    made.add_argument("--label-smoothing", type=float, default=0.1)
    made.add_argument("--bfloat16", action="store_true", help="fast where the processor has it, far slower elsewhere")
    made.add_argument("--plain-start", action="store_true", help="the library's own initialisation")
    made.add_argument("--stop-after", type=int, default=10**9, help="stop after so many steps (for trials)")
    made.add_argument("--resume", action="store_true")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--seed", type=int, default=0)
    return made


def train(model: PreTrainedModel, args: argparse.Namespace) -> None:
    """Train, test after every epoch, and leave a checkpoint and a transformers folder in ``args.out``."""
    args.out.mkdir(parents=True, exist_ok=True)
    pictures, labels, test, test_labels = cifar10.load(args.data)
    model.train()
    normalise = Normalise()
    compiled = torch.compile(model)
    steps_per_epoch = len(pictures) // args.batch_size
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
        order = torch.randperm(len(pictures), generator=generator)
        losses: list[float] = []
        for index in range(steps_per_epoch):
            step = epoch * steps_per_epoch + index
            factor = learning_rate_factor(step, total, warmup=100, decay_share=args.decay_share)
            for opt, rates in zip(opts, base, strict=True):
                for group, rate in zip(opt.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
            chosen = order[index * args.batch_size : (index + 1) * args.batch_size]
            batch = normalise(augment(pictures[chosen], generator))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bfloat16):
                logits = compiled(pixel_values=batch).logits
            loss = F.cross_entropy(logits.float(), labels[chosen], label_smoothing=args.label_smoothing)
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
        row = {
            "epoch": epoch,
            "loss": sum(losses) / len(losses),
            "test_accuracy": accuracy(model, normalise, test, test_labels),
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
