"""Adapters: where they stand in every family, and what they compute, against a slow twin."""

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


def filled(module: nn.Module, places: tuple[str, ...], rank: int = 5) -> list[nn.Parameter]:
    """Adapters with random weights in every block."""
    torch.manual_seed(3)
    added = add_adapters(module, places, rank)
    for parameter in added:
        nn.init.normal_(parameter, std=0.3)
    return added


def pair(layer: Any) -> Pair:
    weight, bias = layer.weight.detach().double().numpy(), layer.bias
    return weight, np.zeros(len(weight)) if bias is None else bias.detach().double().numpy()


def parts_of(block: Any) -> dict[str, Pair]:
    if hasattr(block, "ln_1"):  # torchvision
        inner = block.self_attention
        joint = inner.in_proj_weight.detach().double().numpy(), inner.in_proj_bias.detach().double().numpy()
        found = {"norm1": pair(block.ln_1), "norm2": pair(block.ln_2), "joint": joint, "out": pair(inner.out_proj)}
        return found | {"first": pair(block.mlp[0]), "second": pair(block.mlp[3])}
    found = {name: pair(getattr(block, name)) for name in ("norm1", "norm2")}
    found |= {"joint": pair(block.attn.qkv), "out": pair(block.attn.proj)}
    found |= {"first": pair(block.mlp.fc1), "second": pair(block.mlp.fc2)}
    for name, key in (("ls1", "scale1"), ("ls2", "scale2")):
        if not isinstance(getattr(block, name), nn.Identity):
            gamma = getattr(block, name).gamma.detach().double().numpy()
            found[key] = gamma, gamma
    return found


PLACINGS = [(), ("attention",), ("mlp",), ("parallel",), ("attention", "mlp"), PLACES]


@pytest.mark.parametrize("name", ["torchvision-vit", "timm-vit", "timm-dinov2-registers"])
@pytest.mark.parametrize("places", PLACINGS, ids="+".join)
def test_a_block_with_adapters_is_as_written_out_by_hand(name: str, places: tuple[str, ...]) -> None:
    module = case(name).model().module.double()
    filled(module, places)
    block = blocks(module)[1].module
    made: dict[str, Any] = {
        place: tuple(pair(getattr(getattr(block, f"adapter_{place}"), part)) for part in ("down", "up"))
        for place in places
    }
    tokens = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    eps = (block.ln_1 if hasattr(block, "ln_1") else block.norm1).eps
    with torch.no_grad():
        found = block(tokens)
    for one, given in zip(found.numpy(), tokens.numpy(), strict=True):
        expected = reference.block(given, parts_of(block), made, heads=4, eps=eps)
        np.testing.assert_allclose(one, expected, atol=1e-10)


@every_case
def test_adapters_leave_the_answer_as_it_is_until_they_learn(case: Case) -> None:
    model = reset_classifier(case.model(), LABELS)
    before, kept = logits(model, case.pixels), weights(model)
    added = add_adapters(model.module, PLACES, 4)
    assert torch.equal(logits(model, case.pixels), before)
    after = weights(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in kept.items())
    assert all(".adapter_" in name for name in after.keys() - kept.keys())
    assert len(added) == 12 * len(blocks(model.module))
    with torch.no_grad():
        added[2].fill_(0.1)  # the first "up"
    assert not torch.equal(logits(model, case.pixels), before)


def first_block(model: vs.VisionModel, pixels: Tensor) -> tuple[Block, dict[str, Tensor]]:
    """What the first block gives, and the stream in its middle."""
    block, seen = blocks(model.module)[0], {}

    def gives(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen["out"] = (output[0] if isinstance(output, tuple) else output).detach().clone()

    hooks = [
        block.module.register_forward_hook(gives),
        block.stream.register_forward_pre_hook(lambda _, inputs: seen.update(stream=inputs[0].detach().clone())),
    ]
    logits(model, pixels)
    for hook in hooks:
        hook.remove()
    return block, seen


def later_scale(block: Any, place: str) -> Any:
    """What transformers' BEiT multiplies the end of a branch by; no module stands behind it."""
    scale = getattr(block, "lambda_1" if place == "attention" else "lambda_2", None)
    return 1 if scale is None else scale.detach()


@every_case
def test_each_adapter_stands_where_its_name_says(case: Case) -> None:
    """A constant added by an adapter moves the stream behind its branch by just that; beside the MLP by a tenth."""
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


@every_case
def test_the_adapter_beside_the_mlp_reads_the_stream_before_it(case: Case) -> None:
    _, before = first_block(reset_classifier(case.model(), LABELS), case.pixels)
    model = reset_classifier(case.model(), LABELS)
    filled(model.module, ("parallel",))
    block, after = first_block(model, case.pixels)
    adapter: Any = block.module.adapter_parallel
    torch.testing.assert_close(after["stream"], before["stream"])
    with torch.no_grad():
        added = 0.1 * adapter.up(torch.relu(adapter.down(before["stream"])))
    expected = before["out"] + (later_scale(block.module, "parallel") * added).view_as(before["out"])
    torch.testing.assert_close(after["out"], expected, atol=1e-4, rtol=1e-4)


def test_a_block_that_normalises_its_branches_adapts_them_after_the_norm() -> None:
    module, plain = (case("torchvision-swinv2").model().module.double() for _ in range(2))
    filled(module, PLACES)
    block, bare = (blocks(one)[0].module for one in (module, plain))
    tokens = torch.randn(1, 16, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        stream = tokens + block.adapter_attention(bare.norm1(bare.attn(tokens)))
        branch = bare.norm2(bare.mlp(stream))
        expected = stream + block.adapter_mlp(branch) + block.adapter_parallel(stream)
        torch.testing.assert_close(block(tokens), expected)


def test_the_formulas_and_the_first_weights() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    for made in (Adapter(8, 3), ParallelAdapter(8, 3)):
        assert not made.up.weight.any()
        assert not made.up.bias.any()
        assert not made.down.bias.any()
        assert made.down.weight.abs().max() <= 8**-0.5
        assert made.down.weight.std() > 0.1
        nn.init.normal_(made.up.weight)
        adapter = tuple(pair(layer) for layer in (made.down, made.up))
        twin = reference.serial if isinstance(made, Adapter) else reference.parallel
        with torch.no_grad():
            np.testing.assert_allclose(made(x).numpy(), twin(x.double().numpy(), adapter), atol=1e-6)
    names = {"down.weight", "down.bias", "up.weight", "up.bias"}
    assert set(Adapter(8, 3).state_dict()) == set(ParallelAdapter(8, 3).state_dict()) == names


@pytest.mark.parametrize("name", ["transformers-vit", "timm-vit", "torchvision-swinv2", "transformers-swin"])
def test_a_copy_of_an_adapted_model_is_a_model_of_its_own(name: str) -> None:
    model = reset_classifier(case(name).model(), LABELS)
    filled(model.module, PLACES)
    pixels, before = case(name).pixels, logits(model, case(name).pixels)
    twin, kept = copy.deepcopy(model.module), weights(model)
    assert torch.equal(logits(vs.load(twin), pixels), before)
    beside = [[c._streams for c in one.modules() if isinstance(c, ParallelAdapter)] for one in (twin, model.module)]
    assert not set(map(id, beside[0])) & set(map(id, beside[1]))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(logits(model, pixels), before)
    assert same(weights(model), kept)
    with torch.no_grad():
        for adapter in model.module.modules():
            if isinstance(adapter, Adapter | ParallelAdapter):
                adapter.up.bias.add_(1)
    assert not torch.equal(logits(model, pixels), before)
    assert not logits(vs.load(twin), pixels).any()


def test_a_model_with_adapters_is_not_given_other_classes() -> None:
    model = reset_classifier(case("transformers-vit").model(), LABELS)
    filled(model.module, PLACES)
    with pytest.raises(vs.CallError, match="has adapters, which another classifier would lose"):
        reset_classifier(model, LABELS)


def test_two_threads_in_one_model_do_not_read_each_others_streams() -> None:
    model = reset_classifier(case("timm-vit").model(), LABELS)
    filled(model.module, ("parallel",))
    images = [torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    alone = [logits(model, one) for one in images]
    both = threading.Barrier(2, timeout=20)

    def meet(*_: Any) -> None:
        both.wait()

    for block in blocks(model.module):
        block.module.mlp.fc1.register_forward_hook(meet)
    found: dict[int, Tensor] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: logits(model, images[i])})) for i in range(len(images))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], alone[i]) for i in range(2))


def test_adapters_take_the_precision_and_the_mode_of_their_block() -> None:
    module = case("timm-vit").model().module.to(torch.bfloat16).train()
    assert {parameter.dtype for parameter in add_adapters(module, PLACES, 2)} == {torch.bfloat16}
    assert all(child.training for child in module.modules() if isinstance(child, Adapter | ParallelAdapter))
