"""Models whose layers take their masked weights from buckets, and the operators that they run."""

import collections

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pdp_kernels import PDPConfig, PDPPruner
from tests.support.models import AT_ONCE

CONFIG = PDPConfig(0.6, scope="layer", relative_tau=0.3, **AT_ONCE)

# What a training step runs whose weights are in one bucket.
LISTS = {"soft_mask_list": 1, "soft_mask_list_backward": 1}


class Calls(TorchDispatchMode):
    """Records the operators that run, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name.removeprefix("pdp::"))
        return function(*args, **(kwargs or {}))

    def of_masks(self):
        return collections.Counter(name for name in self.names if name.startswith("soft_mask"))


def prepared(model, inputs):
    """Return the model, pruned, after the training step that finds out which layers run."""
    PDPPruner(model, CONFIG)
    outputs = model(inputs)
    outputs = sum(outputs) if isinstance(outputs, list) else outputs
    if outputs.requires_grad:
        outputs.float().sum().backward()
    model.zero_grad()
    return model


class Chain(nn.Module):
    """Layers in a row, the second of which runs as the test says."""

    def __init__(self, run=lambda layer, inputs: layer(inputs)):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.run = run

    def forward(self, inputs):
        hidden = self.layers[0](inputs).tanh()
        hidden = self.run(self.layers[1], hidden).to(inputs.dtype).tanh()
        return self.layers[2](hidden)
