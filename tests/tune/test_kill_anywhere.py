"""A run that is killed at any file event resumes when it is called again: same bytes, no leftovers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("kind", ["finetune", "overwrite", "overwrite-by-renames", "compare"])
def test_killed_at_any_event_the_same_call_ends_the_same(kind: str, tmp_path: Path) -> None:
    if kind == "overwrite" and sys.platform != "linux":
        pytest.skip("this system cannot exchange two names")
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.killing", kind, str(tmp_path / "runs")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["wrong"] == [], done.stderr[-2000:]
    assert report["kills"] == report["tried"] >= 8
