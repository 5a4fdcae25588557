"""LoRA on queries and values: with peft on separate layers, with a parametrization on rows of a joint weight."""

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
    """LoRA, W + (α/r)·BA, on some rows of a weight.

    As a parametrization, it also changes weights that the library reads without calling a layer.

    Reference: LoRA, Hu et al., 2021 (arXiv 2106.09685).

    Args:
        weight: (row, column) the weight to adapt.
        rows: the rows that each pair of matrices A and B changes.
        rank: r, the number of rows of A.
        alpha: α, which scales the update.
    """

    rows: Tensor

    def __init__(self, weight: Tensor, rows: list[Tensor], rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.a = nn.ParameterList(nn.Parameter(weight.new_empty(rank, weight.shape[1])) for _ in rows)
        self.b = nn.ParameterList(nn.Parameter(weight.new_zeros(len(group), rank)) for group in rows)
        for matrix in self.a:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        self.register_buffer("rows", torch.cat(rows).to(weight.device), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        update = torch.cat([b @ a for a, b in zip(self.a, self.b, strict=True)])
        return weight.index_add(0, self.rows, self.scale * update)


def add_low_rank(module: nn.Module, rank: int, alpha: float) -> Callable[[], None]:
    """Add LoRA to every block; the output of the model does not change until LoRA is trained.

    Returns:
        A function that merges LoRA into the weights and removes it.

    Raises:
        UnknownModelError: the queries and values of a block cannot be identified.
        ModelUnavailableError: peft is not installed.
    """
    names = {id(child): name for name, child in module.named_modules()}
    separate_names: list[str] = []
    joint: list[tuple[nn.Module, str]] = []
    for block in blocks(module):
        layers = _separate_layers(block.attention)
        if layers:
            separate_names += [names[id(layer)] for layer in layers]
            continue
        owner, name = _joint_weight(block.attention)
        weight = getattr(owner, name)
        parametrize.register_parametrization(
            owner, name, LowRank(weight, _query_and_value_rows(block.attention, len(weight)), rank, alpha), unsafe=True
        )
        joint.append((owner, name))
    merge_peft = _add_by_peft(module, separate_names, rank, alpha) if separate_names else None

    def merge() -> None:
        for owner, name in joint:
            parametrize.remove_parametrizations(owner, name, leave_parametrized=True)
        if merge_peft is not None:
            merge_peft()

    return merge


def _separate_layers(attention: nn.Module) -> list[nn.Module]:
    """Return the layers of queries and of values; empty if they are not separate."""
    for names in QUERY_AND_VALUE:
        layers = [child for path, child in attention.named_modules() if path.rpartition(".")[2] in names]
        if len(layers) == 2:
            return layers
    return []


def _joint_weight(attention: nn.Module) -> tuple[nn.Module, str]:
    """Return the module with the joint weight of queries, keys and values, and the name of that weight."""
    if isinstance(attention, nn.MultiheadAttention):
        return attention, "in_proj_weight"
    layer = getattr(attention, JOINT_QKV, None)
    if isinstance(layer, nn.Linear):
        return layer, "weight"
    raise UnknownModelError(
        f"LoRA is not supported for {type(attention).__name__}: its queries and values cannot be identified; choose "
        "another tuning method"
    )


def _query_and_value_rows(attention: Any, num_rows: int) -> list[Tensor]:
    """Return the rows of a joint weight that compute queries, and those that compute values."""
    if getattr(attention, "head_first", False):  # MaxViT: query, key and value of a head are adjacent
        by_head = torch.arange(num_rows, device="cpu").view(attention.num_heads, 3, -1)
        return [by_head[:, 0].flatten(), by_head[:, 2].flatten()]
    query, _, value = torch.arange(num_rows, device="cpu").chunk(3)
    return [query, value]


def _add_by_peft(module: nn.Module, names: list[str], rank: int, alpha: float) -> Callable[[], Any]:
    """Add peft's LoRA to the named layers; return the function that merges it."""
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError:
        raise ModelUnavailableError("LoRA needs peft: pip install 'vitscope[tune]'") from None
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0, bias="none")
    return LoraModel(module, config, "default").merge_and_unload
