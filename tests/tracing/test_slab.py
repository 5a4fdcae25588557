"""The slab allocator packs small tensors and copies values."""

import torch

from vitscope.tracing.slab import SLAB_BYTES, SlabAllocator


def test_small_tensors_share_a_slab_and_large_ones_do_not() -> None:
    allocator, cpu = SlabAllocator(), torch.device("cpu")
    quarters = [allocator.empty((SLAB_BYTES // 16,), torch.float32, cpu) for _ in range(5)]
    slabs = [tensor.untyped_storage().data_ptr() for tensor in quarters]
    assert len(set(slabs[:4])) == 1
    assert slabs[4] != slabs[0]
    large = allocator.empty((SLAB_BYTES + 4,), torch.uint8, cpu)
    assert large.untyped_storage().nbytes() == SLAB_BYTES + 4


def test_a_copy_has_the_values_of_the_tensor() -> None:
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).transpose(0, 1)
    assert torch.equal(SlabAllocator().copy(values), values)
