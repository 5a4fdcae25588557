"""Reports: self-contained pages with every number, escaped, and written as a whole or not at all."""

import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import vitscope as vs
from vitscope.methods.registry import METHODS
from vitscope.models.prediction import Prediction
from vitscope.views.html_table import html_text
from vitscope.views.reading_guide import READING
from vitscope.views.report import Report, numbers_of, report_page, write_report
from vitscope.views.scene import Panel, Row, Scene
from vitscope.views.style import FigureStyle

STYLE = FigureStyle(dpi=20)
NASTY = '<script>alert("x")</script> & \x1b'


@pytest.fixture
def report():
    photo = Image.new("RGB", (60, 40), "gray")
    panel = Panel(vs.InputImage(photo, (0.0, 0.0, 60.0, 40.0)), np.eye(2, dtype=np.float32), "map")
    return Report(
        photo="cat.png",
        image=photo,
        model="vit-nano",
        predictions=[Prediction("cat", 3, 0.735), Prediction("dog", 5, 0.1)],
        scenes=[Scene([Row([panel], 1)], "What supports cat", "a note", subject="cat.png; vit-nano predicts cat")],
        kinds=["attention", "gradient", "attention"],
        meanings={"libra": "each patch's share"},
        numbers=[("libra", "logit of cat", "3.53")],
        provenance={"libra": {"model": "vit-nano", "parameters": {"gamma": 0.0}, "values": list(range(1000))}},
    )


def test_a_page_holds_everything_and_needs_nothing_else(report):
    page = report_page(report, STYLE)
    for text in ("cat.png; vit-nano predicts cat", "73.5%", "What supports cat", "a note", "logit of cat", "3.53"):
        assert text in page
    assert "{&quot;gamma&quot;: 0.0}" in page
    assert page.count(html_text(READING["attention"])) == 1, "each kind once"
    assert html_text(READING["gradient"]) in page
    assert html_text(READING["perturbation"]) not in page
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"<script|<link|@import|url\(", page)
    assert report_page(report, STYLE) == page


def test_all_texts_are_escaped(report):
    scene = replace(report.scenes[0], title=NASTY, subject=NASTY, note=NASTY)
    nasty = replace(
        report,
        photo=NASTY,
        model=NASTY,
        predictions=[Prediction(NASTY, 0, 0.5)],
        scenes=[scene],
        meanings={NASTY: NASTY},
        numbers=[(NASTY, NASTY, NASTY)],
        provenance={NASTY: {NASTY: NASTY, "nested": [NASTY]}},
    )
    page = report_page(nasty, STYLE)
    assert "<script" not in page
    assert "\x1b" not in page
    assert page.count("&lt;script&gt;") >= 12


def test_a_report_is_replaced_only_if_allowed_and_as_a_whole(report, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("precious")
    with pytest.raises(vs.VitscopeError, match="already exists"):
        write_report(report, path, style=STYLE)
    broken = replace(report, kinds=["nothing"])
    with pytest.raises(KeyError):
        write_report(broken, path, overwrite=True, style=STYLE)
    assert path.read_text() == "precious"
    write_report(report, path, overwrite=True, style=STYLE)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_every_kind_of_method_has_a_paragraph():
    assert {method.kind for method in METHODS.values()} < set(READING)


def test_numbers_are_those_of_the_provenance(chelsea):
    result = vs.libra(vs.load("vit-nano"), chelsea)
    rows = {name: value for _, name, value in numbers_of("libra", result)}
    assert rows["logit of cat"] == f"{result.provenance['score'][0]:.4g}"
    assert rows["completeness: error"] == f"{result.provenance['completeness'][0]['error']:.3g}"
    assert rows["highest value"] == f"{float(result.values.max()):.3g}"
