"""Small models, and how the tests of pruners train it."""

import torch
from torch import nn
from torch.nn import functional

from pdp_kernels import PDPConfig, PDPPruner

AT_ONCE = {"warmup": 0, "ramp": 0}
CONFIG = PDPConfig(sparsity=0.8, scope="layer", warmup=0, ramp=4)


def mlp(dtype=torch.float32, device="cpu"):
    return nn.Sequential(
        nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8)
    ).to(device, dtype)


def weights_of(model):
    return [weight for weight in model.parameters() if weight.dim() >= 2]


def zeros_of(model):
    return [int((weight == 0).sum()) for weight in weights_of(model)]


def train(model, pruner, progresses, optimizer=None, seed=1):
    """Take a step of training before each step of the pruner."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    weight = next(model.parameters())
    model.train()
    for progress in progresses:
        inputs = torch.randn(16, 24, generator=generator).to(weight)
        targets = torch.randn(16, 8, generator=generator).to(weight)
        functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step(progress)


def lbfgs_training(line_search):
    """Return a model, an LBFGS optimizer of it, and the closure of its loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8))
    inputs = torch.randn(64, 8)
    labels = torch.sin(inputs @ torch.randn(8, 8))
    optimizer = torch.optim.LBFGS(
        model.parameters(), 1 if line_search else 0.1, max_iter=10, line_search_fn=line_search
    )

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), labels)
        loss.backward()
        return loss

    return model, optimizer, closure


def two_layers():
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8))


def two_pruned_layers(sparsity=0.7):
    model = two_layers()
    return model, PDPPruner(model, PDPConfig(sparsity, **AT_ONCE))


def outputs(model, inputs):
    """Return the outputs in training mode and in evaluation mode."""
    return [model.train(training)(inputs) for training in (True, False)]


def small_model():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def train_to_the_end(pruner):
    """Train the pruner's model, step by step, and return the fraction of zeros in its weights."""
    model = pruner.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(8):
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step((step + 1) / 2)
    pruner.finalize()
    weights = [model[0].weight, model[2].weight]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(w.numel() for w in weights)


def take_steps(model, optimizer, steps=3):
    """Take steps of training a model with 64 inputs, without a pruner of their own."""
    for _ in range(steps):
        (model(torch.randn(16, 64)) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
