"""PDPCallback prunes the same weights on every rank, replicated or sharded, and resumes there."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from tests.support.lightning_modules import (
    EPOCHS,
    ZEROS,
    Ranks,
    Regression,
    fit,
    pl,
    weights_of,
)
from tests.support.ranks import results_on_ranks
from tests.support.sharded import global_tensor

pytestmark = pytest.mark.slow  # each rank imports Lightning


class OfRank(Regression):
    """A module with other batches on each rank."""

    def loss(self, step):
        return super().loss(2 * step + torch.distributed.get_rank())


class Sharded(OfRank):
    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.net[0], self.net[2], self.net):
            fully_shard(layer, mesh=mesh)


def strategy_of(rank, module):
    environment = Ranks(rank)
    if not isinstance(module, Sharded):
        return pl.strategies.DDPStrategy(cluster_environment=environment)
    strategy = pl.strategies.ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    strategy.cluster_environment = environment
    return strategy


def fit_on_rank(rank, folder, kind):
    """Fit a module and one that resumes after three epochs; return weights and progress of both."""
    saver = pl.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    results = []
    for seed, savers, path in ((0, [saver], None), (1, [], folder / "epoch=2.ckpt")):
        module = kind(seed)
        pruning, progress = fit(
            folder,
            module,
            *savers,
            ckpt_path=path,
            strategy=strategy_of(rank, module),
            devices=2,
        )
        weights = {name: global_tensor(weight) for name, weight in weights_of(module).items()}
        results.append((weights, progress, pruning.pruner.prune_counts))
    return results


@pytest.mark.parametrize("kind", [OfRank, Sharded])
def test_two_ranks_prune_the_same_weights_and_resume(tmp_path, kind):
    first, second = results_on_ranks(fit_on_rank, 2, tmp_path, kind)
    for (weights, progress, counts), (others, other_progress, other_counts) in zip(
        first, second, strict=True
    ):
        assert counts == other_counts
        assert progress == other_progress
        assert progress[-1] == EPOCHS
        assert sum(int((weight == 0).sum()) for weight in weights.values()) == ZEROS
        for name, weight in weights.items():
            assert torch.equal(weight, others[name])
            assert torch.equal(weight, first[0][0][name])
