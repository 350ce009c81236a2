"""Prune a model whose weights are sharded over several devices. Run:

    torchrun --standalone --nproc-per-node 2 examples/several_devices.py

Processes use one GPU each, or share the CPU.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from pdp_kernels import PDPConfig, PDPPruner

device = "cuda" if torch.cuda.is_available() else "cpu"
ranks = int(os.environ["WORLD_SIZE"])
mesh = init_device_mesh(device, (ranks,))  # starts NCCL or gloo, and selects this process's GPU
rank = mesh.get_rank()

torch.manual_seed(0)  # the same weights and the same task on every rank
task = torch.randn(64, 8, device=device)
model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 8)).to(device)
fully_shard(model, mesh=mesh)

# From here on everything is as on one device. Thresholds and budget are those of the global
# weights; only counts travel between the ranks, never weights.
epochs, steps = 10, 10
pruner = PDPPruner(model, PDPConfig.for_epochs(0.9, epochs=epochs))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

torch.manual_seed(1 + rank)  # other batches on every rank
for step in range(epochs * steps):
    inputs = torch.randn(64, 64, device=device)
    loss = functional.cross_entropy(model(inputs), (inputs @ task).argmax(1))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    pruner.step((step + 1) / steps)
pruner.finalize()

report = pruner.report()  # of the global weights, so every rank takes part
if rank == 0:
    print(report, flush=True)

dist.destroy_process_group()
if device == "cpu":
    # gloo's threads release the last tensors a moment later, and Python before 3.14 aborts if it is
    # shutting down by then. This leaves without waiting for them.
    os._exit(0)
