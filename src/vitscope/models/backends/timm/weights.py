"""timm: fill a model with the weights of a file, even for another image size or number of classes."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from vitscope.errors import CallError, ModelUnavailableError
from vitscope.models.checkpoints.weights import FLOATS, fit_weights, head_rows, is_computed


def create_filled(
    create: Callable[..., Any],
    state: Mapping[str, torch.Tensor],
    name: str,
    image_size: tuple[int, int] | None,
    *,
    adapt_classes: bool,
    untrained_head: bool = False,
) -> nn.Module:
    """Return a new model with these weights, which are resampled if the model has another image size.

    Args:
        create: function that builds the model; it takes ``img_size`` and ``num_classes``.
        state: the weights by name.
        name: name of the weights in messages.
        image_size: height and width in pixels; None for the model's own size.
        adapt_classes: whether to give the model the number of classes in the weights.
        untrained_head: whether to keep the classifier as it is built.

    Raises:
        CallError: the model does not support ``image_size``.
        ModelUnavailableError: the weights do not fit the model.
    """
    if image_size is not None:
        with suppress(ModelUnavailableError):  # weights of another size are resampled below
            return _fit(_at_size(create, image_size), state, name, adapt_classes, untrained_head)
    module = _fit(create, state, name, adapt_classes, untrained_head)
    if image_size is None:
        return module
    return _load_by_timm(_at_size(create, image_size), module.state_dict(), module.num_classes)


def _at_size(create: Callable[..., Any], image_size: tuple[int, int]) -> Callable[..., Any]:
    def create_at_size(**options: Any) -> Any:
        try:
            return create(img_size=image_size, **options)
        except TypeError as error:
            raise CallError(f"this timm model does not support image_size: {error}") from None

    return create_at_size


def _fit(
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
        prefixes = tuple(f"{head}." for head in heads)
        state = {key: tensor for key, tensor in state.items() if not key.startswith(prefixes)}
        state |= {key: tensor for key, tensor in module.state_dict().items() if key.startswith(prefixes)}
    try:
        fitting = fit_weights(module, state, name)
    except ModelUnavailableError:
        converted = _convert_or_none(create, state, module.num_classes)
        if converted is None:
            raise
        return converted
    module.load_state_dict(fitting)
    return module


def _convert_or_none(create: Callable[..., Any], state: Mapping[str, torch.Tensor], classes: int) -> Any:
    """Return the model filled by timm's own conversion of another project's names; None if they do not fit."""
    if any(tensor.dtype not in FLOATS for key, tensor in state.items() if not is_computed(key)):
        return None
    try:
        module = _load_by_timm(create, state, classes)
    except Exception:  # the caller reports what does not fit
        return None
    sizes = {tensor.numel() for tensor in state.values()}
    positions = [tensor for key, tensor in module.state_dict().items() if "pos_embed" in key or "position_bias" in key]
    # timm resamples position embeddings of another size, which the caller did not request.
    return module if all(tensor.numel() in sizes for tensor in positions) else None


def _load_by_timm(create: Callable[..., Any], state: Mapping[str, torch.Tensor], classes: int) -> Any:
    overlay = {"state_dict": dict(state), "num_classes": classes, "custom_load": False, "label_offset": 0}
    options = {"num_classes": classes} if classes else {}
    module = create(pretrained=True, pretrained_cfg_overlay=overlay, **options)
    module.pretrained_cfg.pop("state_dict", None)
    return module
