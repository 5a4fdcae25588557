"""Adapters: their position in the blocks of every family, and their formulas against a slow reference."""

import copy
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.helpers.every_model import LABELS, Case, case, every_case, logits, same, weights
from tests.reference import adapters as reference
from vitscope.models.adapters import PLACES, Adapter, ParallelAdapter, add_adapters
from vitscope.models.blocks import Block, blocks
from vitscope.models.heads import reset_classifier

Pair = tuple[np.ndarray, np.ndarray]


def random_adapters(module: nn.Module, places: tuple[str, ...], rank: int = 5) -> list[nn.Parameter]:
    """Add adapters with random weights to every block."""
    torch.manual_seed(3)
    parameters = add_adapters(module, places, rank)
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.3)
    return parameters


def pair(layer: Any) -> Pair:
    """Return weight and bias of a layer."""
    weight, bias = layer.weight.detach().double().numpy(), layer.bias
    return weight, np.zeros(len(weight)) if bias is None else bias.detach().double().numpy()


def block_weights(block: Any) -> dict[str, Pair]:
    """Return the weights of a block by the names that the reference uses."""
    if hasattr(block, "ln_1"):  # torchvision
        inner = block.self_attention
        joint = inner.in_proj_weight.detach().double().numpy(), inner.in_proj_bias.detach().double().numpy()
        weights = {"norm1": pair(block.ln_1), "norm2": pair(block.ln_2), "joint": joint, "out": pair(inner.out_proj)}
        return weights | {"first": pair(block.mlp[0]), "second": pair(block.mlp[3])}
    weights = {name: pair(getattr(block, name)) for name in ("norm1", "norm2")}
    weights |= {"joint": pair(block.attn.qkv), "out": pair(block.attn.proj)}
    weights |= {"first": pair(block.mlp.fc1), "second": pair(block.mlp.fc2)}
    for name, key in (("ls1", "scale1"), ("ls2", "scale2")):
        if not isinstance(getattr(block, name), nn.Identity):
            gamma = getattr(block, name).gamma.detach().double().numpy()
            weights[key] = gamma, gamma
    return weights


PLACE_SETS = [(), ("attention",), ("mlp",), ("parallel",), ("attention", "mlp"), PLACES]


@pytest.mark.parametrize("name", ["torchvision-vit", "timm-vit", "timm-dinov2-registers"])
@pytest.mark.parametrize("places", PLACE_SETS, ids="+".join)
def test_a_block_with_adapters_matches_the_reference(name: str, places: tuple[str, ...]) -> None:
    module = case(name).model().module.double()
    random_adapters(module, places)
    block = blocks(module)[1].module
    adapters: dict[str, Any] = {
        place: tuple(pair(getattr(getattr(block, f"adapter_{place}"), name)) for name in ("down", "up"))
        for place in places
    }
    tokens = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    eps = (block.ln_1 if hasattr(block, "ln_1") else block.norm1).eps
    with torch.no_grad():
        outputs = block(tokens)
    for output, image_tokens in zip(outputs.numpy(), tokens.numpy(), strict=True):
        expected = reference.block(image_tokens, block_weights(block), adapters, heads=4, eps=eps)
        np.testing.assert_allclose(output, expected, atol=1e-10)


@pytest.mark.slow
@every_case
def test_untrained_adapters_do_not_change_the_logits(case: Case) -> None:
    model = reset_classifier(case.model(), LABELS)
    before, original = logits(model, case.pixels), weights(model)
    added = add_adapters(model.module, PLACES, 4)
    assert torch.equal(logits(model, case.pixels), before)
    after = weights(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in original.items())
    assert all(".adapter_" in name for name in after.keys() - original.keys())
    assert len(added) == 12 * len(blocks(model.module))
    with torch.no_grad():
        added[2].fill_(0.1)  # the first "up"
    assert not torch.equal(logits(model, case.pixels), before)


def first_block(model: vs.VisionModel, pixels: Tensor) -> tuple[Block, dict[str, Tensor]]:
    """Return the first block, its output, and the residual stream before its MLP."""
    block, recorded = blocks(model.module)[0], {}

    def record_output(_module: nn.Module, _inputs: Any, output: Any) -> None:
        recorded["out"] = (output[0] if isinstance(output, tuple) else output).detach().clone()

    hooks = [
        block.module.register_forward_hook(record_output),
        block.stream.register_forward_pre_hook(lambda _, inputs: recorded.update(stream=inputs[0].detach().clone())),
    ]
    logits(model, pixels)
    for hook in hooks:
        hook.remove()
    return block, recorded


def later_scale(block: Any, place: str) -> Any:
    """Return the parameter by which transformers' BEiT multiplies the output of a branch; 1 for other families."""
    scale = getattr(block, "lambda_1" if place == "attention" else "lambda_2", None)
    return 1 if scale is None else scale.detach()


@pytest.mark.slow
@every_case
def test_each_adapter_is_in_the_branch_of_its_name(case: Case) -> None:
    """A constant that an adapter adds shifts the stream after its branch by this constant; by a tenth if parallel."""
    _, before = first_block(reset_classifier(case.model(), LABELS), case.pixels)
    for place in PLACES:
        model = reset_classifier(case.model(), LABELS)
        add_adapters(model.module, (place,), 4)
        block = blocks(model.module)[0]
        adapter: Any = getattr(block.module, f"adapter_{place}")
        constant = torch.linspace(-1, 1, block.width)
        adapter.up.bias.data.copy_(constant)
        constant = constant * later_scale(block.module, place)
        _, after = first_block(model, case.pixels)
        if place == "attention":
            torch.testing.assert_close(after["stream"], before["stream"] + constant, atol=1e-4, rtol=1e-4)
        else:
            torch.testing.assert_close(after["stream"], before["stream"])
            share = 0.1 if place == "parallel" else 1
            torch.testing.assert_close(
                after["out"].flatten(1), (before["out"] + share * constant).flatten(1), atol=1e-4, rtol=1e-4
            )


@pytest.mark.slow
@every_case
def test_the_parallel_adapter_reads_the_stream_before_the_mlp(case: Case) -> None:
    _, before = first_block(reset_classifier(case.model(), LABELS), case.pixels)
    model = reset_classifier(case.model(), LABELS)
    random_adapters(model.module, ("parallel",))
    block, after = first_block(model, case.pixels)
    adapter: Any = block.module.adapter_parallel
    torch.testing.assert_close(after["stream"], before["stream"])
    with torch.no_grad():
        added = 0.1 * adapter.up(torch.relu(adapter.down(before["stream"])))
    expected = before["out"] + (later_scale(block.module, "parallel") * added).view_as(before["out"])
    torch.testing.assert_close(after["out"], expected, atol=1e-4, rtol=1e-4)


def test_in_blocks_that_normalise_their_branches_adapters_follow_the_norm() -> None:
    module, plain = (case("torchvision-swinv2").model().module.double() for _ in range(2))
    random_adapters(module, PLACES)
    block, bare = (blocks(network)[0].module for network in (module, plain))
    tokens = torch.randn(1, 16, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        stream = tokens + block.adapter_attention(bare.norm1(bare.attn(tokens)))
        branch = bare.norm2(bare.mlp(stream))
        expected = stream + block.adapter_mlp(branch) + block.adapter_parallel(stream)
        torch.testing.assert_close(block(tokens), expected)


def test_formulas_and_initial_weights() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    for adapter in (Adapter(8, 3), ParallelAdapter(8, 3)):
        assert not adapter.up.weight.any()
        assert not adapter.up.bias.any()
        assert not adapter.down.bias.any()
        assert adapter.down.weight.abs().max() <= 8**-0.5
        assert adapter.down.weight.std() > 0.1
        nn.init.normal_(adapter.up.weight)
        pairs = tuple(pair(layer) for layer in (adapter.down, adapter.up))
        formula = reference.serial if isinstance(adapter, Adapter) else reference.parallel
        with torch.no_grad():
            np.testing.assert_allclose(adapter(x).numpy(), formula(x.double().numpy(), pairs), atol=1e-6)
    names = {"down.weight", "down.bias", "up.weight", "up.bias"}
    assert set(Adapter(8, 3).state_dict()) == set(ParallelAdapter(8, 3).state_dict()) == names


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformers-vit", "timm-vit", "torchvision-swinv2", "transformers-swin"])
def test_a_copy_of_an_adapted_model_is_independent(name: str) -> None:
    model = reset_classifier(case(name).model(), LABELS)
    random_adapters(model.module, PLACES)
    pixels, before = case(name).pixels, logits(model, case(name).pixels)
    twin, original = copy.deepcopy(model.module), weights(model)
    assert torch.equal(logits(vs.load(twin), pixels), before)
    streams = [
        {id(child._streams) for child in module.modules() if isinstance(child, ParallelAdapter)}
        for module in (twin, model.module)
    ]
    assert not streams[0] & streams[1]
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(logits(model, pixels), before)
    assert same(weights(model), original)
    with torch.no_grad():
        for adapter in model.module.modules():
            if isinstance(adapter, Adapter | ParallelAdapter):
                adapter.up.bias.add_(1)
    assert not torch.equal(logits(model, pixels), before)
    assert not logits(vs.load(twin), pixels).any()


def test_the_classifier_of_a_model_with_adapters_cannot_be_reset() -> None:
    model = reset_classifier(case("transformers-vit").model(), LABELS)
    random_adapters(model.module, PLACES)
    with pytest.raises(vs.UnsupportedModelError, match="has adapters, which a new classifier would discard"):
        reset_classifier(model, LABELS)


def test_threads_that_share_a_model_do_not_mix_their_streams() -> None:
    model = reset_classifier(case("timm-vit").model(), LABELS)
    random_adapters(model.module, ("parallel",))
    images = [torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    expected = [logits(model, image) for image in images]
    barrier = threading.Barrier(2, timeout=20)

    def meet(*_: Any) -> None:
        barrier.wait()

    for block in blocks(model.module):
        block.module.mlp.fc1.register_forward_hook(meet)
    results: dict[int, Tensor] = {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: logits(model, images[i])})) for i in range(len(images))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[i], expected[i]) for i in range(2))


def test_adapters_have_the_precision_and_mode_of_their_block() -> None:
    module = case("timm-vit").model().module.to(torch.bfloat16).train()
    assert {parameter.dtype for parameter in add_adapters(module, PLACES, 2)} == {torch.bfloat16}
    assert all(child.training for child in module.modules() if isinstance(child, Adapter | ParallelAdapter))
