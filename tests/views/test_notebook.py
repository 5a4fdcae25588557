"""A notebook that is executed: results show themselves as pictures and tables, and progress is visible."""

import base64
import io
from typing import Any

import pytest
from PIL import Image

pytestmark = pytest.mark.slow

CELLS = {
    "load": """
import numpy as np, skimage.data, vitscope as vs
model, cat = vs.load("vit-nano"), skimage.data.chelsea()
model""",
    "rollout": "result = vs.rollout(model, cat)\nresult",
    "trace": "vs.capture(model, cat)",
    "figure": "result.figure()",
    "figure and pyplot": """
import matplotlib.pyplot as plt
result.figure()""",
    "agreement": "libra = vs.libra(model, cat)\nvs.agreement([result, libra])",
    "statistics": "vs.head_statistics(model, cat)",
    "progress": "lime = vs.lime(model, cat, segments='patches', num_samples=80, progress=True)",
    "quiet": "lime = vs.lime(model, cat, segments='patches', num_samples=80)",
    "explanation": "vs.explain(model, cat, ['libra', 'rollout'])",
    "array": "np.asarray(result).shape",
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Return the outputs of each cell after the notebook was executed."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in CELLS.values()])
    with pytest.MonkeyPatch.context() as patched:
        for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "MPLCONFIGDIR"):
            patched.setenv(name, str(folder / name.lower()))
        patched.setenv("JUPYTER_PLATFORM_DIRS", "1")
        patched.setenv("OMP_NUM_THREADS", "1")
        nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(folder)}}).execute()
    return {name: cell.outputs for name, cell in zip(CELLS, notebook.cells, strict=True)}


def shown(outputs: dict[str, list[Any]], name: str) -> dict[str, Any]:
    """Return the data of the only output of a cell, by kind."""
    (output,) = [output for output in outputs[name] if output.output_type != "stream"]
    return dict(output.data)


@pytest.mark.parametrize("name", ["rollout", "trace", "figure", "figure and pyplot"])
def test_maps_are_shown_once_as_a_picture(name: str, outputs: dict[str, list[Any]]) -> None:
    data = shown(outputs, name)
    assert set(data) == {"text/plain", "image/png"}
    picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    assert 200 < max(picture.size) <= 2400
    assert len(data["image/png"]) < 4_000_000


@pytest.mark.parametrize("name", ["agreement", "statistics"])
def test_tables_are_shown_as_html(name: str, outputs: dict[str, list[Any]]) -> None:
    data = shown(outputs, name)
    assert set(data) == {"text/plain", "text/html"}
    assert data["text/html"].startswith("<table>")


def test_an_explanation_is_a_picture_with_its_tables(outputs: dict[str, list[Any]]) -> None:
    data = shown(outputs, "explanation")
    assert set(data) == {"text/plain", "text/html", "image/png"}
    assert data["text/html"].count("<img ") == 1
    assert data["text/html"].count("<table") == 3
    assert len(data["text/html"]) < 4_000_000


def test_texts_are_short(outputs: dict[str, list[Any]]) -> None:
    texts = {
        name: output.data["text/plain"]
        for name, cell in outputs.items()
        for output in cell
        if output.output_type == "execute_result"
    }
    assert set(texts) == set(CELLS) - {"progress", "quiet"}
    assert {name for name, text in texts.items() if len(text) > 300} == set()
    assert texts["array"] == "(1, 8, 8)"


def test_progress_is_a_bar_if_it_was_asked_for(outputs: dict[str, list[Any]]) -> None:
    text = "".join(output.get("text", "") for output in outputs["progress"])
    assert "%|" in text
    assert "evaluating" in text
    assert outputs["quiet"] == []
