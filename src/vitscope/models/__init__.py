"""Models of all libraries behind one interface: :func:`load` returns a :class:`VisionModel`."""

from vitscope.models.layout import Layout
from vitscope.models.loader import BUNDLED, bundled_path, load
from vitscope.models.prediction import Prediction
from vitscope.models.vision_model import VisionModel

__all__ = ["BUNDLED", "Layout", "Prediction", "VisionModel", "bundled_path", "load"]
