"""The report of a comparison: all numbers and figures in one file, no markup from names; an older report survives."""

import base64
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.comparisons import leaking, synthetic_comparison
from vitscope.errors import SaveError
from vitscope.tune.leakage import DataCheck
from vitscope.views.comparison_page import ATTENTION_HEADER, INTERACTION_HEADER, SUMMARY_HEADER, write_page
from vitscope.views.tuning import short_name

pytestmark = pytest.mark.usefixtures("quick_comparisons", "coarse_figures")

HEAD = {("vit", "head"): 0.5}


@pytest.fixture(scope="module", name="check")
def check_with_leaks(tmp_path_factory: pytest.TempPathFactory) -> DataCheck:
    return leaking(tmp_path_factory.mktemp("data"))


class Reader(HTMLParser):
    """Reads the cells of tables, the text, the images and the tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.images: list[dict[str, str | None]] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "img":
            self.images.append(dict(attributes))

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.tags and self.tags[-1] in ("td", "th") and data.strip():
            self.rows[-1][-1] += data


@pytest.mark.slow
def test_the_report_holds_every_number_and_figure(check: DataCheck, tmp_path: Path) -> None:
    comparison = synthetic_comparison(data_check=check)
    paths = write_page(comparison, tmp_path)
    names = ["accuracy", "curves", "confusion", "attention-vit", "attention-swin", "data"]
    assert paths == [tmp_path / "report.html", *(tmp_path / f"{name}.png" for name in names)]
    read = Reader(paths[0].read_text(encoding="utf-8"))
    assert read.rows[0] == list(SUMMARY_HEADER)
    assert read.rows[5] == list(INTERACTION_HEADER)
    (summary,) = (entry for entry in comparison.summaries() if (entry.model, entry.tuning) == ("swin", "lora"))
    assert summary.gain is not None
    low, high = (f"{100 * end:+.1f}" for end in summary.gain[1])
    assert read.rows[4] == [
        "swin", "lora", "65.0%", f"{summary.interval[0]:.1%} to {summary.interval[1]:.1%}", f"+5.0 ({low} to {high})",
        "0.650", "12,345", "5", "6",
    ]  # fmt: skip
    assert read.rows[3][4] == "", "the head method has no gain over itself"
    (interaction,) = comparison.interactions()
    low, high = (f"{100 * end:+.1f}" for end in interaction.interval)
    assert read.rows[6] == ["lora", "swin over vit", "-15.0", f"{low} to {high}"]
    assert read.rows[7] == list(ATTENTION_HEADER)
    before, after = ("0.10 (0.20)", "0.90 (0.80)"), ("0.21 (0.33)", "0.62 (0.44)")
    assert [row[:2] for row in read.rows[8:]] == [
        [model, tuning] for model in ("vit", "swin") for tuning in ("before", "head", "lora")
    ]
    assert read.rows[11] == ["swin", "before", "", "", *before]
    distance = np.mean([[0.65 / 4, 0.65 / 3, 0.65 / 2]])
    assert read.rows[13] == ["swin", "lora", f"{distance:.2f}", "+0.75", *after]
    assert "1,234 training and 40 test images, 2 classes, seeds 0, 1" in read.text
    assert '"epochs": 2' in read.text
    for image, path in zip(read.images, paths[1:], strict=True):
        source = str(image["src"])
        assert source.startswith("data:image/png;base64,")
        assert base64.b64decode(source.partition(",")[2]) == path.read_bytes()


def test_names_are_escaped(tmp_path: Path) -> None:
    name = '<b>$x & "y"</b>'
    comparison = synthetic_comparison(
        {(name, "head"): 0.5}, data="<script>alert(1)</script>", recipe={"augment": ["<i>"]}
    )
    text = write_page(comparison, tmp_path)[0].read_text(encoding="utf-8")
    read = Reader(text)
    assert not {"b", "script", "i"} & set(read.tags)
    assert read.rows[1][0] == short_name(name)
    assert "Fine-tuning on <script>alert(1)</script>" in read.text
    assert json.dumps({"augment": ["<i>"]}, indent=1) in read.text
    assert "http" not in text.partition("</style>")[2], "the page loads nothing from elsewhere"


@pytest.mark.slow
@pytest.mark.parametrize("failing", ["report.html", "accuracy.png"])
def test_an_older_report_survives_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    write_page(synthetic_comparison(HEAD), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    kind, write = ("write_text", Path.write_text) if failing == "report.html" else ("write_bytes", Path.write_bytes)

    def write_half(path: Path, content: Any, **options: Any) -> None:
        write(path, content[: len(content) // 2], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, kind, write_half)
    with pytest.raises(SaveError, match=f"cannot write .*{failing}: No space left on device"):
        write_page(synthetic_comparison({("vit", "head"): 0.9}), tmp_path)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() == before.keys()
    assert after[failing] == before[failing]
