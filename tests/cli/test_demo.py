"""The command ``vitscope demo``."""

import pytest
from PIL import Image

from tests.helpers.command_line import call, needs_bundled

pytestmark = needs_bundled


@pytest.mark.slow
def test_demo_predicts_a_cat_and_writes_a_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(capsys, monkeypatch, "demo")
    assert code == 0
    first_class = out.splitlines()[2].split()[0]
    assert first_class == "cat"
    assert "wrote vitscope-demo.png" in out
    with Image.open("vitscope-demo.png") as figure:
        assert figure.width > 1000
    code, out, _ = call(capsys, monkeypatch, "demo")
    assert "wrote vitscope-demo-2.png" in out, "the first figure must not be replaced"
