"""See what a vision transformer looks at: exactly, in any library, at any size.

Importing this package loads neither torch nor transformers; the first use of a name does.
"""

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "load": "vitscope.models",
    "VisionModel": "vitscope.models",
    "Layout": "vitscope.models",
    "Prediction": "vitscope.models",
    "capture": "vitscope.run",
    "check": "vitscope.check",
    "Trace": "vitscope.trace",
    "AttentionStep": "vitscope.trace",
    "MergeStep": "vitscope.merging",
    "Grid": "vitscope.grid",
    "Picture": "vitscope.picture",
    "Attribution": "vitscope.attribution",
    "attention_map": "vitscope.methods.attention_map",
    "rollout": "vitscope.methods.rollout",
    "rollout_evolution": "vitscope.methods.rollout",
    "head_statistics": "vitscope.methods.head_statistics",
    "lime": "vitscope.methods.lime",
    "kernel_shap": "vitscope.methods.kernel_shap",
    "occlusion": "vitscope.methods.occlusion",
    "rise": "vitscope.methods.rise",
    "agreement": "vitscope.methods.agreement",
    "Agreement": "vitscope.methods.agreement",
    "SegmentAttribution": "vitscope.segment_attribution",
    "compose": "vitscope.composites.composing",
    "effects": "vitscope.composites.effects",
    "Effect": "vitscope.composites.effects",
    "by_example": "vitscope.models.by_example",
    "Composition": "vitscope.composites.composition",
    "Composite": "vitscope.composites.stage",
    "Placement": "vitscope.composites.stage",
    "outline": "vitscope.composites.outlines",
    "Outline": "vitscope.composites.outlines",
    "window_attention": "vitscope.methods.window_attention",
    "window_cls": "vitscope.methods.window_cls",
    "WindowCls": "vitscope.methods.window_cls",
    "WindowHead": "vitscope.methods.window_head",
    "finetune": "vitscope.tune.finetuning",
    "Tuned": "vitscope.tune.runs",
    "load_data": "vitscope.tune.data",
    "Data": "vitscope.tune.data",
    "inspect": "vitscope.tune.inspecting",
    "Recipe": "vitscope.tune.recipe",
    "compare": "vitscope.tune.comparing",
    "Comparison": "vitscope.tune.comparing",
    "attention_change": "vitscope.tune.attention_change",
    "AttentionChange": "vitscope.tune.attention_change",
    "faithfulness": "vitscope.methods.faithfulness",
    "Faithfulness": "vitscope.methods.faithfulness",
    "HeadStatistics": "vitscope.methods.head_statistics",
    "VitscopeError": "vitscope.errors",
    "CallError": "vitscope.errors",
    "VitscopeWarning": "vitscope.errors",
    "WorkError": "vitscope.errors",
    "UnsupportedModelError": "vitscope.errors",
}

if TYPE_CHECKING:
    from vitscope.attribution import Attribution as Attribution
    from vitscope.check import check as check
    from vitscope.composites.composing import compose as compose
    from vitscope.composites.composition import Composition as Composition
    from vitscope.composites.effects import Effect as Effect
    from vitscope.composites.effects import effects as effects
    from vitscope.composites.outlines import Outline as Outline
    from vitscope.composites.outlines import outline as outline
    from vitscope.composites.stage import Composite as Composite
    from vitscope.composites.stage import Placement as Placement
    from vitscope.errors import CallError as CallError
    from vitscope.errors import UnsupportedModelError as UnsupportedModelError
    from vitscope.errors import VitscopeError as VitscopeError
    from vitscope.errors import VitscopeWarning as VitscopeWarning
    from vitscope.errors import WorkError as WorkError
    from vitscope.grid import Grid as Grid
    from vitscope.merging import MergeStep as MergeStep
    from vitscope.methods.agreement import Agreement as Agreement
    from vitscope.methods.agreement import agreement as agreement
    from vitscope.methods.attention_map import attention_map as attention_map
    from vitscope.methods.faithfulness import Faithfulness as Faithfulness
    from vitscope.methods.faithfulness import faithfulness as faithfulness
    from vitscope.methods.head_statistics import HeadStatistics as HeadStatistics
    from vitscope.methods.head_statistics import head_statistics as head_statistics
    from vitscope.methods.kernel_shap import kernel_shap as kernel_shap
    from vitscope.methods.lime import lime as lime
    from vitscope.methods.occlusion import occlusion as occlusion
    from vitscope.methods.rise import rise as rise
    from vitscope.methods.rollout import rollout as rollout
    from vitscope.methods.rollout import rollout_evolution as rollout_evolution
    from vitscope.methods.window_attention import window_attention as window_attention
    from vitscope.methods.window_cls import WindowCls as WindowCls
    from vitscope.methods.window_cls import window_cls as window_cls
    from vitscope.methods.window_head import WindowHead as WindowHead
    from vitscope.models import Layout as Layout
    from vitscope.models import Prediction as Prediction
    from vitscope.models import VisionModel as VisionModel
    from vitscope.models import load as load
    from vitscope.models.by_example import by_example as by_example
    from vitscope.picture import Picture as Picture
    from vitscope.run import capture as capture
    from vitscope.segment_attribution import SegmentAttribution as SegmentAttribution
    from vitscope.trace import AttentionStep as AttentionStep
    from vitscope.trace import Trace as Trace
    from vitscope.tune.attention_change import AttentionChange as AttentionChange
    from vitscope.tune.attention_change import attention_change as attention_change
    from vitscope.tune.comparing import Comparison as Comparison
    from vitscope.tune.comparing import compare as compare
    from vitscope.tune.data import Data as Data
    from vitscope.tune.data import load_data as load_data
    from vitscope.tune.finetuning import finetune as finetune
    from vitscope.tune.inspecting import inspect as inspect
    from vitscope.tune.recipe import Recipe as Recipe
    from vitscope.tune.runs import Tuned as Tuned

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("vitscope")
    if name not in _HOME:
        raise AttributeError(f"module 'vitscope' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
