"""Parameter-free differentiable pruning (PDP, arXiv 2305.11203), nearly free of cost."""

import sys

try:
    import torch  # noqa: F401
except Exception:  # of any kind: a missing package, a library that does not load
    if sys.orig_argv[1:3] == ["-m", "pdp_kernels.info"]:
        from pdp_kernels.info import main

        main()
        sys.exit()
    raise

from pdp_kernels._build_info import build_info, warn_without_cuda_kernels
from pdp_kernels._version import __version__
from pdp_kernels.functional.allocation import global_prune_counts
from pdp_kernels.functional.compress import compress_2to4
from pdp_kernels.functional.hard_mask import hard_mask
from pdp_kernels.functional.pq_index import pq_index
from pdp_kernels.functional.sap_counts import sap_prune_counts
from pdp_kernels.functional.soft_mask import pdp_mask
from pdp_kernels.functional.soft_mask_channel import (
    channel_norms,
    hard_mask_channel,
    pdp_mask_channel,
)
from pdp_kernels.functional.soft_mask_nm import hard_mask_nm, pdp_mask_nm
from pdp_kernels.functional.threshold import pdp_threshold, pdp_thresholds
from pdp_kernels.pruning.channel_report import ChannelReport, channel_report
from pdp_kernels.pruning.config import PDPConfig
from pdp_kernels.pruning.freeze import FrozenZeros, freeze_zeros
from pdp_kernels.pruning.one_shot import prune_one_shot
from pdp_kernels.pruning.pruner import PDPPruner
from pdp_kernels.pruning.report import LayerReport, PruningReport
from pdp_kernels.pruning.sap import SAPPruner, SAPRound
from pdp_kernels.pruning.semi_structured import (
    GroupCheck,
    SemiStructuredReport,
    check_nm,
    to_semi_structured,
)
from pdp_kernels.pruning.sensitivity import SensitivityReport, sensitivity

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
    "SensitivityReport",
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
    "prune_one_shot",
    "sap_prune_counts",
    "sensitivity",
    "to_semi_structured",
]

warn_without_cuda_kernels()
del warn_without_cuda_kernels
