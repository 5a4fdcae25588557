"""A student's walk: a notebook with attention, rollout and the windows of a Swin, whose cells show themselves."""

import base64
import io
from typing import Any

import pytest
from PIL import Image

from tests.helpers.command_line import needs_bundled

pytestmark = [pytest.mark.slow, needs_bundled]

CELLS = {
    "model": """
import numpy as np, skimage.data, vitscope as vs
photo, vit, swin = skimage.data.chelsea(), vs.load("vit-nano"), vs.load("swin-nano")
vit""",
    "predictions": "vit.predict(photo)[0][:3]",
    "trace": "trace = vs.capture(vit, photo)\ntrace",
    "head": "vs.attention_map(vit, photo, layer=-1, head=4)",
    "rollout": "rollout = vs.rollout(trace)\nrollout",
    "evolution": "vs.rollout_evolution(trace)[2]",
    "windows": "vs.window_attention(swin, photo, layer=1)",
    "swin for a class": "vs.rollout(swin, photo, target='cat')",
    "statistics": "vs.head_statistics(trace)",
    "axes": """
import matplotlib.pyplot as plt
figure, axes = plt.subplots(figsize=(3, 2))
rollout.figure(axes)
plt.close(figure)""",
    "array": "values = np.asarray(rollout)\nvalues.shape, bool(np.isclose(values.sum(), 1, atol=0.2))",
    "mistake": "vs.rollout(vit, photo, target='cat')",
}
PICTURES = ("trace", "head", "rollout", "evolution", "windows", "swin for a class")


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Return the outputs of each cell after the notebook was executed."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    folder = tmp_path_factory.mktemp("student")
    cells = [nbformat.v4.new_code_cell(cell.strip()) for cell in CELLS.values()]
    book = nbformat.v4.new_notebook(cells=cells)
    with pytest.MonkeyPatch.context() as patched:
        for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "MPLCONFIGDIR"):
            patched.setenv(name, str(folder / name.lower()))
        patched.setenv("JUPYTER_PLATFORM_DIRS", "1")
        patched.setenv("OMP_NUM_THREADS", "1")
        resources = {"metadata": {"path": str(folder)}}
        nbclient.NotebookClient(book, timeout=240, resources=resources, allow_errors=True).execute()
    return {name: cell.outputs for name, cell in zip(CELLS, book.cells, strict=True)}


def test_no_cell_prints_more_than_a_few_lines(notebook):
    for name, cell in notebook.items():
        if name == "mistake":
            continue
        outputs = [output for output in cell if "IProgress" not in output.get("text", "")]  # tqdm's hint on import
        assert {output.output_type for output in outputs} <= {"execute_result", "display_data"}, (name, outputs)
        texts = [output.data.get("text/plain", "") for output in outputs]
        assert sum(text.count("\n") + 1 for text in texts) <= 3, (name, texts)
        assert sum(map(len, texts)) <= 400, (name, texts)


@pytest.mark.parametrize("name", PICTURES)
def test_maps_are_one_picture_of_a_moderate_size(notebook, name):
    (output,) = notebook[name]
    assert "image/png" in output.data
    content = base64.b64decode(output.data["image/png"])
    assert len(content) < 2_500_000
    with Image.open(io.BytesIO(content)) as picture:
        assert 200 < picture.width <= 2400
        assert 100 < picture.height <= 2400
        colours = picture.convert("RGB").resize((64, 64)).getcolors(64 * 64)
    assert len(colours) > 200  # not black with a dot


def test_statistics_are_a_table_and_arrays_are_arrays(notebook):
    (output,) = notebook["statistics"]
    assert set(output.data) == {"text/plain", "text/html"}
    assert output.data["text/html"].count("<tr") <= 80
    assert notebook["array"][0].data["text/plain"] == "((1, 8, 8), True)"


def test_a_mistake_is_one_line_that_says_what_to_do(notebook):
    (error,) = notebook["mistake"]
    assert (error.output_type, error.ename) == ("error", "UnsupportedModelError")
    assert "\n" not in error.evalue
    assert "target" in error.evalue
