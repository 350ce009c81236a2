"""Prune hidden units of an MLP and remove them. Run: python examples/remove_channels.py"""

import torch
from torch import nn
from torch.nn import functional

from pdp_kernels import PDPConfig, PDPPruner, channel_report

torch.manual_seed(0)
inputs = torch.randn(2048, 64)
labels = (inputs @ torch.randn(64, 10)).argmax(1)

first, second = nn.Linear(64, 256), nn.Linear(256, 10)
model = nn.Sequential(first, nn.ReLU(), second)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

# Half of the hidden units, masked as inputs of the second layer: then their biases cannot matter.
epochs = 10
config = PDPConfig.for_epochs(
    0.5, epochs=epochs, pattern="channel", channel_dim="input", include=["2"]
)
pruner = PDPPruner(model, config)
for epoch in range(epochs):
    batches = torch.randperm(len(inputs)).split(128)
    for number, batch in enumerate(batches, 1):
        loss = functional.cross_entropy(model(inputs[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step(epoch + number / len(batches))
pruner.finalize()

# The second layer does not read its dead inputs: drop them there, and in the first layer the rows
# that compute them. pdp_kernels.integrations.torch_pruning.remove_dead_channels(model, inputs) does
# this for whole networks, with batch norm and shortcuts, by means of Torch-Pruning.
report = next(report for report in channel_report(model, dim=1) if report.name == "2")
live = sorted(set(range(report.channels)) - set(report.dead))
small_first, small_second = nn.Linear(64, len(live)), nn.Linear(len(live), 10)
small_first.load_state_dict({"weight": first.weight[live], "bias": first.bias[live]})
small_second.load_state_dict({"weight": second.weight[:, live], "bias": second.bias})
smaller = nn.Sequential(small_first, nn.ReLU(), small_second)

torch.testing.assert_close(smaller(inputs), model(inputs))  # the same outputs
for name, network in (("pruned", model), ("smaller", smaller)):
    weights = sum(parameter.numel() for parameter in network.parameters())
    accuracy = (network(inputs).argmax(1) == labels).float().mean()
    print(f"{name}: {weights:,} parameters, accuracy {accuracy:.1%}")
