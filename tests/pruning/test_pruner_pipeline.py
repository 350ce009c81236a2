"""In pipeline parallelism each stage is pruned by its own pruner as one process prunes it."""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleavedZeroBubble,
)

from pdp_kernels import PDPConfig, PDPPruner
from tests.support.ranks import results_on_ranks

RANKS = 2
STEPS = 8
MICROBATCHES = 4
SIZES = (12, 16, 16, 16, 1)  # one layer a stage, or two
CONFIG = PDPConfig(0.7, scope="layer", warmup=0, ramp=1)


def stages(count):
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(*sizes), nn.Tanh()).double() for sizes in pairwise(SIZES)]
    size = len(layers) // count
    return [nn.Sequential(*layers[size * i : size * (i + 1)]) for i in range(count)]


def batches():
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(STEPS, 8, size, generator=generator, dtype=torch.float64)
        for size in (SIZES[0], SIZES[-1])
    ]


def train(modules, forward_and_backward):
    """Train and prune these stages, and return their weights."""
    pruners = [PDPPruner(module, CONFIG) for module in modules]
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in modules]
    for step in range(STEPS):
        forward_and_backward(step)
        for optimizer, pruner in zip(optimizers, pruners, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            pruner.step((step + 1) / STEPS)
    for pruner in pruners:
        pruner.finalize()
    return [[weight.detach() for weight in module.parameters()] for module in modules]


def train_stages(rank, schedule, per_rank):
    count = RANKS * per_rank
    mine = range(rank, count, RANKS)
    inputs, targets = batches()
    modules = stages(count)
    example = inputs[0].chunk(MICROBATCHES)[0]
    shapes = [example]  # what each stage takes, and what the last one returns
    for module in modules:
        shapes.append(module(shapes[-1]).detach())
    pipeline = [
        PipelineStage(
            modules[i],
            i,
            count,
            torch.device("cpu"),
            input_args=(shapes[i],),
            output_args=shapes[i + 1],
        )
        for i in mine
    ]
    run = schedule(
        pipeline if per_rank > 1 else pipeline[0], MICROBATCHES, loss_fn=nn.functional.mse_loss
    )

    def forward_and_backward(step):
        args = (inputs[step],) if rank == 0 else ()
        run.step(*args, target=targets[step] if rank == RANKS - 1 else None)

    trained = train([modules[i] for i in mine], forward_and_backward)
    by_rank = [None] * RANKS
    dist.all_gather_object(by_rank, dict(zip(mine, trained, strict=True)))
    return {stage: weights for each in by_rank for stage, weights in each.items()}


@pytest.mark.parametrize(
    ("schedule", "per_rank"), [(Schedule1F1B, 1), (ScheduleInterleavedZeroBubble, 2)]
)
def test_the_stages_of_a_pipeline_are_pruned_as_one_process_prunes_them(schedule, per_rank):
    found, _ = results_on_ranks(train_stages, RANKS, schedule, per_rank)
    inputs, targets = batches()
    modules = stages(RANKS * per_rank)
    model = nn.Sequential(*modules)

    def forward_and_backward(step):
        nn.functional.mse_loss(model(inputs[step]), targets[step]).backward()

    expected = train(modules, forward_and_backward)
    for stage, weights in enumerate(expected):
        for weight, other in zip(weights, found[stage], strict=True):
            torch.testing.assert_close(other, weight, rtol=1e-9, atol=1e-12)
            assert torch.equal(other == 0, weight == 0)
