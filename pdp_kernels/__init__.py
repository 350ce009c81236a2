"""Parameter-free differentiable pruning (PDP, arXiv 2305.11203), nearly free of cost."""

from pdp_kernels._build_info import build_info
from pdp_kernels._version import __version__
from pdp_kernels.allocation import global_prune_counts
from pdp_kernels.compress import compress_2to4
from pdp_kernels.config import PDPConfig
from pdp_kernels.freeze import FrozenZeros, freeze_zeros
from pdp_kernels.hard_mask import hard_mask
from pdp_kernels.pq_index import pq_index
from pdp_kernels.pruner import PDPPruner
from pdp_kernels.pruning_report import LayerReport, PruningReport
from pdp_kernels.sap import SAPPruner, SAPRound, sap_prune_counts
from pdp_kernels.semi_structured import (
    GroupCheck,
    SemiStructuredReport,
    check_nm,
    to_semi_structured,
)
from pdp_kernels.soft_mask import pdp_mask
from pdp_kernels.soft_mask_channel import (
    ChannelReport,
    channel_norms,
    channel_report,
    hard_mask_channel,
    pdp_mask_channel,
)
from pdp_kernels.soft_mask_nm import hard_mask_nm, pdp_mask_nm
from pdp_kernels.threshold import pdp_threshold, pdp_thresholds

__all__ = [
    "ChannelReport",
    "FrozenZeros",
    "GroupCheck",
    "LayerReport",
    "PDPConfig",
    "PDPPruner",
    "PruningReport",
    "SAPPruner",
    "SAPRound",
    "SemiStructuredReport",
    "__version__",
    "build_info",
    "channel_norms",
    "channel_report",
    "check_nm",
    "compress_2to4",
    "freeze_zeros",
    "global_prune_counts",
    "hard_mask",
    "hard_mask_channel",
    "hard_mask_nm",
    "pdp_mask",
    "pdp_mask_channel",
    "pdp_mask_nm",
    "pdp_threshold",
    "pdp_thresholds",
    "pq_index",
    "sap_prune_counts",
    "to_semi_structured",
]
