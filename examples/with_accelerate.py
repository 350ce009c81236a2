"""Prune a model that accelerate trains. Run: python examples/with_accelerate.py [FOLDER]

Needs accelerate. With a folder the program saves its state there after each epoch, and goes on from
there when it is started again. `accelerate launch` runs it on several devices.
"""

import math
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from pdp_kernels import PDPConfig, PDPPruner

accelerator = Accelerator(gradient_accumulation_steps=2, mixed_precision="bf16")

torch.manual_seed(0)
inputs = torch.randn(2048, 64)
labels = (inputs @ torch.randn(64, 10)).argmax(1)
loader = DataLoader(TensorDataset(inputs, labels), batch_size=64, shuffle=True)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

# The pruner takes a step after each one of the optimizer. Batches that only accumulate gradients do
# not count.
epochs = 20
network = accelerator.unwrap_model(model)
pruner = PDPPruner(network, PDPConfig.for_epochs(0.9, epochs=epochs))
pruner.attach(optimizer, math.ceil(len(loader) / accelerator.gradient_accumulation_steps), epochs)
accelerator.register_for_checkpointing(pruner)  # save_state and load_state bring it along

folder = sys.argv[1] if len(sys.argv) > 1 else None
if folder and Path(folder).exists():
    accelerator.load_state(folder)
for _ in range(round(pruner.progress), epochs):
    for batch, target in loader:
        with accelerator.accumulate(model):
            accelerator.backward(functional.cross_entropy(model(batch), target))
            optimizer.step()
            optimizer.zero_grad()
    if folder:
        accelerator.save_state(folder)

pruner.finalize()  # exact zeros from here on, for accelerator.save_model too
weights = [network[0].weight, network[2].weight]
zeros = sum(int((weight == 0).sum()) for weight in weights)
inputs, labels = inputs.to(accelerator.device), labels.to(accelerator.device)
accuracy = (network.eval()(inputs).argmax(1) == labels).float().mean()
total = sum(weight.numel() for weight in weights)
accelerator.print(f"{zeros / total:.1%} zeros, accuracy {accuracy:.1%}")
accelerator.end_training()
