"""LoRA on queries and values: by peft where they are layers of their own, on rows of the joint weight elsewhere."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vitscope.errors import ModelUnavailableError, UnknownModelError
from vitscope.models.backends.names import JOINT_QKV, QUERY_AND_VALUE
from vitscope.models.blocks import blocks


class LowRank(nn.Module):
    """W + (α/r)·BA on some rows of a weight, as a parametrization: it reaches weights that no layer's forward reads.

    Reference: LoRA, Hu et al., 2021 (arXiv 2106.09685).
    """

    rows: Tensor

    def __init__(self, weight: Tensor, parts: list[Tensor], rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.a = nn.ParameterList(nn.Parameter(weight.new_empty(rank, weight.shape[1])) for _ in parts)
        self.b = nn.ParameterList(nn.Parameter(weight.new_zeros(len(rows), rank)) for rows in parts)
        for matrix in self.a:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        self.register_buffer("rows", torch.cat(parts).to(weight.device), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        added = torch.cat([b @ a for a, b in zip(self.a, self.b, strict=True)])
        return weight.index_add(0, self.rows, self.scale * added)


def add_low_rank(module: nn.Module, rank: int, alpha: float) -> Callable[[], None]:
    """Put LoRA into every block; the answer stays as it is until it is trained.

    Returns:
        what merges it into the weights and takes it out again.

    Raises:
        UnknownModelError: the queries and values of a block cannot be told apart.
        ModelUnavailableError: peft is not installed.
    """
    names = {id(child): name for name, child in module.named_modules()}
    wanted: list[str] = []
    joint: list[tuple[nn.Module, str]] = []
    for block in blocks(module):
        found = _separate(block.attention)
        if found:
            wanted += [names[id(layer)] for layer in found]
            continue
        owner, name = _joint(block.attention)
        weight = getattr(owner, name)
        parametrize.register_parametrization(
            owner, name, LowRank(weight, _query_and_value(block.attention, len(weight)), rank, alpha), unsafe=True
        )
        joint.append((owner, name))
    peft_merges = _by_peft(module, wanted, rank, alpha) if wanted else None

    def merge() -> None:
        for owner, name in joint:
            parametrize.remove_parametrizations(owner, name, leave_parametrized=True)
        if peft_merges is not None:
            peft_merges()

    return merge


def _separate(attention: nn.Module) -> list[nn.Module]:
    for names in QUERY_AND_VALUE:
        layers = [child for path, child in attention.named_modules() if path.rpartition(".")[2] in names]
        if len(layers) == 2:
            return layers
    return []


def _joint(attention: nn.Module) -> tuple[nn.Module, str]:
    if isinstance(attention, nn.MultiheadAttention):
        return attention, "in_proj_weight"
    layer = getattr(attention, JOINT_QKV, None)
    if isinstance(layer, nn.Linear):
        return layer, "weight"
    raise UnknownModelError(f"the queries and values of {type(attention).__name__} are not known, so it has no LoRA")


def _query_and_value(attention: Any, rows: int) -> list[Tensor]:
    """The rows of a joint weight that make queries, and those that make values."""
    if getattr(attention, "head_first", False):  # MaxViT: query, key and value of a head stand together
        by_head = torch.arange(rows, device="cpu").view(attention.num_heads, 3, -1)
        return [by_head[:, 0].flatten(), by_head[:, 2].flatten()]
    query, _, value = torch.arange(rows, device="cpu").chunk(3)
    return [query, value]


def _by_peft(module: nn.Module, wanted: list[str], rank: int, alpha: float) -> Callable[[], Any]:
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError:
        raise ModelUnavailableError("LoRA needs peft: pip install 'vitscope[tune]'") from None
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=wanted, lora_dropout=0.0, bias="none")
    return LoraModel(module, config, "default").merge_and_unload
