"""The recommended settings of a training, by what it prunes and where it starts.

The page on studies has the trainings that chose them.
"""

from typing import NamedTuple

RELATIVE_TAU = (1.0, 0.02)  # at the end of the warm-up, and of the training
GROUP_GRADIENT_TAU = 1.0  # of N:M groups
# Channels gather at the threshold, where a mask of 1/2 serves them well as long as it is soft. Only
# a mask that is much sharper in the end leaves them on one side or the other.
CHANNEL_RELATIVE_TAU = (0.3, 0.0001)
# The least density of a layer under a global budget, as a fraction of the average one. In the
# studies no layer that trained well came near a tenth, and one whose weights are small was not
# emptied (studies/results/allocation).
LEAST_DENSITY = 0.1
FINETUNING_LEAST_DENSITY = 0.5


class Recommended(NamedTuple):
    """Recommended fields of a configuration.

    Attributes:
        warmup: epochs before pruning starts, as a fraction of the training.
        ramp: epochs in which the sparsity grows, as a fraction of the training.
        relative_tau: as in `PDPConfig`; None is its default.
        gradient_tau: as in `PDPConfig`; None is its default.
    """

    warmup: float
    ramp: float
    relative_tau: tuple[float, float] | None = None
    gradient_tau: float | None = None


FROM_SCRATCH = Recommended(0.15, 0.4)
# Groups are better decided late: half of the weights of each lie next to its threshold, and few of
# those that are pruned early come back. Groups that lose more than half take sharper masks.
GROUPS_FROM_SCRATCH = Recommended(0.35, 0.2)
SPARSE_GROUPS_FROM_SCRATCH = Recommended(0.35, 0.2, (0.3, 0.005), 0.3)
FINETUNING = Recommended(0.0, 0.6)
# The magnitudes of a trained network decide its groups well, and at once. Eq. 2 of a sharp mask
# keeps them decided. Where more than half of a group goes, its pruned weights must go on learning.
GROUPS_FINETUNING = Recommended(0.0, 0.0, (0.3, 0.005), 0.0)
SPARSE_GROUPS_FINETUNING = GROUPS_FINETUNING._replace(gradient_tau=0.3)
