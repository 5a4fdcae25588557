"""Every method that maps an image to an :class:`Attribution`, by name: the command line reads this table."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from vitscope.methods.attention_map import attention_map
from vitscope.methods.kernel_shap import kernel_shap
from vitscope.methods.lime import lime
from vitscope.methods.occlusion import occlusion
from vitscope.methods.rise import rise
from vitscope.methods.rollout import rollout


@dataclass(frozen=True)
class Method:
    """One technique.

    Attributes:
        compute: (model, images, **options) → result.
        kind: ``"reading"`` looks at one run, ``"asking"`` runs the model many times.
        source: who found it.
        about: what it shows, in a few words.
        forwards: how often the model runs with default options.
    """

    compute: Callable[..., Any]
    kind: Literal["reading", "asking"]
    source: str
    about: str
    forwards: str = "1"


METHODS: dict[str, Method] = {
    "attention": Method(attention_map, "reading", "Dosovitskiy et al., 2020", "what the last block looks at"),
    "rollout": Method(rollout, "reading", "Abnar & Zuidema, 2020", "what reaches the readout through all blocks"),
    "lime": Method(lime, "asking", "Ribeiro et al., 2016", "what each segment adds to a class, linearly", "1,000"),
    "kernel_shap": Method(kernel_shap, "asking", "Lundberg & Lee, 2017", "each segment's fair share", "2,050"),
    "occlusion": Method(occlusion, "asking", "Zeiler & Fergus, 2014", "what is lost without each patch", "one a patch"),
    "rise": Method(rise, "asking", "Petsiuk et al., 2018", "places that go with a high answer", "4,000"),
}
