"""Several processes that train one model give the weights of one process with their combined batch size."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vitscope as vs
from tests.cli.test_app import needs_bundled
from tests.helpers.coloured import coloured_folder
from tests.helpers.every_model import weights

ROOT = Path(__file__).parents[2]


def two_processes(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "vitscope.cli", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@needs_bundled
def test_two_processes_train_as_one_with_twice_the_batch_size(tmp_path: Path) -> None:
    data = coloured_folder(tmp_path / "birds", {"red": 10, "blue": 10})
    options = ("--tunings", "head,lora", "--models", "vit-nano", "--seeds", "1", "--epochs", "2", "--keep-models")
    out = two_processes(tmp_path, "compare", "birds", *options, "--batch-size", "4", "--out", "two")
    assert out.count("wrote two/report.html") == 1, "only one process prints"
    recipe: dict[str, Any] = {"epochs": 2, "batch_size": 8}
    comparison = vs.compare(
        data, ["vit-nano"], out=tmp_path / "one", tunings=("head", "lora"), seeds=1, **recipe, keep_models=True
    )
    for cell in comparison.cells:
        name = f"cells/vit-nano-{cell.tuning}-0"
        first, second = (weights(vs.load(tmp_path / folder / name)) for folder in ("one", "two"))
        changed = [
            tensor
            for key, tensor in weights(vs.load("vit-nano")).items()
            if key in first and "classifier" not in key and not torch.equal(tensor, first[key])
        ]
        assert bool(changed) == (cell.tuning == "lora")
        for key, tensor in first.items():
            torch.testing.assert_close(second[key], tensor, atol=1e-5, rtol=1e-4)
        record = json.loads((tmp_path / "two" / name / "cell.json").read_text(encoding="utf-8"))
        assert record["predictions"] == list(cell.record["predictions"])
        assert len(record["attention"]["distances"]) == 6
