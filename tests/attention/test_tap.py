"""The tap observes every way of calling attention once, and leaves the output unchanged."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitscope as vs
from vitscope.attention.tap import AttentionCall, Tap

BATCH, HEADS, TOKENS, CHANNELS = 2, 4, 6, 8


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tapped(run: Callable[[], Any], module: nn.Module | None = None) -> tuple[Any, list[AttentionCall]]:
    """Return the result of ``run`` under a tap that only observes, and the observed calls."""
    calls: list[AttentionCall] = []

    def observe(call: AttentionCall) -> Tensor:
        calls.append(call)
        return call.run()

    depth = torch._C._len_torch_function_stack()
    with torch.no_grad(), Tap(module or nn.Identity(), observe) as tap, tap.follow():
        result = run()
        assert tap.module == ""
    assert torch._C._len_torch_function_stack() == depth
    return result, calls


def weights_of(call: AttentionCall) -> Tensor:
    """Return softmax(scale · q·kᵀ + bias) in float64, from the arguments of a call."""
    if call.logits is not None:
        return call.logits.double().softmax(-1)
    scores = call.query.double() @ call.key.double().transpose(-1, -2) * call.scale
    return (scores if call.bias is None else scores + call.bias.double()).softmax(-1)


Q, K, V = (random(BATCH, HEADS, TOKENS, CHANNELS, seed=seed) for seed in range(3))
BOOLEAN = (random(BATCH, 1, TOKENS, TOKENS, seed=3) > 0) | torch.eye(TOKENS, dtype=torch.bool)
FLOAT = random(HEADS, TOKENS, TOKENS, seed=4)
PADDING = torch.tensor([True, True, True, True, False, False]).expand(BATCH, 1, 1, TOKENS)
sdpa = F.scaled_dot_product_attention

KERNEL_CALLS: dict[str, Callable[[], Tensor]] = {
    "positional": lambda: sdpa(Q, K, V),
    "keywords": lambda: sdpa(value=V, key=K, query=Q),
    "boolean mask": lambda: sdpa(Q, K, V, attn_mask=BOOLEAN),
    "positional mask": lambda: sdpa(Q, K, V, BOOLEAN, 0.0, False),
    "padding mask": lambda: sdpa(Q, K, V, attn_mask=PADDING),
    "float mask": lambda: sdpa(Q, K, V, attn_mask=FLOAT),
    "causal": lambda: sdpa(Q, K, V, is_causal=True),
    "scale": lambda: sdpa(Q, K, V, scale=0.7),
    "grouped": lambda: sdpa(Q, K[:, :2], V[:, :2], enable_gqa=True),
    "grouped, one key head, mask, scale": lambda: sdpa(Q, K[:, :1], V[:, :1], FLOAT, scale=2.0, enable_gqa=True),
    "other queries": lambda: sdpa(Q[:, :, :1], K, V),
    "one head": lambda: sdpa(Q[:, 0], K[:, 0], V[:, 0]),
}


@pytest.mark.parametrize("run", KERNEL_CALLS.values(), ids=KERNEL_CALLS)
def test_a_kernel_call_is_observed_once_and_can_be_recomputed(run: Callable[[], Tensor]) -> None:
    untapped = run()
    result, calls = tapped(run)
    assert torch.equal(result, untapped)
    (call,) = calls
    assert call.logits is None
    assert (call.num_queries, call.num_keys) == (untapped.shape[-2], TOKENS)
    torch.testing.assert_close((weights_of(call) @ call.value.double()).float(), untapped)


LOGITS = random(BATCH, HEADS, TOKENS, TOKENS)

SOFTMAX_CALLS: dict[str, Callable[[], Tensor]] = {
    "F.softmax": lambda: F.softmax(LOGITS, dim=-1),
    "F.softmax, positional": lambda: F.softmax(LOGITS, 3),
    "F.softmax, float64": lambda: F.softmax(LOGITS, dim=-1, dtype=torch.float64),
    "F.softmax, keywords": lambda: F.softmax(input=LOGITS, dim=-1),
    "torch.softmax": lambda: torch.softmax(LOGITS, dim=-1),
    "Tensor.softmax": lambda: LOGITS.softmax(-1),
    "Tensor.softmax, keyword": lambda: LOGITS.softmax(dim=3),
    "nn.Softmax": lambda: nn.Softmax(dim=-1)(LOGITS),
    "torch.special.softmax": lambda: torch.special.softmax(LOGITS, -1),
}


@pytest.mark.parametrize("run", SOFTMAX_CALLS.values(), ids=SOFTMAX_CALLS)
def test_a_softmax_over_keys_is_observed_once(run: Callable[[], Tensor]) -> None:
    untapped = run()
    result, calls = tapped(run)
    assert torch.equal(result, untapped)
    (call,) = calls
    assert call.logits is LOGITS
    assert call.query is call.key is call.value is None
    assert (call.num_queries, call.num_keys) == (TOKENS, TOKENS)


NO_ATTENTION: dict[str, Callable[[], Tensor]] = {
    "classes": lambda: F.softmax(LOGITS[0, 0], dim=-1),
    "heads": lambda: LOGITS.softmax(1),
    "queries": lambda: torch.softmax(LOGITS, dim=-2),
    "batch": lambda: F.softmax(LOGITS, dim=0),
    "one row": lambda: LOGITS[0, 0, 0].softmax(0),
    "logarithm": lambda: F.log_softmax(LOGITS, dim=-1),
}


@pytest.mark.parametrize("run", NO_ATTENTION.values(), ids=NO_ATTENTION)
def test_other_softmaxes_are_not_attention(run: Callable[[], Tensor]) -> None:
    result, calls = tapped(run)
    assert calls == []
    assert torch.equal(result, run())


def test_the_model_receives_what_the_tap_returns() -> None:
    with Tap(nn.Identity(), lambda call: torch.zeros_like(call.run())):
        assert not sdpa(Q, K, V).any()
        assert not LOGITS.softmax(-1).any()
    assert sdpa(Q, K, V).any()


def test_nested_taps_observe_the_same_call() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = random(2, 5, 8)
    (result, inner), outer = tapped(lambda: tapped(lambda: attention(x, x, x, need_weights=False)[0]))
    assert len(inner) == len(outer) == 1
    assert torch.equal(inner[0].query, outer[0].query)
    torch.testing.assert_close(result, attention(x, x, x, need_weights=False)[0])


@pytest.fixture
def native_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The calls of compiled fast paths, which use neither function that the tap observes."""
    calls: list[str] = []
    for name in ("_native_multi_head_attention", "_transformer_encoder_layer_fwd"):
        original = getattr(torch, name)

        def counted(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(torch, name, counted)
    assert torch.backends.mha.get_fastpath_enabled()
    yield calls
    assert torch.backends.mha.get_fastpath_enabled()


MASKS: dict[str, dict[str, Tensor]] = {
    "no mask": {},
    "mask": {"attn_mask": ~torch.ones(5, 5, dtype=torch.bool).tril()},
    "mask per head": {"attn_mask": random(2 * 2, 5, 5)},
    "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False, False, False, True, True]])},
}


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{"need_weights": False}, {}, {"average_attn_weights": False}], ids=str)
def test_multi_head_attention_is_observed_instead_of_the_fast_path(
    native_calls: list[str], options: dict[str, bool], batch_first: bool, masks: dict[str, Tensor]
) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first).eval()
    x = random(2, 5, 8) if batch_first else random(5, 2, 8)

    def run() -> tuple[Tensor, Tensor | None]:
        return attention(x, x, x, **options, **masks)

    with torch.no_grad():
        fast = run()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            plain = run()
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    fast_calls = len(native_calls)
    # The compiled path requires batch_first and takes no floating-point masks.
    assert fast_calls == (batch_first and not any(mask.is_floating_point() for mask in masks.values()))
    result, calls = tapped(run, attention)
    assert len(native_calls) == fast_calls  # the tap has prevented the fast path
    (call,) = calls
    for tensor, exact, close in zip(result, plain, fast, strict=True):
        assert (tensor is None) == (exact is None)
        if tensor is not None:
            assert torch.equal(tensor, exact)
            torch.testing.assert_close(tensor, close, atol=1e-6, rtol=0)
    weights = weights_of(call).reshape(2, 2, 5, 5)
    if result[1] is not None:
        expected = weights if "average_attn_weights" in options else weights.mean(1)
        torch.testing.assert_close(result[1], expected.float())
    else:
        heads = (weights.float() @ call.value).transpose(1, 2).flatten(2)
        output = attention.out_proj(heads)
        torch.testing.assert_close(result[0], output if batch_first else output.transpose(0, 1))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True])
def test_the_encoder_of_torch_is_observed(native_calls: list[str], padded: bool) -> None:
    """Its layers have a separate fast path, with nested tensors if there is padding."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3).eval()
    x = random(2, 5, 8)
    is_token = torch.tensor([[True] * 5, [True, True, True, False, False]]) if padded else torch.ones(2, 5).bool()

    def run() -> Tensor:
        return encoder(x, src_key_padding_mask=~is_token if padded else None)

    with torch.no_grad():
        fast = run()
    assert native_calls == ["_transformer_encoder_layer_fwd"] * 3
    result, calls = tapped(run, encoder)
    assert len(native_calls) == 3
    assert [call.module for call in calls] == [f"layers.{i}.self_attn" for i in range(3)]
    torch.testing.assert_close(result[is_token], fast[is_token], atol=1e-6, rtol=0)


class Attend(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return sdpa(x, x, x)


class Block(nn.Module):
    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"attend": Attend()})
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner["attend"](x)
        if self.fails:
            raise ValueError("the block fails")
        return sdpa(x, x, x)


class Nest(nn.Module):
    """Calls attention before, between and after its blocks, one of which fails."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(fails=True)])
        self.unlisted = [Attend()]  # a list hides it from named_modules

    def forward(self, x: Tensor) -> Tensor:
        x = sdpa(x, x, x)
        x = self.blocks[0](x)
        with pytest.raises(ValueError, match="the block fails"):
            self.blocks[1](x)
        x = sdpa(x, x, x)
        return self.unlisted[0](x)


def test_calls_carry_the_path_of_the_running_module() -> None:
    outer = nn.Sequential(nn.Identity(), Nest())
    _, calls = tapped(lambda: outer(Q), outer)
    assert [call.module for call in calls] == [
        "1",
        "1.blocks.0.inner.attend",
        "1.blocks.0",
        "1.blocks.1.inner.attend",
        "1",
        "1",  # a module without a path has that of its caller
    ]


def test_a_failing_forward_pass_leaves_no_hooks() -> None:
    module = nn.Sequential(Block(), Block(fails=True))
    depth = torch._C._len_torch_function_stack()
    tap = Tap(module, lambda call: call.run())
    with pytest.raises(ValueError, match="the block fails"), tap, tap.follow():
        module(Q)
    assert tap.module == ""
    assert torch._C._len_torch_function_stack() == depth
    assert not torch.nn.modules.module._global_forward_pre_hooks
    assert not torch.nn.modules.module._global_forward_hooks


def test_a_failing_callback_leaves_no_hooks() -> None:
    attention = nn.MultiheadAttention(8, 2).eval()

    def fail(_: AttentionCall) -> Tensor:
        raise KeyError("observed")

    depth = torch._C._len_torch_function_stack()
    tap = Tap(attention, fail)
    with pytest.raises(KeyError, match="observed"), tap, tap.follow():
        attention(*[random(5, 2, 8)] * 3)
    assert tap.module == ""
    assert torch._C._len_torch_function_stack() == depth


class Patches(nn.Module):
    """A custom transformer: patches of 8 pixels, one attention call, the mean."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, 16, 8, 8)
        self.project = nn.Linear(16, 48)
        self.attend = attend

    def qkv(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, (batch, head, token, channel) each."""
        q, k, v = self.project(self.embed(pixels).flatten(2).transpose(1, 2)).chunk(3, dim=-1)
        q, k, v = (x.unflatten(-1, (4, 4)).transpose(1, 2) for x in (q, k, v))
        return q, k, v

    def forward(self, pixels: Tensor) -> Tensor:
        return self.attend(*self.qkv(pixels)).mean((1, 2))


def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v


def heads_in_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)).view_as(q)


def heads_in_batch_explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q.flatten(0, 1) @ k.flatten(0, 1).transpose(-1, -2) / 2
    return (F.softmax(scores, -1) @ v.flatten(0, 1)).view_as(q)


def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, attn_mask=random(4, 8, 8))


def heads_in_batch_biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = random(4, 8, 8).repeat(len(q), 1, 1)
    return sdpa(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), attn_mask=bias).view_as(q)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "attend", [sdpa, explicit, heads_in_batch, heads_in_batch_explicit, biased, heads_in_batch_biased]
)
def test_calls_of_every_shape_become_blocks(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Patches(attend).eval()
    pixels = random(batch, 3, 16, 32)
    q, k, _ = module.qkv(pixels)
    scores = q @ k.transpose(-1, -2) / math.sqrt(4)
    expected = (scores + random(4, 8, 8) if "biased" in attend.__name__ else scores).softmax(-1)
    model = vs.load(module, patch_size=8, readout="patches")
    trace = vs.capture(model, pixels)
    torch.testing.assert_close(trace.attention(0), expected)
    rows = ((expected.mean(1) + torch.eye(8)) / 2).mean(1)
    for smaller in (False, True):
        monkeypatch.setattr(
            "vitscope.tracing.recorder.Recorder._weights_are_smaller", lambda *_, smaller=smaller: smaller
        )
        torch.testing.assert_close(vs.rollout(model, pixels).values.flatten(1), rows)
