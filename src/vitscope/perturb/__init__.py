"""Hide parts of a picture and ask the model again: what LIME, occlusion and their kin stand on."""

from vitscope.perturb.batching import Answers as Answers
from vitscope.perturb.masked_model import Inquiry as Inquiry
from vitscope.perturb.masks import PixelMasks as PixelMasks
from vitscope.perturb.masks import SegmentMasks as SegmentMasks
from vitscope.perturb.segments import Segments as Segments
