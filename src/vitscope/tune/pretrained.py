"""Checks that a model keeps every pretrained weight, and that training does not change frozen weights."""

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from vitscope.errors import WorkError
from vitscope.models.heads import get_classifiers
from vitscope.models.vision_model import VisionModel

# A transformers model without a classifier has a pooling layer that the class with a classifier does not have.
POOLER = "pooler."
LISTED_NAMES = 3


def check_pretrained_weights(before: VisionModel, after: VisionModel) -> None:
    """Check that every pretrained tensor of ``before``, except its classifier, is in ``after``, bit for bit.

    Args:
        before: the pretrained model.
        after: the model to train, with its new classifier and with the layers that the tuning method added.

    Raises:
        WorkError: tensors are missing or differ.
    """
    present = {_plain_name(name): tensor for name, tensor in _tensors(after.module)}
    by_ending: dict[str, list[str]] = {}
    for name in present:
        by_ending.setdefault(_ending(name), []).append(name)
    replaced = {id(tensor) for head in get_classifiers(before) for tensor in head.parameters()}
    lost = []
    for name, tensor in _tensors(before.module):
        plain = _plain_name(name)
        if id(tensor) in replaced or not _in_backbone(plain, before.backbone):
            continue
        names = [
            candidate
            for candidate in by_ending.get(_ending(plain), [])
            if candidate == plain or candidate.endswith(f".{plain}")
        ]
        if not names and plain.startswith(POOLER):
            continue
        if not any(_equal(tensor, present[candidate]) for candidate in names):
            lost.append(name)
    if lost:
        raise WorkError(
            f"{before.name} cannot be fine-tuned: its new model would lose {_listed(lost, 'pretrained tensor')}; load "
            "the original model of its library and tune that"
        )


def frozen_digests(module: nn.Module, *, evaluating: bool) -> Mapping[str, str]:
    """Return a digest of every tensor that training must not change.

    Args:
        module: the model to train.
        evaluating: whether the module is in evaluation mode during training, so that the statistics of its
            normalizations must not change either.
    """
    statistics = {
        id(buffer) for child in module.modules() if isinstance(child, _NormBase) for buffer in child.buffers()
    }
    return {
        name: _digest(tensor)
        for name, tensor in _tensors(module)
        if not tensor.requires_grad and (evaluating or id(tensor) not in statistics)
    }


def check_frozen_weights(module: nn.Module, digests: Mapping[str, str], name: str) -> None:
    """Check that the tensors of :func:`frozen_digests` did not change.

    Raises:
        WorkError: a tensor changed or is missing.
    """
    present = dict(_tensors(module))
    changed = [key for key, digest in digests.items() if key not in present or _digest(present[key]) != digest]
    if changed:
        raise WorkError(f"training {name} changed {_listed(changed, 'frozen tensor')}: the run is not kept as finished")


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and the saved buffers, not copies of them; tied ones under each of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    saved = module.state_dict(keep_vars=True).keys()
    yield from ((name, buffer) for name, buffer in module.named_buffers(remove_duplicate=False) if name in saved)


def _plain_name(name: str) -> str:
    """Return the name of a tensor without the levels that LoRA adds."""
    levels = name.split(".")
    if "parametrizations" in levels:
        i = levels.index("parametrizations")
        levels = [*levels[:i], levels[i + 1]] if levels[-1] == "original" else levels
    return ".".join(level for level in levels if level != "base_layer")


def _ending(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _in_backbone(name: str, backbone: str) -> bool:
    return not backbone or name.startswith(f"{backbone}.")


def _equal(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(_bytes(first), _bytes(second))


def _bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor: compared as bytes, NaN equals NaN."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def _digest(tensor: Tensor) -> str:
    return hashlib.blake2b(_bytes(tensor).numpy().tobytes(), digest_size=12).hexdigest()


def _listed(names: list[str], noun: str) -> str:
    """Return the number of names and the first few as text."""
    more = f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'} ({', '.join(names[:LISTED_NAMES])}{more})"
