"""A run that was interrupted, by an error or by the system, ends with the weights of an uninterrupted one."""

import os
import random
import signal
import subprocess
import sys
import time
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


class InterruptionError(Exception):
    pass


def interrupt_at(number: int) -> Any:
    def interrupt(step: vs.Progress) -> None:
        if step.completed == number:
            raise InterruptionError

    return interrupt


def run(out: Path, name: str, **options: Any) -> vs.Tuned:
    model = small_swin() if name == "adapters" else small_vit(dropout=0.1)
    return vs.finetune(model, coloured(), out=out, **(BASE | RUNS[name] | options))


def steps(out: Path) -> list[int]:
    return [int(folder.name.partition("-")[2]) for folder in checkpoints.checkpoints(out / "checkpoints")]


def history(tuned: vs.Tuned) -> list[Any]:
    names = ("epoch", "step", "eval_accuracy", "eval_loss")
    return [[row.get(name) for name in names] for row in tuned.record["history"][:-1]]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_ends_with_the_same_weights(name: str, tmp_path: Path) -> None:
    complete = run(tmp_path / "whole", name)
    for step, saved in ((5, 3), (8, 6)) if name == "early-stop" else ((5, 4), (9, 8)):
        with pytest.raises(InterruptionError):
            run(tmp_path / "interrupted", name, progress=interrupt_at(step))
        assert steps(tmp_path / "interrupted")[-1] == saved
        assert not (tmp_path / "interrupted" / "result.json").exists()
    again = run(tmp_path / "interrupted", name)
    assert same(weights(again.model), weights(complete.model))
    assert (again.predictions == complete.predictions).all()
    assert history(again) == history(complete)
    assert again.record["epochs"] == complete.record["epochs"]
    assert not (tmp_path / "interrupted" / "checkpoints").exists()


@pytest.mark.slow
def test_a_run_interrupted_at_the_end_of_an_epoch_ends_the_same(tmp_path: Path) -> None:
    """The run is interrupted while the epoch is evaluated, and just after it."""
    complete, seen = run(tmp_path / "whole", "lora", save_steps=3), []

    def interrupt_evaluation(step: vs.Progress) -> None:
        seen.append(step.completed)
        if seen.count(6) == 2:
            raise InterruptionError

    for progress, saved in ((interrupt_evaluation, 3), (interrupt_at(7), 6)):
        with pytest.raises(InterruptionError):
            run(tmp_path / "interrupted", "lora", save_steps=3, progress=progress)
        assert steps(tmp_path / "interrupted") == [saved]
    again = run(tmp_path / "interrupted", "lora", save_steps=3)
    assert history(again) == history(complete)
    assert same(weights(again.model), weights(complete.model))


@pytest.mark.slow
def test_a_run_interrupted_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    complete = run(tmp_path / "whole", "full")
    with pytest.raises(InterruptionError):
        run(tmp_path / "interrupted", "full", progress=interrupt_at(1))
    assert steps(tmp_path / "interrupted") == []
    assert same(weights(run(tmp_path / "interrupted", "full").model), weights(complete.model))


CODE = """
import os, signal, sys, time
import torch
torch.set_num_threads(1)
from tests.tune.test_finetune_resume import run
from pathlib import Path
from vitscope.tune import checkpoints
if sys.argv[2] == "writing":
    save, count = checkpoints.save_random, [0]
    def save_or_kill(*arguments):
        count[0] += 1
        if count[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        save(*arguments)
    checkpoints.save_random = save_or_kill
run(Path(sys.argv[1]), "full", progress=lambda step: time.sleep(0.05))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal on this system")
@pytest.mark.parametrize("moment", ["any", "writing"])
def test_the_run_of_a_killed_process_resumes(moment: str, tmp_path: Path) -> None:
    """The process is killed at any moment after the first checkpoint, or while the second one is written."""
    complete, out = run(tmp_path / "whole", "full"), tmp_path / "killed"
    call = [sys.executable, "-c", CODE, str(out), moment]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(call, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while moment == "any" and process.poll() is None and time.monotonic() < deadline and not steps(out):
        time.sleep(0.01)
    if moment == "any":
        time.sleep(random.Random(0).uniform(0, 0.2))
        process.kill()
    _, output = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, output.decode()[-500:]
    assert steps(out)
    assert not (out / "result.json").exists()
    if moment == "writing":
        assert steps(out) == [3]
        assert any(path.name.startswith(".") for path in (out / "checkpoints").iterdir())
    assert same(weights(run(out, "full").model), weights(complete.model))
    assert not (out / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left")], ids=repr)
def test_a_full_disk_leaves_the_older_checkpoint(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete, calls = run(tmp_path / "whole", "lora"), []

    def save_until_full(tensors: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) > 4:
            path.write_bytes(b"half")
            raise error
        save_file(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", save_until_full)
        with pytest.raises(SaveError, match=r"^cannot write .*checkpoint-6: No space left") as caught:
            run(tmp_path / "full", "lora")
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "full" / "checkpoints").iterdir()] == ["checkpoint-4"]
    assert same(weights(run(tmp_path / "full", "lora").model), weights(complete.model))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete, losses = run(tmp_path / "whole", "lora"), []
    cross_entropy = torch.nn.functional.cross_entropy

    def nan_at_step_five(*arguments: Any, **options: Any) -> torch.Tensor:
        losses.append(1)
        return cross_entropy(*arguments, **options) * (float("nan") if len(losses) == 5 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "cross_entropy", nan_at_step_five)
        with pytest.raises(WorkError, match=r"^the loss is nan at step 5: the run stops and keeps its last checkpoint"):
            run(tmp_path / "nan", "lora")
    assert steps(tmp_path / "nan") == [4]
    assert same(weights(run(tmp_path / "nan", "lora").model), weights(complete.model))


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, calls = checkpoints.trained_state, []

    def infinite_state(module: Any) -> dict[str, torch.Tensor]:
        calls.append(1)
        return {name: tensor / (len(calls) < 2) for name, tensor in state(module).items()}

    monkeypatch.setattr(checkpoints, "trained_state", infinite_state)
    with pytest.raises(WorkError, match=r" holds NaN or infinity after step 6: the last good checkpoint is kept$"):
        run(tmp_path / "o", "lora")
    assert steps(tmp_path / "o") == [4]


def interrupted_checkpoint(out: Path, name: str) -> Path:
    with pytest.raises(InterruptionError):
        run(out, name, progress=interrupt_at(5))
    (checkpoint,) = checkpoints.checkpoints(out / "checkpoints")
    return checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("file", ["trained.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_refused(file: str, tmp_path: Path) -> None:
    path = interrupted_checkpoint(tmp_path / "o", "lora") / file
    content = path.read_bytes()
    for damaged in (content[:-20], b"", None):
        if damaged is None:
            path.unlink()
        else:
            path.write_bytes(damaged)
        with pytest.raises(WorkError, match=" is damaged: ") as error:
            run(tmp_path / "o", "lora")
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)


@pytest.mark.slow
def test_a_checkpoint_of_another_tuning_method_or_optimizer_is_refused(tmp_path: Path) -> None:
    folder, other_folder = (
        interrupted_checkpoint(tmp_path / "o", "muon"),
        interrupted_checkpoint(tmp_path / "other", "lora"),
    )
    for file in ("trained.safetensors", "state.json"):
        original = (folder / file).read_bytes()
        (folder / file).write_bytes((other_folder / file).read_bytes())
        with pytest.raises(WorkError, match=r"is of another (model or tuning|optimizer): ") as error:
            run(tmp_path / "o", "muon")
        assert "\n" not in str(error.value)
        (folder / file).write_bytes(original)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run_name", "files", "message"),
    [
        ("full", ("optimizer.safetensors",), "do not belong together"),
        ("full", ("optimizer.safetensors", "state.json"), "its settings have other names"),
        ("wide", ("optimizer.safetensors", "state.json"), "weight 0 has another shape"),
    ],
)
def test_files_of_several_checkpoints_are_not_mixed(
    run_name: str, files: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RUNS, "wide", {**RUNS["adapters"], "rank": 5})
    folder = interrupted_checkpoint(tmp_path / "o", "adapters" if run_name == "wide" else "muon")
    for file in files:
        (folder / file).write_bytes((interrupted_checkpoint(tmp_path / file, run_name) / file).read_bytes())
    with pytest.raises(WorkError, match=rf"is of another optimizer: .*{message}") as error:
        run(tmp_path / "o", "adapters" if run_name == "wide" else "muon")
    assert "\n" not in str(error.value)


def test_a_checkpoint_holds_only_weights_that_learn(tmp_path: Path) -> None:
    folder = interrupted_checkpoint(tmp_path / "o", "lora")
    names = load_file(folder / "trained.safetensors").keys()
    assert all(".lora_" in name or name.startswith("classifier.") for name in names)
    files = {path.suffix for path in folder.iterdir()}
    assert files == {".safetensors", ".json"}
