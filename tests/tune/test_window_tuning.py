"""Tuning ``window-cls``: only the tokens and what reads them learn, in every Swin of three libraries."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.helpers.coloured import coloured, small_swin
from tests.helpers.every_model import CASES, LABELS, Case, logits, same, weights
from tests.helpers.swin_families import SwinFamily, family
from vitscope.errors import CallError
from vitscope.models.checkpoints.serialization import save_folder
from vitscope.models.heads import WindowClassified, reset_classifier
from vitscope.models.window_reader import WindowReader
from vitscope.tune.methods import prepare
from vitscope.window_tokens.window_head import WindowHead

SWINS = [one for one in CASES if "-swin" in one.name and "swinv2" not in one.name]
OTHERS = [one for one in CASES if one not in SWINS]
every_swin = pytest.mark.parametrize("case", SWINS, ids=lambda case: case.name)


def reader(model: vs.VisionModel) -> WindowReader:
    assert isinstance(model.module, WindowClassified)
    return model.module.reader


def reading(case: Case) -> vs.VisionModel:
    base = case.model()
    torch.manual_seed(0)
    return reset_classifier(base, LABELS, by_windows=True)


def backbone(model: vs.VisionModel) -> dict[str, torch.Tensor]:
    assert isinstance(model.module, WindowClassified)
    return {name: tensor.clone() for name, tensor in model.module.backbone.state_dict().items()}


def one_step(model: vs.VisionModel, case: Case) -> None:
    nn.functional.cross_entropy(model.forward(case.pixels), torch.tensor([0, 2])).backward()
    for parameter in model.module.parameters():
        if parameter.grad is not None:
            parameter.data.sub_(parameter.grad, alpha=0.5)


def test_the_three_libraries_are_here() -> None:
    assert {one.library for one in SWINS} == {"transformers", "timm", "torchvision"}


@every_swin
def test_tokens_norm_and_head_learn_and_the_swin_stays_bit_by_bit(case: Case) -> None:
    given = case.model()
    model = reading(case)
    prepared = prepare(model, "window-cls")
    learning = {name for name, one in model.module.named_parameters() if one.requires_grad}
    assert learning == {f"reader.{name}" for name, _ in reader(model).named_parameters()}
    width = sum(one.numel() for one in reader(model).tokens)
    assert prepared.num_head == width * len(LABELS) + len(LABELS)
    assert prepared.num_trained == width + 2 * width  # the tokens; scale and shift of the norm
    before = backbone(model)
    first = logits(model, case.pixels)
    one_step(model, case)
    assert not torch.equal(logits(model, case.pixels), first)
    assert same(backbone(model), before)
    assert all(torch.equal(tensor, weights(given)[name]) for name, tensor in before.items() if name in weights(given))


@every_swin
def test_its_logits_are_those_of_a_window_head_with_the_same_weights(case: Case) -> None:
    model = reading(case)
    one_step(model, case)
    head = WindowHead(case.model(), len(LABELS))
    head.load_state_dict(reader(model).state_dict())
    with torch.no_grad():
        assert torch.equal(head(case.pixels), logits(model, case.pixels))


def read_by_hand(swin: SwinFamily, model: vs.VisionModel, pixels: Tensor) -> Tensor:
    """(batch, class) in float64: for every block and window what the token takes up, by the library's own layers."""
    given, inputs = swin.model(), []
    blocks = swin.blocks(given.module)
    for block in blocks.values():
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(1, -2).double()))
    learned = reader(model).double()
    looked = vs.window_cls(given, pixels, tokens=[token.detach().float() for token in learned.tokens])
    summaries: dict[int, list[Tensor]] = {}
    for step, block, tokens in zip(looked.trace.blocks, blocks.values(), inputs, strict=True):
        if swin.library == "transformers":
            norm, value, out = block.layernorm_before, block.attention.v_proj, block.attention.o_proj
            weight, bias = value.weight, value.bias
        else:
            norm, out = block.norm1, block.attn.proj
            weight, bias = block.attn.qkv.weight.chunk(3)[2], block.attn.qkv.bias.chunk(3)[2]
        norm, out, weight, bias = norm.double(), out.double(), weight.double(), bias.double()
        token = next(token for token in learned.tokens if token.numel() == tokens.shape[-1])
        gathered = []
        for image in range(len(tokens)):
            taken = torch.zeros_like(token)
            for window, slots in enumerate(step.slots.tolist()):
                row = looked.rows[step.layer][image, window].double()  # (head, 1 + slot)
                read = [norm(token)] + [
                    norm(tokens[image, slot]) if slot >= 0 else torch.zeros_like(token) for slot in slots
                ]
                values = torch.stack([weight @ one + bias for one in read]).unflatten(-1, (len(row), -1))
                taken = taken + out(torch.einsum("hs,shc->hc", row, values).flatten())
            gathered.append(token + taken / len(step.slots))
        summaries.setdefault(tokens.shape[-1], []).append(torch.stack(gathered))
    stages = [torch.stack(blocks).mean(0) for _, blocks in sorted(summaries.items())]
    return learned.head(learned.norm(torch.cat(stages, dim=-1)))


@every_swin
def test_the_head_reads_what_the_tokens_take_up_as_written_by_hand(case: Case) -> None:
    model = reading(case)
    for token in reader(model).tokens:
        nn.init.normal_(token)  # as large as what it takes up
    found = logits(model, case.pixels)
    with torch.no_grad():
        expected = read_by_hand(family(case.name), model, case.pixels)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@every_swin
def test_its_folder_gives_it_back_and_its_maps_are_the_swins(case: Case, tmp_path: Path) -> None:
    given, model = case.model(), reading(case)
    one_step(model, case)
    save_folder(model, tmp_path / "m", about={})
    again = vs.load(tmp_path / "m")
    assert torch.equal(logits(again, case.pixels), logits(model, case.pixels))
    assert same(weights(again), weights(model))
    plain, tuned = vs.capture(given, case.pixels), vs.capture(again, case.pixels)
    assert len(plain.blocks) == len(tuned.blocks) > 1
    for one, other in zip(plain.blocks, tuned.blocks, strict=True):
        assert torch.equal(one.weights(), other.weights())
    learned = vs.window_cls(again, case.pixels)
    explicit = vs.window_cls(given, case.pixels, tokens=list(reader(model).tokens))
    means = vs.window_cls(given, case.pixels)
    for layer, rows in learned.rows.items():
        assert torch.equal(rows, explicit.rows[layer])
        assert not torch.equal(rows, means.rows[layer])


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_what_has_no_windows_to_read_is_refused(case: Case) -> None:
    with pytest.raises(CallError, match=r"window|Swin"):
        reading(case)


@pytest.mark.parametrize("method", [vs.rollout, vs.attention_map])
def test_a_classifier_that_reads_windows_has_no_row_to_show(method: Callable[..., Any], tmp_path: Path) -> None:
    tuned = vs.finetune(small_swin(), coloured(), out=tmp_path / "run", tuning="window-cls", epochs=1, batch_size=8)
    image = coloured().test.read(0)
    assert tuned.model.predict(image)[0][0].label in coloured().labels
    with pytest.raises(CallError, match="window"):
        method(tuned.model, image)


def test_it_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    options: dict[str, Any] = {"tuning": "window-cls", "epochs": 2, "batch_size": 8, "save_steps": 2}
    whole = vs.finetune(small_swin(), coloured(), out=tmp_path / "whole", **options)

    def stop(told: Mapping[str, float]) -> None:
        if told["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vs.finetune(small_swin(), coloured(), out=tmp_path / "run", progress=stop, **options)
    steps: list[float] = []
    again = vs.finetune(
        small_swin(), coloured(), out=tmp_path / "run", progress=lambda told: steps.append(told["step"]), **options
    )
    assert min(steps) > 1
    assert same(weights(again.model), weights(whole.model))


def test_it_learns(tmp_path: Path) -> None:
    tuned = vs.finetune(
        small_swin(), coloured(), out=tmp_path / "run", tuning="window-cls", epochs=6, batch_size=4, learning_rate=1e-2
    )
    assert tuned.accuracy >= 0.75
