"""The figures and the tables of fine-tuning, registered with :mod:`vitscope.views.results`."""

from vitscope.tune.attention_change import AttentionChange
from vitscope.tune.comparison_result import Comparison
from vitscope.tune.leakage import DataCheck
from vitscope.tune.run_folder import Tuned
from vitscope.views.comparison_page import SUMMARY_HEADER, summary_rows
from vitscope.views.dispatch import refuse_index, scene_of, table_of
from vitscope.views.html_table import html_table
from vitscope.views.scene import Curves, Row, Scene
from vitscope.views.tuning import accuracy_scene, data_scene, run_scene


@scene_of.register
def _(result: AttentionChange, index: int | None) -> Scene:
    refuse_index(result, index)
    curves = Curves(
        [""],
        [list(range(1, len(result.distances) + 1))],
        [list(result.distances)],
        "total variation between the attention before and after",
        "layer, counted from 1",
        counted=True,
    )
    return Scene([Row([curves], 1)], "Change of attention by tuning", "0: identical, 1: disjoint", caption="")


@scene_of.register
def _(result: Tuned, index: int | None) -> Scene:
    refuse_index(result, index)
    return run_scene(result)


@scene_of.register
def _(result: Comparison, index: int | None) -> Scene:
    refuse_index(result, index)
    return accuracy_scene(result)


@scene_of.register
def _(result: DataCheck, index: int | None) -> Scene:
    refuse_index(result, index)
    return data_scene(result)


@table_of.register
def _(result: Comparison) -> str:
    return html_table(SUMMARY_HEADER, summary_rows(result), f"Fine-tuning on {result.data}")
