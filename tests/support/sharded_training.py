"""A small model, sharded by FSDP2 or tensor parallelism, and its training."""

import torch
from torch import nn

from pdp_kernels import PDPConfig
from tests.support.ranks import device_of
from tests.support.sharded import global_tensor

STEPS = 10
BATCH = 12  # divisible by every number of ranks
PATTERNS = {
    "unstructured": {"sparsity": 0.7},
    "channel": {"sparsity": 0.5, "pattern": "channel", "channel_norm": "rms"},
    "N:M": {"pattern": "1:2"},
}


def network(device="cpu"):
    torch.manual_seed(0)
    layers = [nn.Linear(20, 36), nn.Tanh(), nn.Linear(36, 24), nn.Tanh(), nn.Linear(24, 7)]
    return nn.Sequential(*layers).to(device)


def batches(device="cpu"):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(STEPS, BATCH, size, generator=generator).to(device) for size in (20, 7)]


def config(pattern="unstructured"):
    return PDPConfig(**PATTERNS[pattern], warmup=0.5, ramp=1.5, tau=1e-3)


def mesh_of(rank, shape, names=None):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device_of(rank).type, shape, mesh_dim_names=names)


def fully_sharded(model, mesh, **options):
    from torch.distributed.fsdp import fully_shard

    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def tensor_parallel(model, mesh):
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def sharded(model, rank, ranks, how):
    """Return the sharded model, and the index and number of the chunks this rank trains on."""
    if how == "FSDP":
        return fully_sharded(model, mesh_of(rank, (ranks,))), (rank, ranks)
    if how == "FSDP that keeps global weights after a forward":
        mesh = mesh_of(rank, (ranks,))
        return fully_sharded(model, mesh, reshard_after_forward=False), (rank, ranks)
    if how == "replicas of FSDP":
        return fully_sharded(model, mesh_of(rank, (2, ranks // 2), ("r", "s"))), (rank, ranks)
    if how == "tensor parallelism":
        return tensor_parallel(model, mesh_of(rank, (ranks,))), (0, 1)
    mesh = mesh_of(rank, (2, ranks // 2), ("data", "tensor"))
    model = tensor_parallel(model, mesh["tensor"])
    return fully_sharded(model, mesh["data"]), (rank // (ranks // 2), 2)


def train(model, pruner, optimizer, data, part=(0, 1), steps=range(STEPS), microbatches=1):
    """Train, and return the thresholds after each step."""
    thresholds = []
    for step in steps:
        inputs, targets = (each[step].chunk(part[1])[part[0]] for each in data)
        for x, y in zip(inputs.chunk(microbatches), targets.chunk(microbatches), strict=True):
            (nn.functional.mse_loss(model(x).to(y.dtype), y) / microbatches).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step((step + 1) / 4)
        thresholds.append(thresholds_of(pruner))
    return thresholds


def thresholds_of(pruner):
    return [t.cpu() for t in pruner.state_dict()["thresholds"].values()]


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def global_weights(model):
    return [global_tensor(parameter.detach()) for parameter in model.parameters()]


def outcome(model, pruner, thresholds, data):
    """Finish a training, and return everything a user can see of it."""
    model.eval()
    outputs = model(data[0][0])
    model.train()
    pruner.verify_replicas()
    reports = [pruner.report()]
    pruner.finalize()
    reports.append(pruner.report())
    return {
        "thresholds": thresholds,
        "outputs": global_tensor(outputs.detach()),
        "prune counts": pruner.prune_counts,
        "weights": global_weights(model),
        "pruned": [[layer.pruned for layer in report.layers] for report in reports],
        "soft": [layer.soft for layer in reports[0].layers],
        "flipped": [layer.flipped for layer in reports[1].layers],
        "histogram": reports[0].mask_histogram,
        "classes": [type(module).__name__ for module in model.modules()],
    }
