"""Evaluation of models on images with hidden parts: the basis of LIME, KernelSHAP, occlusion and RISE."""

from vitscope.perturb.batching import Evaluations as Evaluations
from vitscope.perturb.masked_model import MaskedModel as MaskedModel
from vitscope.perturb.masks import PixelMasks as PixelMasks
from vitscope.perturb.masks import SegmentMasks as SegmentMasks
from vitscope.perturb.options import PerturbationArguments as PerturbationArguments
from vitscope.perturb.options import PerturbationOptions as PerturbationOptions
from vitscope.perturb.segments import Segments as Segments
