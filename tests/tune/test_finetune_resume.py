"""A run that was broken off, by an error or by the system, ends with the weights of one that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import vitscope as vs
from tests.helpers.coloured import coloured, small_swin, small_vit
from tests.helpers.every_model import same, weights
from vitscope.errors import SaveError, WorkError
from vitscope.tune import checkpoints

pytestmark = pytest.mark.usefixtures("little_garbage", "no_pickles")
ROOT = Path(__file__).parents[2]
BASE: dict[str, Any] = {"epochs": 3, "batch_size": 4, "learning_rate": 3e-3, "save_steps": 4}
CHANGES = ("mirror", "shift", "crop", "light")
RUNS: dict[str, dict[str, Any]] = {
    "full": {"tuning": "full", "augment": (), "accumulate": 2},
    "augmented": {"tuning": "full", "augment": CHANGES, "accumulate": 2},
    "lora": {"tuning": "lora", "augment": (), "schedule": "trapezoid"},
    "muon": {"tuning": "full", "optimizer": "muon", "augment": ()},
    "early-stop": {"tuning": "full", "validation": 0.5, "early_stop": 2, "epochs": 6, "save_steps": None},
    "adapters": {"tuning": "adapter-both", "rank": 4, "augment": (), "schedule": "constant"},
    "head": {"tuning": "head", "augment": ()},
}


class BrokenOffError(Exception):
    pass


def breaking(step: int) -> Any:
    def progress(told: Mapping[str, float]) -> None:
        if told["step"] == step:
            raise BrokenOffError

    return progress


def run(out: Path, name: str, **options: Any) -> vs.Tuned:
    model = small_swin() if name == "adapters" else small_vit(dropout=0.1)
    return vs.finetune(model, coloured(), out=out, **(BASE | RUNS[name] | options))


def steps(out: Path) -> list[int]:
    return [int(one.name.partition("-")[2]) for one in checkpoints.checkpoints(out / "checkpoints")]


def told(tuned: vs.Tuned) -> list[Any]:
    names = ("epoch", "step", "eval_accuracy", "eval_loss")
    return [[row.get(name) for name in names] for row in tuned.about["history"][:-1]]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_broken_off_ends_with_the_same_weights(name: str, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", name)
    for step, kept in ((5, 3), (8, 6)) if name == "early-stop" else ((5, 4), (9, 8)):
        with pytest.raises(BrokenOffError):
            run(tmp_path / "broken", name, progress=breaking(step))
        assert steps(tmp_path / "broken")[-1] == kept
        assert not (tmp_path / "broken" / "result.json").exists()
    again = run(tmp_path / "broken", name)
    assert same(weights(again.model), weights(whole.model))
    assert (again.said == whole.said).all()
    assert told(again) == told(whole)
    assert again.about["epochs"] == whole.about["epochs"]
    assert not (tmp_path / "broken" / "checkpoints").exists()


def test_a_run_broken_off_at_the_end_of_an_epoch_ends_the_same(tmp_path: Path) -> None:
    """While the epoch is evaluated, and just after it."""
    whole, seen = run(tmp_path / "whole", "lora", save_steps=3), []

    def evaluated(told: Mapping[str, float]) -> None:
        seen.append(told["step"])
        if seen.count(6) == 2:
            raise BrokenOffError

    for progress, kept in ((evaluated, 3), (breaking(7), 6)):
        with pytest.raises(BrokenOffError):
            run(tmp_path / "broken", "lora", save_steps=3, progress=progress)
        assert steps(tmp_path / "broken") == [kept]
    again = run(tmp_path / "broken", "lora", save_steps=3)
    assert told(again) == told(whole)
    assert same(weights(again.model), weights(whole.model))


def test_a_run_broken_off_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", "full")
    with pytest.raises(BrokenOffError):
        run(tmp_path / "broken", "full", progress=breaking(1))
    assert steps(tmp_path / "broken") == []
    assert same(weights(run(tmp_path / "broken", "full").model), weights(whole.model))


CODE = """
import os, signal, sys, time
import torch
torch.set_num_threads(1)
from tests.tune.test_finetune_resume import run
from pathlib import Path
from vitscope.tune import checkpoints
if sys.argv[2] == "writing":
    save, count = checkpoints.save_random, [0]
    def killed(*given):
        count[0] += 1
        if count[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        save(*given)
    checkpoints.save_random = killed
run(Path(sys.argv[1]), "full", progress=lambda told: time.sleep(0.05))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal on this system")
@pytest.mark.parametrize("moment", ["any", "writing"])
def test_a_killed_process_leaves_a_run_that_goes_on(moment: str, tmp_path: Path) -> None:
    """At any moment after the first checkpoint; and while the second one is being written."""
    whole, out = run(tmp_path / "whole", "full"), tmp_path / "killed"
    call = [sys.executable, "-c", CODE, str(out), moment]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(call, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    give_up = time.monotonic() + 60
    while moment == "any" and process.poll() is None and time.monotonic() < give_up and not steps(out):
        time.sleep(0.01)
    if moment == "any":
        time.sleep(random.Random(0).uniform(0, 0.2))
        process.kill()
    _, story = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, story.decode()[-500:]
    assert steps(out)
    assert not (out / "result.json").exists()
    if moment == "writing":
        assert steps(out) == [3]
        assert any(one.name.startswith(".") for one in (out / "checkpoints").iterdir())
    assert same(weights(run(out, "full").model), weights(whole.model))
    assert not (out / "checkpoints").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left")], ids=repr)
def test_a_full_disk_leaves_the_older_checkpoint(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = run(tmp_path / "whole", "lora"), []

    def fills(tensors: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) > 4:
            path.write_bytes(b"half")
            raise error
        save_file(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", fills)
        with pytest.raises(SaveError, match=r"^cannot write .*checkpoint-6: No space left") as caught:
            run(tmp_path / "full", "lora")
    assert "\n" not in str(caught.value)
    assert [one.name for one in (tmp_path / "full" / "checkpoints").iterdir()] == ["checkpoint-4"]
    assert same(weights(run(tmp_path / "full", "lora").model), weights(whole.model))


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, losses = run(tmp_path / "whole", "lora"), []
    cross_entropy = torch.nn.functional.cross_entropy

    def spoiled(*given: Any, **options: Any) -> torch.Tensor:
        losses.append(1)
        return cross_entropy(*given, **options) * (float("nan") if len(losses) == 5 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "cross_entropy", spoiled)
        with pytest.raises(WorkError, match=r"^the loss is nan at step 5: the run stops, its last checkpoint is kept"):
            run(tmp_path / "nan", "lora")
    assert steps(tmp_path / "nan") == [4]
    assert same(weights(run(tmp_path / "nan", "lora").model), weights(whole.model))


def test_weights_that_are_not_finite_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, calls = checkpoints.trained_state, []

    def spoiled(module: Any) -> dict[str, torch.Tensor]:
        calls.append(1)
        return {name: one / (len(calls) < 2) for name, one in state(module).items()}

    monkeypatch.setattr(checkpoints, "trained_state", spoiled)
    with pytest.raises(WorkError, match=r" holds NaN or infinity after step 6: the last good checkpoint is kept$"):
        run(tmp_path / "o", "lora")
    assert steps(tmp_path / "o") == [4]


def broken_off(out: Path, name: str) -> Path:
    with pytest.raises(BrokenOffError):
        run(out, name, progress=breaking(5))
    (kept,) = checkpoints.checkpoints(out / "checkpoints")
    return kept


@pytest.mark.parametrize("file", ["trained.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_one_line(file: str, tmp_path: Path) -> None:
    kept = broken_off(tmp_path / "o", "lora") / file
    whole = kept.read_bytes()
    for damaged in (whole[:-20], b"", None):
        if damaged is None:
            kept.unlink()
        else:
            kept.write_bytes(damaged)
        with pytest.raises(WorkError, match="is no whole checkpoint: ") as error:
            run(tmp_path / "o", "lora")
        assert "\n" not in str(error.value)
        assert str(kept) in str(error.value)


def test_a_checkpoint_of_another_tuning_or_optimizer_is_one_line(tmp_path: Path) -> None:
    kept, other = broken_off(tmp_path / "o", "muon"), broken_off(tmp_path / "other", "lora")
    for file in ("trained.safetensors", "state.json"):
        original = (kept / file).read_bytes()
        (kept / file).write_bytes((other / file).read_bytes())
        with pytest.raises(WorkError, match=r"is of another (model or tuning|optimizer): ") as error:
            run(tmp_path / "o", "muon")
        assert "\n" not in str(error.value)
        (kept / file).write_bytes(original)


@pytest.mark.parametrize(
    ("other", "files", "story"),
    [
        ("full", ("optimizer.safetensors",), "do not belong together"),
        ("full", ("optimizer.safetensors", "state.json"), "its settings have other names"),
        ("wide", ("optimizer.safetensors", "state.json"), "weight 0 has another shape"),
    ],
)
def test_files_of_several_checkpoints_are_not_mixed(
    other: str, files: tuple[str, ...], story: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RUNS, "wide", {**RUNS["adapters"], "rank": 5})
    kept = broken_off(tmp_path / "o", "adapters" if other == "wide" else "muon")
    for file in files:
        (kept / file).write_bytes((broken_off(tmp_path / file, other) / file).read_bytes())
    with pytest.raises(WorkError, match=rf"is of another optimizer: .*{story}") as error:
        run(tmp_path / "o", "adapters" if other == "wide" else "muon")
    assert "\n" not in str(error.value)


def test_a_checkpoint_holds_only_what_learns(tmp_path: Path) -> None:
    kept = broken_off(tmp_path / "o", "lora")
    names = load_file(kept / "trained.safetensors").keys()
    assert all(".lora_" in name or name.startswith("classifier.") for name in names)
    files = {path.suffix for path in kept.iterdir()}
    assert files == {".safetensors", ".json"}
