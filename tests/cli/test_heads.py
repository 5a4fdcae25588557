"""The command ``vitscope heads``."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

import vitscope as vs
from tests.helpers.command_line import call, needs_bundled, photo_in_an_empty_folder, printed_results
from vitscope import models
from vitscope.methods import head_importance as method
from vitscope.views import figure

pytestmark = [needs_bundled, pytest.mark.usefixtures("coarse_figures")]
photo = photo_in_an_empty_folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--target", "dog"], {"target": "dog"}),
        (["--replacement", "zero", "--output", "probability"], {"replacement": "zero", "output": "probability"}),
        (
            ["--model", "swin-nano", "--method", "gradient", "--contrast", "dog", "--target", "cat"],
            {"by": "gradient", "target": ("cat", "dog")},
        ),
    ],
    ids=["target", "zero", "swin"],
)
def test_json_equals_head_importance(photo, chelsea, capsys, monkeypatch, arguments, options):
    code, out, err = call(capsys, monkeypatch, "heads", photo, "--json", *arguments)
    assert (code, err) == (0, "")
    (entry,) = printed_results(out)
    model = vs.load("swin-nano" if "swin-nano" in arguments else "vit-nano")
    expected = vs.head_importance(model, chelsea, **options)
    values = np.array([[np.nan if value is None else value for value in layer] for layer in entry["values"]])
    np.testing.assert_allclose(values, expected.values[0], atol=1e-5)
    assert (entry["target"], entry["layers"]) == (expected.targets[0], list(expected.layers))
    assert entry["supporting"] == [list(head) for head in expected.top(5)]
    assert entry["opposing"] == [list(head) for head in expected.top(5, sign="negative")]
    assert entry["provenance"]["parameters"] == expected.provenance["parameters"]
    with Image.open(entry["figure"]) as image:
        assert image.format == "PNG"


@pytest.mark.slow
def test_a_sentence_and_a_table_name_the_most_important_heads(photo, chelsea, capsys, monkeypatch):
    code, out, err = call(capsys, monkeypatch, "heads", photo, "--method", "gradient")
    assert (code, err) == (0, "")
    sentence, header, *rows, written = out.splitlines()
    expected = vs.head_importance(vs.load("vit-nano"), chelsea, by="gradient")
    supporting, opposing = int((expected.values > 0).sum()), int((expected.values < 0).sum())
    assert sentence == (
        f"cat.png: of 72 heads of vit-nano, {supporting} support cat (logit 3.53) and {opposing} oppose it."
    )
    assert header.split() == [
        "layer",
        "(index)",
        "head",
        "estimated",
        "drop",
        "of",
        "the",
        "logit",
        "without",
        "the",
        "head",
    ]
    heads = [("supports", *head) for head in expected.top(5)]
    heads += [("opposes", *head) for head in expected.top(5, sign="negative")]
    assert [tuple(row.split()) for row in rows] == [
        (verb, str(layer + 1), f"({layer})", str(head), f"{expected.values[0, layer, head]:+.2f}")
        for verb, layer, head in heads
    ]
    assert written == "wrote cat-heads.png"


@pytest.mark.slow
def test_ctrl_c_keeps_the_heads_before(photo, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(figure, "save_figure", lambda scene, *_, **__: drawn.append(scene))
    compute = method.head_importance

    def interrupt(*arguments, **options):
        def press(step):
            if step.completed:
                raise KeyboardInterrupt

        return compute(*arguments, **{**options, "progress": press, "batch_size": 9})

    monkeypatch.setattr(method, "head_importance", interrupt)
    code, out, err = call(capsys, monkeypatch, "heads", photo)
    assert code == 1
    assert out.startswith("cat.png: of 9 heads of vit-nano, ")
    assert err.endswith("vitscope: interrupted; finished results are kept\n")
    assert np.isfinite(drawn[0].frames.values).sum() == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "probabilities"}, "pass --output probability"),
        ({"layout": None}, "token grid"),
    ],
    ids=str,
)
def test_a_model_without_what_is_needed_is_one_line(photo, tmp_path, capsys, monkeypatch, changes, message):
    model = dataclasses.replace(vs.load("vit-nano"), **changes)
    monkeypatch.setattr(models, "load", lambda *_, **__: model)
    code, out, err = call(capsys, monkeypatch, "heads", photo, "--method", "gradient")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["cat.png"]
