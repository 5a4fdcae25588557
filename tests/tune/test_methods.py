"""Which weights each tuning method trains and freezes; LoRA against explicit matrices and against peft."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import vitscope as vs
from tests.helpers.every_model import CASES, LABELS, WAYS, Case, case, every_case, logits, weights
from tests.reference.adapters import merged
from vitscope.errors import CallError, UnknownModelError
from vitscope.models.blocks import blocks
from vitscope.models.heads import get_classifiers, reset_classifier
from vitscope.tune.low_rank import LowRank, add_low_rank
from vitscope.tune.methods import TUNING_METHODS, prepare

RANK = 4
PLACED = {"adapter-attention": 1, "adapter-mlp": 1, "adapter-both": 2, "adapter-parallel": 1}
each_tuning = pytest.mark.parametrize("tuning", WAYS)


def fresh(case: Case) -> vs.VisionModel:
    base = case.model()
    torch.manual_seed(0)
    return reset_classifier(base, LABELS)


def expected(model: vs.VisionModel, tuning: str) -> set[str]:
    """Return the names of the weights that must learn, from names and types of the prepared model alone."""
    names = {name for name, _ in model.module.named_parameters()}
    modules = dict(model.module.named_modules())
    classifiers = {id(layer) for layer in get_classifiers(model)}
    learning = {name for name in names if id(modules[name.rpartition(".")[0]]) in classifiers}
    if tuning == "full":
        return names
    if tuning == "bitfit":
        learning |= {name for name in names if name.rpartition(".")[2] in ("bias", "q_bias", "v_bias", "in_proj_bias")}
    if tuning == "layernorm":
        learning |= {name for name in names if isinstance(modules[name.rpartition(".")[0]], nn.LayerNorm)}
    if tuning in PLACED:
        learning |= {name for name in names if ".adapter_" in name}
    if tuning == "lora":
        learning |= {name for name in names if ".lora_" in name}
        learning |= {name for name in names if ".parametrizations." in name and not name.endswith("original")}
    return learning


@pytest.mark.slow
@each_tuning
@every_case
def test_only_the_weights_of_the_tuning_method_learn(case: Case, tuning: str) -> None:
    model = fresh(case)
    before, keys = logits(model, case.pixels), set(weights(model))
    prepared = prepare(model, tuning, rank=RANK if TUNING_METHODS[tuning].rank else None)
    assert torch.equal(logits(model, case.pixels), before)
    learning = {name: weight for name, weight in model.module.named_parameters() if weight.requires_grad}
    assert set(learning) == expected(model, tuning)
    head = sum(weight.numel() for layer in get_classifiers(model) for weight in layer.parameters())
    assert prepared.num_head == head
    assert prepared.num_trained == sum(weight.numel() for weight in learning.values()) - head
    frozen = {name: tensor.clone() for name, tensor in model.module.state_dict().items() if name not in learning}
    nn.functional.cross_entropy(model.forward(case.pixels), torch.tensor([0, 2])).backward()
    for parameter in learning.values():
        if parameter.grad is not None:
            parameter.data.sub_(parameter.grad, alpha=0.1)
    state = model.module.state_dict()
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in state.items() if name in frozen)
    after = logits(model, case.pixels)
    assert not torch.equal(after, before)
    prepared.finish()
    torch.testing.assert_close(logits(model, case.pixels), after, atol=1e-5, rtol=1e-5)
    widths = [block.width for block in blocks(model.module)]
    if tuning in PLACED:
        assert prepared.adapters is not None
        assert prepared.adapters["rank"] == RANK
        assert prepared.num_trained == PLACED[tuning] * sum(2 * RANK * w + RANK + w for w in widths)
    else:
        assert prepared.adapters is None
        assert set(weights(model)) == keys
    if tuning == "lora":
        assert prepared.num_trained == sum(4 * RANK * w for w in widths)
        assert not any(parametrize.is_parametrized(child) for child in model.module.modules())


def joint(model: vs.VisionModel) -> Iterator[tuple[Any, str, list[int], list[int]]]:
    """Yield the layers with a joint weight, its name, and the rows of queries and of values."""
    for block in blocks(model.module):
        attention: Any = block.attention
        owner, name = (attention.qkv, "weight") if hasattr(attention, "qkv") else (attention, "in_proj_weight")
        rows = list(range(len(getattr(owner, name))))
        third = len(rows) // 3
        queries, values = rows[:third], rows[2 * third :]
        if type(attention).__name__ == "AttentionCl":
            wide = third // attention.num_heads
            queries = [3 * head * wide + i for head in range(attention.num_heads) for i in range(wide)]
            values = [row + 2 * wide for row in queries]
        yield owner, name, queries, values


JOINT = [case for case in CASES if case.library != "transformers"]


@pytest.mark.slow
@pytest.mark.parametrize("case", JOINT, ids=lambda case: case.name)
def test_low_rank_adds_ba_to_the_rows_of_queries_and_values(case: Case) -> None:
    model = fresh(case)
    before = [getattr(owner, name).detach().double().numpy() for owner, name, *_ in joint(model)]
    merge = add_low_rank(model.module, 2, 6.0)
    torch.manual_seed(1)
    expected = []
    for (owner, name, queries, values), weight in zip(joint(model), before, strict=True):
        (low_rank,) = owner.parametrizations[name]
        for matrix in low_rank.b:
            nn.init.normal_(matrix)
        a, b = ([matrix.detach().double().numpy() for matrix in matrices] for matrices in (low_rank.a, low_rank.b))
        expected.append(merged(weight, [(a[0], b[0], queries), (a[1], b[1], values)], scale=3.0))
    actual = [getattr(owner, name).detach().numpy() for owner, name, *_ in joint(model)]
    for weight, merged_weight in zip(actual, expected, strict=True):
        np.testing.assert_allclose(weight, merged_weight, atol=1e-5)
    adapted = logits(model, case.pixels)
    merge()
    for (owner, name, *_), merged_weight in zip(joint(model), expected, strict=True):
        assert isinstance(getattr(owner, name), nn.Parameter)
        np.testing.assert_allclose(getattr(owner, name).detach().numpy(), merged_weight, atol=1e-5)
    torch.testing.assert_close(logits(model, case.pixels), adapted, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformers-vit", "transformers-swinv2"])
def test_low_rank_equals_peft_with_the_same_matrices(name: str) -> None:
    pytest.importorskip("peft")
    ours, theirs = fresh(case(name)), fresh(case(name))
    merge = add_low_rank(theirs.module, 3, 6.0)
    torch.manual_seed(2)
    layers = {path: child for path, child in theirs.module.named_modules() if hasattr(child, "lora_A")}
    assert len(layers) == 2 * len(blocks(theirs.module))
    for path, layer in layers.items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert a.abs().max() <= a.shape[1] ** -0.5
        assert not b.any()
        nn.init.normal_(b)
        target: Any = ours.module.get_submodule(path)
        low_rank = LowRank(target.weight, [torch.arange(len(target.weight))], 3, 6.0)
        low_rank.a[0].data.copy_(a)
        low_rank.b[0].data.copy_(b)
        parametrize.register_parametrization(target, "weight", low_rank)
    outputs = [logits(model, case(name).pixels) for model in (ours, theirs)]
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(outputs[0], logits(fresh(case(name)), case(name).pixels), atol=1e-3)
    merge()
    torch.testing.assert_close(logits(theirs, case(name).pixels), outputs[1], atol=1e-5, rtol=1e-5)


def test_low_rank_starts_as_peft_does_and_draws_from_torchs_random_numbers() -> None:
    weight = torch.randn(12, 8)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        low_rank = LowRank(weight, [torch.arange(4), torch.arange(8, 12)], 2, 4.0)
        assert torch.equal(low_rank(weight), weight)
        assert all(not matrix.any() for matrix in low_rank.b)
        drawn.append(torch.cat(list(low_rank.a)))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0][:2], drawn[0][2:])
    assert set(low_rank.state_dict()) == {"a.0", "a.1", "b.0", "b.1"}


def vits() -> dict[str, Callable[[], nn.Module]]:
    transformers, timm = pytest.importorskip("transformers"), pytest.importorskip("timm")
    torchvision = pytest.importorskip("torchvision")
    return {
        "transformers": lambda: transformers.ViTForImageClassification(transformers.ViTConfig()),
        "timm": lambda: timm.create_model("vit_base_patch16_224"),
        "torchvision": torchvision.models.vit_b_16,
    }


def swins() -> dict[str, Callable[[], nn.Module]]:
    transformers, timm = pytest.importorskip("transformers"), pytest.importorskip("timm")
    torchvision = pytest.importorskip("torchvision")
    base = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}
    return {
        "transformers": lambda: transformers.SwinForImageClassification(transformers.SwinConfig(**base)),
        "timm": lambda: timm.create_model("swin_base_patch4_window7_224"),
        "torchvision": torchvision.models.swin_b,
    }


VIT_B = {
    ("head", None): 0,
    ("bitfit", None): 102_912,
    ("layernorm", None): 38_400,
    ("adapter-mlp", 8): 156_768,
    ("adapter-mlp", None): 1_189_632,
    ("adapter-both", None): 2_379_264,
    ("adapter-parallel", None): 1_189_632,
    ("lora", None): 294_912,
    ("lora", 4): 147_456,
    ("full", None): 85_798_656,
}
SWIN_B = {("layernorm", None): 57_600, ("lora", None): 385_024, ("adapter-mlp", None): 1_553_664}


@pytest.mark.slow
@pytest.mark.parametrize("library", ["transformers", "timm", "torchvision"])
@pytest.mark.parametrize(("table", "builds"), [(VIT_B, vits), (SWIN_B, swins)], ids=["vit", "swin"])
def test_the_number_of_trained_weights_matches_the_literature(library: str, table: Any, builds: Any) -> None:
    for (tuning, rank), count in table.items():
        with torch.device("meta"):
            module = builds()[library]()
        assert prepare(vs.load(module), tuning, rank=rank).num_trained == count, tuning


def test_wrong_arguments_are_refused() -> None:
    model = fresh(case("timm-vit"))
    with pytest.raises(CallError, match=r"^unknown tuning 'lroa': did you mean lora\?$"):
        prepare(model, "lroa")
    with pytest.raises(CallError, match=r"^unknown tuning 'zzz': choose head, full, bitfit"):
        prepare(model, "zzz")
    for tuning in ("head", "full", "bitfit", "layernorm"):
        with pytest.raises(CallError, match=f"^{tuning} has no rank: pass rank for adapters and lora only$"):
            prepare(model, tuning, rank=4)
    for rank in (0, -1):
        with pytest.raises(CallError, match="rank is"):
            prepare(model, "lora", rank=rank)
    most = 4 * model.module.embed_dim
    for tuning in ("lora", "adapter-mlp"):
        prepare(fresh(case("timm-vit")), tuning, rank=most)
        with pytest.raises(CallError, match=f"^rank is {most + 1}: choose at most {most}, four times the width"):
            prepare(model, tuning, rank=most + 1)
    model.module.blocks[0].attn.qkv = nn.Sequential(model.module.blocks[0].attn.qkv)
    with pytest.raises(
        UnknownModelError, match="LoRA is not supported for Attention: its queries and values cannot be identified"
    ):
        prepare(model, "lora")


def test_every_rank_has_the_same_scale() -> None:
    """α is twice the rank."""
    scales: list[Tensor] = []
    for rank in (None, 2, 16):
        model = fresh(case("timm-vit"))
        prepare(model, "lora", rank=rank)
        scales += [child.scale for child in model.module.modules() if isinstance(child, LowRank)]
    assert set(scales) == {2.0}
