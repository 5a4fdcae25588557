"""The commands ``vitscope attention`` and ``vitscope rollout``; for windows see tests/methods."""

import numpy as np
import pytest

import vitscope as vs
from tests.helpers.command_line import call, needs_bundled, photo_in_an_empty_folder, printed_results

pytestmark = needs_bundled
photo = photo_in_an_empty_folder


@pytest.mark.slow
def test_attention_as_json_equals_attention_map(photo, chelsea, capsys, monkeypatch):
    code, out, _ = call(capsys, monkeypatch, "attention", photo, "--json", "--layer", "2")
    assert code == 0
    maps = printed_results(out)[0]["values_mean_of_heads"]
    expected = vs.attention_map(vs.load("vit-nano"), chelsea, layer=2)
    np.testing.assert_allclose(maps["2"], expected.values[0], atol=1e-6)


@pytest.mark.slow
def test_rollout_as_json_equals_rollout(photo, chelsea, capsys, monkeypatch):
    code, out, _ = call(capsys, monkeypatch, "rollout", photo, "--json", "--head-fusion", "max")
    assert code == 0
    values = printed_results(out)[0]["rollouts"][0]["values"]
    expected = vs.rollout(vs.load("vit-nano"), chelsea, head_fusion="max")
    np.testing.assert_allclose(values, expected.values[0], atol=1e-6)
