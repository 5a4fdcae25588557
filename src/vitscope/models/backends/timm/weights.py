"""timm: a model filled with weights from a file, also at another image size or with other classes."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from vitscope.errors import CallError, ModelUnavailableError
from vitscope.models.checkpoints.weights import FLOATS, fit_weights, head_rows, is_computed


def filled(
    create: Callable[..., Any],
    state: Mapping[str, torch.Tensor],
    name: str,
    image_size: tuple[int, int] | None,
    *,
    adapt_classes: bool,
    untrained_head: bool = False,
) -> nn.Module:
    """Return the model with these weights, which fit it as it is or at another image size.

    Args:
        create: builds the model; takes ``img_size`` and ``num_classes``.
        name: what the weights are called in messages.
        adapt_classes: the model gets as many classes as the weights have.
        untrained_head: the classifier stays as it is built.
    """
    if image_size is not None:
        with suppress(ModelUnavailableError):  # weights of another size are resampled below
            return _fitted(_sized(create, image_size), state, name, adapt_classes, untrained_head)
    module = _fitted(create, state, name, adapt_classes, untrained_head)
    if image_size is None:
        return module
    return _loaded_by_timm(_sized(create, image_size), module.state_dict(), module.num_classes)


def _sized(create: Callable[..., Any], image_size: tuple[int, int]) -> Callable[..., Any]:
    def sized(**options: Any) -> Any:
        try:
            return create(img_size=image_size, **options)
        except TypeError as error:
            raise CallError(f"this model of timm takes no image_size: {error}") from None

    return sized


def _fitted(
    create: Callable[..., Any],
    state: Mapping[str, torch.Tensor],
    name: str,
    adapt_classes: bool,
    untrained_head: bool,
) -> Any:
    module = create()
    heads = module.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    rows = head_rows(state, heads)
    if adapt_classes and rows is not None and rows != module.num_classes:
        module = create(num_classes=rows)
    if untrained_head:
        places = tuple(f"{head}." for head in heads)
        state = {key: tensor for key, tensor in state.items() if not key.startswith(places)}
        state |= {key: tensor for key, tensor in module.state_dict().items() if key.startswith(places)}
    try:
        fitting = fit_weights(module, state, name)
    except ModelUnavailableError:
        converted = _converted(create, state, module.num_classes)
        if converted is None:
            raise
        return converted
    module.load_state_dict(fitting)
    return module


def _converted(create: Callable[..., Any], state: Mapping[str, torch.Tensor], classes: int) -> Any:
    """Return the model filled by timm's own conversion of another project's names, or None if it does not fit."""
    if any(tensor.dtype not in FLOATS for key, tensor in state.items() if not is_computed(key)):
        return None
    try:
        module = _loaded_by_timm(create, state, classes)
    except Exception:  # the caller says in its own words what does not fit
        return None
    sizes = {tensor.numel() for tensor in state.values()}
    places = [tensor for key, tensor in module.state_dict().items() if "pos_embed" in key or "position_bias" in key]
    # Position embeddings of another size were resampled, which nobody asked for.
    return module if all(tensor.numel() in sizes for tensor in places) else None


def _loaded_by_timm(create: Callable[..., Any], state: Mapping[str, torch.Tensor], classes: int) -> Any:
    overlay = {"state_dict": dict(state), "num_classes": classes, "custom_load": False, "label_offset": 0}
    options = {"num_classes": classes} if classes else {}
    module = create(pretrained=True, pretrained_cfg_overlay=overlay, **options)
    module.pretrained_cfg.pop("state_dict", None)
    return module
