"""The device to train on."""

import torch

from vitscope.errors import CallError


def require_device(device: str | torch.device | None) -> torch.device:
    """Return the device to train on.

    Raises:
        CallError: the device is not available, or cannot be used for training.
    """
    has_cuda = torch.cuda.is_available()
    try:
        if not isinstance(device, str | torch.device | None):
            raise TypeError
        resolved = torch.device(device if device is not None else "cuda" if has_cuda else "cpu")
    except (RuntimeError, TypeError):
        resolved = None
    available = resolved is not None and (
        resolved.type == "cpu"
        or (resolved.type == "cuda" and has_cuda and (resolved.index or 0) < torch.cuda.device_count())
    )
    if resolved is None or not available:
        choices = "cpu or cuda" if has_cuda else "cpu"
        raise CallError(f"device {str(device)!r} is not available for training here: choose {choices}")
    return resolved
