"""Hide parts of an image and ask the model again: what LIME, occlusion and their kin stand on."""

from vitscope.perturb.batching import Answers as Answers
from vitscope.perturb.masked_model import MaskedModel as MaskedModel
from vitscope.perturb.masks import PixelMasks as PixelMasks
from vitscope.perturb.masks import SegmentMasks as SegmentMasks
from vitscope.perturb.segments import Segments as Segments
