"""Parameter-free differentiable pruning (PDP, arXiv 2305.11203), nearly free of cost."""

from pdp_kernels._build_info import build_info
from pdp_kernels._version import __version__
from pdp_kernels.hard_mask import hard_mask
from pdp_kernels.soft_mask import pdp_mask
from pdp_kernels.threshold import pdp_threshold, pdp_thresholds

__all__ = [
    "__version__",
    "build_info",
    "hard_mask",
    "pdp_mask",
    "pdp_threshold",
    "pdp_thresholds",
]
