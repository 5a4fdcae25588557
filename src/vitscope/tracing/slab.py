"""Memory for the tensors of a trace, separate from the heap on which a run allocates temporary tensors."""

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

SLAB_BYTES = 1 << 25
ALIGNMENT = 64


class SlabAllocator:
    """An allocator that places tensors on large slabs. A slab is freed with the last tensor on it.

    A stored tensor between temporary ones keeps malloc from merging the free memory around it. For DINOv2-L with 1,374
    tokens this wasted 200 MiB in addition to the tensors themselves, so slabs are mapped outside the heap. Other
    devices have allocators that pool memory by size, so tensors there are allocated as usual.
    """

    def __init__(self) -> None:
        self._slab = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialized tensor, on a slab if it is on the CPU and fits one."""
        size = math.prod(shape) * dtype.itemsize
        if device.type != "cpu" or size > SLAB_BYTES:
            return torch.empty(shape, dtype=dtype, device=device)
        if self._used + size > self._slab.numel():
            self._slab, self._used = torch.frombuffer(_map_slab(), dtype=torch.uint8), 0
        memory = self._slab[self._used : self._used + size]
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        return memory.view(dtype).view(*shape)

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a contiguous copy of a tensor."""
        return self.empty(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)


def _map_slab() -> mmap.mmap:
    """Return private memory for one slab, which is unmapped when nothing refers to it."""
    if hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, SLAB_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, SLAB_BYTES)
