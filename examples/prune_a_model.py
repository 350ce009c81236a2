"""Prune a whole model while it trains. Run: python examples/prune_a_model.py"""

import torch
from torch import nn
from torch.nn import functional

from pdp_kernels import PDPConfig, PDPPruner

torch.manual_seed(0)
inputs = torch.randn(2048, 64)
labels = (inputs @ torch.randn(64, 10)).argmax(1)

layers = [nn.Linear(64, 256), nn.Linear(256, 256), nn.Linear(256, 10)]
model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

# 90% of the weights of all layers together; the last layer stays dense. Warm-up, ramp and
# temperature are the recommended ones for this number of epochs.
epochs = 20
config = PDPConfig.for_epochs(0.9, epochs=epochs, exclude=["4"])
pruner = PDPPruner(model, config)

for epoch in range(epochs):
    batches = torch.randperm(len(inputs)).split(128)
    for number, batch in enumerate(batches, 1):
        loss = functional.cross_entropy(model(inputs[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # Updates the thresholds of all layers. Progress is in epochs.
        pruner.step(epoch + number / len(batches))

# Layers compute with soft masks in training mode, and with the exact hard masks in evaluation mode.
print(pruner.report())

# Now the weights themselves are pruned, and the layers are what they were before.
pruner.finalize()
pruned = [layer.weight for layer in layers[:2]]
zeros = sum(int((weight == 0).sum()) for weight in pruned)
accuracy = (model.eval()(inputs).argmax(1) == labels).float().mean()
print(f"{zeros / sum(w.numel() for w in pruned):.1%} zeros, accuracy {accuracy:.1%}")

# To train the pruned model further, keep the zeros at zero.
pruner.freeze(optimizer)
functional.cross_entropy(model.train()(inputs), labels).backward()
optimizer.step()
assert zeros == sum(int((weight == 0).sum()) for weight in pruned)
