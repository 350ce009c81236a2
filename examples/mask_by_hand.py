"""Prune a layer of your own with the soft mask. Run: python examples/mask_by_hand.py"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from pdp_kernels import hard_mask, pdp_mask, pdp_threshold


class PrunedLinear(nn.Linear):
    """A linear layer that computes with its masked weight."""

    threshold: Tensor

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        # A buffer moves with the layer to another device. The threshold -inf prunes nothing.
        self.register_buffer("threshold", torch.tensor(-torch.inf))

    def forward(self, input: Tensor) -> Tensor:
        # One pass over the weight here, and one in backward. The temperature follows the
        # threshold, so that it fits a layer of any scale.
        w_hat = pdp_mask(self.weight, threshold=self.threshold, relative_tau=0.1)
        return functional.linear(input, w_hat, self.bias)


torch.manual_seed(0)
inputs = torch.randn(1024, 64)
labels = (inputs @ torch.randn(64, 10)).argmax(1)

layer = PrunedLinear(64, 256)
model = nn.Sequential(layer, nn.ReLU(), nn.Linear(256, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

steps = 300
for step in range(steps):
    loss = functional.cross_entropy(model(inputs), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    # The sparsity grows to 90% in the first half of the training. The threshold is exact; for many
    # layers, pdp_thresholds finds all of them in one call.
    layer.threshold = pdp_threshold(layer.weight, 0.9 * min(1, 2 * step / steps))

# Train with the soft mask, deploy with the hard one: exactly 90% zeros in a plain weight.
weight = layer.weight.detach() * hard_mask(layer.weight, 0.9)
plain = nn.Linear(64, 256)
plain.load_state_dict({"weight": weight, "bias": layer.bias.detach()})
model[0] = plain

accuracy = (model(inputs).argmax(1) == labels).float().mean()
print(f"{(weight == 0).float().mean():.1%} zeros, accuracy {accuracy:.1%}")
