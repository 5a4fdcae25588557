"""The tuning method ``window-cls``: only the tokens and their reader learn, in every Swin of three libraries."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.helpers.coloured import coloured, small_swin
from tests.helpers.every_model import CASES, LABELS, Case, logits, same, weights
from tests.helpers.swin_families import SwinFamily, family
from vitscope.errors import UnsupportedModelError
from vitscope.models.checkpoints.serialization import save_folder
from vitscope.models.heads import WindowClassified, reset_classifier
from vitscope.models.window_reader import WindowReader
from vitscope.tune.methods import prepare
from vitscope.window_tokens.window_head import WindowHead

SWINS = [case for case in CASES if "-swin" in case.name and "swinv2" not in case.name]
OTHERS = [case for case in CASES if case not in SWINS]
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


def test_the_swins_come_from_three_libraries() -> None:
    assert {case.library for case in SWINS} == {"transformers", "timm", "torchvision"}


@pytest.mark.slow
@every_swin
def test_only_tokens_norm_and_head_learn(case: Case) -> None:
    base = case.model()
    model = reading(case)
    prepared = prepare(model, "window-cls")
    learning = {name for name, weight in model.module.named_parameters() if weight.requires_grad}
    assert learning == {f"reader.{name}" for name, _ in reader(model).named_parameters()}
    width = sum(token.numel() for token in reader(model).tokens)
    assert prepared.num_head == width * len(LABELS) + len(LABELS)
    assert prepared.num_trained == width + 2 * width  # the tokens; scale and shift of the norm
    before = backbone(model)
    first = logits(model, case.pixels)
    one_step(model, case)
    assert not torch.equal(logits(model, case.pixels), first)
    assert same(backbone(model), before)
    assert all(torch.equal(tensor, weights(base)[name]) for name, tensor in before.items() if name in weights(base))


@pytest.mark.slow
@every_swin
def test_its_logits_equal_a_window_head_with_the_same_weights(case: Case) -> None:
    model = reading(case)
    one_step(model, case)
    head = WindowHead(case.model(), len(LABELS))
    head.load_state_dict(reader(model).state_dict())
    with torch.no_grad():
        assert torch.equal(head(case.pixels), logits(model, case.pixels))


def read_by_hand(swin: SwinFamily, model: vs.VisionModel, pixels: Tensor) -> Tensor:
    """Return (batch, class) logits in float64, from the library's layers applied to every block and window."""
    base, inputs = swin.model(), []
    blocks = swin.blocks(base.module)
    for block in blocks.values():
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(1, -2).double()))
    learned = reader(model).double()
    result = vs.window_cls(base, pixels, tokens=[token.detach().float() for token in learned.tokens])
    summaries: dict[int, list[Tensor]] = {}
    for step, block, tokens in zip(result.trace.blocks, blocks.values(), inputs, strict=True):
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
                row = result.rows[step.layer][image, window].double()  # (head, 1 + slot)
                read = [norm(token)] + [
                    norm(tokens[image, slot]) if slot >= 0 else torch.zeros_like(token) for slot in slots
                ]
                values = torch.stack([weight @ values + bias for values in read]).unflatten(-1, (len(row), -1))
                taken = taken + out(torch.einsum("hs,shc->hc", row, values).flatten())
            gathered.append(token + taken / len(step.slots))
        summaries.setdefault(tokens.shape[-1], []).append(torch.stack(gathered))
    stages = [torch.stack(blocks).mean(0) for _, blocks in sorted(summaries.items())]
    return learned.head(learned.norm(torch.cat(stages, dim=-1)))


@pytest.mark.slow
@every_swin
def test_the_head_reads_what_a_plain_loop_computes(case: Case) -> None:
    model = reading(case)
    for token in reader(model).tokens:
        nn.init.normal_(token)  # as large as what it reads
    actual = logits(model, case.pixels)
    with torch.no_grad():
        expected = read_by_hand(family(case.name), model, case.pixels)
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@every_swin
def test_its_folder_restores_it_and_its_attention_is_that_of_the_swin(case: Case, tmp_path: Path) -> None:
    base, model = case.model(), reading(case)
    one_step(model, case)
    save_folder(model, tmp_path / "m", about={})
    again = vs.load(tmp_path / "m")
    assert torch.equal(logits(again, case.pixels), logits(model, case.pixels))
    assert same(weights(again), weights(model))
    plain, tuned = vs.capture(base, case.pixels), vs.capture(again, case.pixels)
    assert len(plain.blocks) == len(tuned.blocks) > 1
    for before, after in zip(plain.blocks, tuned.blocks, strict=True):
        assert torch.equal(before.weights(), after.weights())
    learned = vs.window_cls(again, case.pixels)
    explicit = vs.window_cls(base, case.pixels, tokens=list(reader(model).tokens))
    means = vs.window_cls(base, case.pixels)
    for layer, rows in learned.rows.items():
        assert torch.equal(rows, explicit.rows[layer])
        assert not torch.equal(rows, means.rows[layer])


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_a_model_without_windows_is_refused(case: Case) -> None:
    with pytest.raises(UnsupportedModelError, match=r"window|Swin"):
        reading(case)


@pytest.mark.slow
@pytest.mark.parametrize("method", [vs.rollout, vs.attention_map])
def test_a_classifier_that_reads_windows_has_no_attention_row(method: Callable[..., Any], tmp_path: Path) -> None:
    tuned = vs.finetune(small_swin(), coloured(), out=tmp_path / "run", tuning="window-cls", epochs=1, batch_size=8)
    image = coloured().test.read(0)
    assert tuned.model.predict(image)[0][0].label in coloured().labels
    with pytest.raises(UnsupportedModelError, match="window"):
        method(tuned.model, image)


@pytest.mark.slow
def test_an_interrupted_run_resumes(tmp_path: Path) -> None:
    options: dict[str, Any] = {"tuning": "window-cls", "epochs": 2, "batch_size": 8, "save_steps": 2}
    complete = vs.finetune(small_swin(), coloured(), out=tmp_path / "complete", **options)

    def interrupt(step: vs.Progress) -> None:
        if step.completed == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vs.finetune(small_swin(), coloured(), out=tmp_path / "run", progress=interrupt, **options)
    steps: list[int] = []
    again = vs.finetune(
        small_swin(), coloured(), out=tmp_path / "run", progress=lambda step: steps.append(step.completed), **options
    )
    assert min(steps) > 1
    assert same(weights(again.model), weights(complete.model))


@pytest.mark.slow
def test_it_learns(tmp_path: Path) -> None:
    tuned = vs.finetune(
        small_swin(), coloured(), out=tmp_path / "run", tuning="window-cls", epochs=6, batch_size=4, learning_rate=1e-2
    )
    assert tuned.accuracy >= 0.75
