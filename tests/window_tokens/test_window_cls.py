"""A CLS token in every window: equal to a hand-written version, without effect on the model, and learned by a head."""

from typing import Any

import pytest
import torch
from torch import Tensor

import vitscope as vs
from tests.helpers.swin_families import SIZES, SwinFamily, family, pixels

FIRST = [family("transformers-swin"), family("timm-swin"), family("torchvision-swin")]
every_first = pytest.mark.parametrize("swin", FIRST, ids=lambda swin: swin.name)


def by_hand(swin: SwinFamily, block: Any, tokens: Tensor, slots: Tensor) -> Tensor:
    """Compute (batch, window, head, 1 + slots) window by window and head by head, from the library's own layers."""
    if swin.library == "transformers":
        inner = block.attention
        norm, query, key = block.layernorm_before, inner.q_proj, inner.k_proj
        heads = inner.num_attention_heads
        weights = [(layer.weight, layer.bias) for layer in (query, key)]
    else:
        norm, heads = block.norm1, block.attn.num_heads
        weights = list(zip(block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3), strict=True))[:2]
    (query_weight, query_bias), (key_weight, key_bias) = weights
    rows = []
    for image in tokens:
        for window in slots.tolist():
            inside = image[[slot for slot in window if slot >= 0]]
            keys = [norm(inside.mean(0))]
            keys += [norm(image[slot]) if slot >= 0 else torch.zeros(image.shape[1]) for slot in window]
            q = query_weight @ keys[0] + query_bias
            k = torch.stack([key_weight @ key + key_bias for key in keys])
            scores = [
                part_k @ part_q / len(part_q) ** 0.5
                for part_q, part_k in zip(q.chunk(heads), k.chunk(heads, dim=1), strict=True)
            ]
            rows.append(torch.stack(scores).softmax(-1))
    return torch.stack(rows).unflatten(0, (len(tokens), len(slots)))


@pytest.mark.slow
@every_first
@pytest.mark.parametrize("kind", ["fitting", "padded"])
def test_the_attention_equals_the_hand_written_version(swin: SwinFamily, kind: str) -> None:
    model, images = swin.model(SIZES[kind]), pixels(SIZES[kind])
    inputs: list[Tensor] = []
    blocks = swin.blocks(model.module)
    hooks = [
        b.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(1, -2))) for b in blocks.values()
    ]
    result = vs.window_cls(model, images)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        for step, block, tokens in zip(result.trace.blocks, blocks.values(), inputs, strict=True):
            expected = by_hand(swin, block, tokens, step.slots)
            torch.testing.assert_close(result.rows[step.layer], expected, atol=1e-5, rtol=1e-5)


@every_first
def test_the_attention_has_one_more_row_and_column(swin: SwinFamily) -> None:
    model, images = swin.model(), pixels(SIZES["fitting"])
    result = vs.window_cls(model, images)
    for step in result.trace.blocks:
        extended = result.attention(step.layer)
        windows, slots = step.slots.shape
        assert extended.shape == (2, windows, step.num_heads, slots + 1, slots + 1)
        torch.testing.assert_close(extended.sum(-1), torch.ones(extended.shape[:-1]))
        assert not extended[..., 1:, 0].any(), "no token attends to the CLS token"
        torch.testing.assert_close(extended[..., 1:, 1:], step.weights())


@every_first
def test_the_logits_are_the_models_own(swin: SwinFamily) -> None:
    model, images = swin.model(), pixels(SIZES["fitting"])
    with torch.no_grad():
        before = model.forward(images)
    torch.testing.assert_close(vs.window_cls(model, images).logits, before, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
@every_first
def test_the_map_is_the_first_row_on_the_grid(swin: SwinFamily) -> None:
    model, images = swin.model(SIZES["padded"]), pixels(SIZES["padded"])
    result = vs.window_cls(model, images)
    for step in result.trace.blocks:
        for head in (0, -1, "mean", "max"):
            values = result.map(step.layer, head).flatten(1)
            first = result.attention(step.layer)[:, :, :, 0, 1:]
            fused = {"mean": first.mean(2), "max": first.amax(2)}.get(head, first[:, :, 0 if head == 0 else -1])
            for window, slots in enumerate(step.slots.tolist()):
                for slot, token in enumerate(slots):
                    if token >= 0:
                        assert torch.equal(values[:, token], fused[:, window, slot])


def test_the_attention_on_padding_is_in_the_provenance() -> None:
    swin = family("torchvision-swin")
    result = vs.window_cls(swin.model(), pixels(SIZES["padded"]))
    provenance = result.attribution(0).provenance
    rows = result.attention(0)[:, :, :, 0].mean(2)
    to_itself = rows[..., 0].mean(1)
    on_patches = result.map(0).sum((1, 2)) / len(result.trace.step(0).slots)
    total = to_itself + on_patches + torch.tensor(provenance["padding_mass"])
    assert min(provenance["padding_mass"]) > 0.01
    torch.testing.assert_close(total, torch.ones(2))


@pytest.mark.parametrize("name", ["transformers-swinv2", "torchvision-swinv2"])
def test_a_model_without_such_windows_is_refused(name: str) -> None:
    with pytest.raises(
        vs.UnsupportedModelError, match=r"no windows that a CLS token can enter: only Swin \(version 1\) is supported"
    ):
        vs.window_cls(family(name).model(), pixels(SIZES["fitting"]))


@pytest.mark.slow
def test_a_few_steps_lower_the_loss_on_real_images(chelsea) -> None:
    """Two photos are cut into quarters. The tokens and the head learn which photo a quarter comes from."""
    import skimage.data

    model = vs.load("swin-nano")
    photos = [chelsea, skimage.data.astronaut()]
    quarters = [
        (photo[y : y + photo.shape[0] // 2, x : x + photo.shape[1] // 2], label)
        for label, photo in enumerate(photos)
        for y in (0, photo.shape[0] // 2)
        for x in (0, photo.shape[1] // 2)
    ]
    images, _ = model.prepare([image for image, _ in quarters])
    labels = torch.tensor([label for _, label in quarters])
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    torch.manual_seed(0)
    head = vs.WindowHead(model, num_classes=2)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    losses, first_tokens = [], [token.detach().clone() for token in head.tokens]
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(head(images), labels)
        loss.backward()
        losses.append(loss.item())
        assert all(token.grad is not None and token.grad.abs().sum() > 0 for token in head.tokens)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    assert all(not torch.equal(token, first) for token, first in zip(head.tokens, first_tokens, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.module.parameters())


@pytest.mark.slow
@every_first
def test_a_saved_head_loads_unchanged(swin: SwinFamily, tmp_path) -> None:
    model, images = swin.model(), pixels(SIZES["fitting"])
    head = vs.WindowHead(model, num_classes=3)
    path = head.save(tmp_path / "head.safetensors")
    again = vs.WindowHead.load(path, model)
    assert torch.equal(again(images), head(images))
    assert [entry.name for entry in tmp_path.iterdir()] == ["head.safetensors"]
    learned = again.explain(images)
    assert learned.map(0).shape == (2, 16, 16)
    assert not torch.allclose(learned.map(0), vs.window_cls(model, images).map(0))
    names = {name.split(".")[0] for name, _ in head.named_parameters()}
    assert names == {"tokens", "norm", "head"}, "the head neither saves nor trains the backbone"


def test_a_head_for_another_backbone_is_refused(tmp_path) -> None:
    path = vs.WindowHead(family("timm-swin").model(), num_classes=3).save(tmp_path / "head.safetensors")
    import timm

    small = timm.create_model("swin_tiny_patch4_window7_224", img_size=32, embed_dim=24, depths=(2,), num_heads=(3,))
    with pytest.raises(vs.CallError, match=r"stages \[16, 32, 64\] channels wide.*has \[24\]"):
        vs.WindowHead.load(path, small)
    with pytest.raises(vs.CallError, match="does not exist"):
        vs.WindowHead.load(tmp_path / "none.safetensors", small)
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(vs.WorkError, match="is not a saved window head"):
        vs.WindowHead.load(tmp_path / "bad.safetensors", small)
