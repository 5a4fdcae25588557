"""The command ``vitscope explain``."""

import json

import numpy as np
import pytest

import vitscope as vs
from tests.helpers.command_line import call, needs_bundled, photo_in_an_empty_folder

pytestmark = needs_bundled
photo = photo_in_an_empty_folder


@pytest.mark.slow
def test_json_holds_predictions_and_rollouts(photo, chelsea, capsys, monkeypatch):
    code, out, _ = call(capsys, monkeypatch, "explain", photo, "--json")
    (entry,) = json.loads(out)
    model = vs.load("vit-nano")
    assert code == 0
    assert entry["predictions"][0]["label"] == model.predict(chelsea)[0][0].label
    np.testing.assert_allclose(entry["rollouts"][0]["values"], vs.rollout(model, chelsea).values[0], atol=1e-6)


@pytest.mark.slow
def test_methods_are_compared(photo, capsys, monkeypatch):
    code, out, err = call(
        capsys, monkeypatch, "explain", photo, "--method", "rollout", "--method", "occlusion", "-t", "dog"
    )
    assert (code, err) == (0, "")
    assert "rollout and occlusion" in out
    assert "wrote cat-explain.png" in out
    code, out, _ = call(capsys, monkeypatch, "explain", photo, "--method", "occlusion", "--json", "--out", "o.png")
    assert json.loads(out)[0]["results"]["occlusion"]["target"] == "cat"


@pytest.mark.slow
def test_ctrl_c_in_one_method_keeps_the_methods_before(photo, capsys, monkeypatch):
    from vitscope.perturb import MaskedModel

    def interrupt(_, masks, *__, **___):
        raise KeyboardInterrupt if len(masks) > 64 else AssertionError("occlusion came after the interruption")

    monkeypatch.setattr(MaskedModel, "evaluate", interrupt)
    methods = ("--method", "rollout", "--method", "lime", "--method", "occlusion")
    code, out, err = call(capsys, monkeypatch, "explain", photo, *methods)
    assert code == 1
    assert "interrupted" in err
    assert "wrote cat-explain.png" in out
