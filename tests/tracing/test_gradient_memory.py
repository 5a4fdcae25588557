"""The memory of a run with gradients: linear in the number of tokens, and free afterwards."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import vitscope as vs
from vitscope.methods.registry import METHODS
from vitscope.tracing.gradients import GradientOptions, capture_gradients

OPTIONS = [
    GradientOptions(),
    GradientOptions(rules="libra", biases=True),
    GradientOptions(rules="attn_lrp", gamma=0.1),
    GradientOptions(pixels=True),
    GradientOptions(separate_blocks=True),
    GradientOptions(rules="alpha_beta"),
]
NAMES = ["plain", "libra", "gamma", "pixels", "separate", "relevance"]


@contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """Yield a list whose only entry becomes the bytes that graphs inside the context keep, each storage once."""
    sizes: dict[int, tuple[Tensor, int]] = {}
    total = [0]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = (tensor, storage.nbytes())  # the tensor is kept, so that no address is used twice
        total[0] = sum(size for _, size in sizes.values())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


@pytest.fixture
def model() -> vs.VisionModel:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    module = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=24, depth=2, num_heads=3, dynamic_img_size=True
    )
    return vs.load(module)


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
def test_the_graph_grows_linearly_with_the_tokens(model: vs.VisionModel, options: GradientOptions) -> None:
    sizes = []
    for side in (128, 256):  # 257 and 1,025 tokens
        pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
        with saved_bytes() as total, capture_gradients(model, pixels, options) as run:
            sizes.append(total[0])
            assert run.grid(0).num_tokens == (side // 8) ** 2 + 1
    constant = sum(parameter.nbytes for parameter in model.module.parameters())
    assert sizes[0] > 0
    assert sizes[1] < 4.1 * sizes[0] + constant


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
def test_the_graph_is_free_after_the_context_without_garbage_collection(options: GradientOptions) -> None:
    model = vs.load("vit-nano")
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    gc.collect()
    gc.disable()
    try:
        with capture_gradients(model, pixels, options) as run:
            start = run.streams[-1] if options.separate_blocks else run.start
            run.gradients(run.output[:, 3], [start])
            del start
            references = [weakref.ref(tensor) for tensor in (*run.streams, run.output)]
        del run
        assert [reference() for reference in references] == [None] * len(references)
    finally:
        gc.enable()


NAMES = ["generic_attention", "libra", "grad_cam", "transformer_attribution", "le_grad", "token_tm", "att_cat"]


@pytest.mark.parametrize("name", NAMES)
def test_the_graph_is_free_after_an_exception(name: str) -> None:
    model = vs.load("vit-nano")
    references: list[weakref.ref[Tensor]] = []

    def fail(output: Tensor) -> Tensor:
        references.append(weakref.ref(output))
        raise KeyError("boom")

    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(KeyError, match="boom"):
        METHODS[name].compute(model, pixels, target=fail)
    gc.collect()
    assert references[0]() is None
