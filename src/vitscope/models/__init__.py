"""Models of every library behind one face: :func:`load` makes a :class:`VisionModel`."""

from vitscope.models.loader import BUNDLED, bundled_path, load
from vitscope.models.vision_model import Layout, Prediction, VisionModel

__all__ = ["BUNDLED", "Layout", "Prediction", "VisionModel", "bundled_path", "load"]
