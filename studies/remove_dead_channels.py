"""Train a residual network, prune its channels by their norms, and remove them.

    python -m studies.remove_dead_channels --sparsity 0.5

The network learns scikit-learn's digits. `pdp_mask_channel` masks the channels between the two
convolutions of each block as inputs of the second one: the batch norm in between would rescale
masked outputs of the first. `remove_dead_channels` then makes the network smaller. It gives the
same outputs as the masked one.
"""

import argparse
import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from pdp_kernels import hard_mask_channel, pdp_mask_channel
from pdp_kernels.integrations.torch_pruning import remove_dead_channels
from studies.data import Images, digits
from studies.networks import ResidualBlock, residual_network


class ChannelMask(nn.Module):
    """Maps a weight to the one with softly masked input channels."""

    sparsity = 0.0
    relative_tau = 1.0

    def forward(self, weight: Tensor) -> Tensor:
        return pdp_mask_channel(weight, self.sparsity, dim=1, relative_tau=self.relative_tau)


def masked_convolutions(model: nn.Module) -> list[nn.Conv2d]:
    """Return the convolutions whose input channels are pruned."""
    return [block.conv2 for block in model.modules() if isinstance(block, ResidualBlock)]


def train(model: nn.Module, data: Images, epochs: int, sparsity: float) -> None:
    """Train with masked channels, and leave the plain weights of the dense network.

    The sparsity rises in the first half of the epochs. The relative temperature falls from 1 to
    0.01, so that hardly a mask value lies between 0 and 1 in the end.
    """
    masks = [ChannelMask() for _ in masked_convolutions(model)]
    for layer, mask in zip(masked_convolutions(model), masks, strict=True):
        parametrize.register_parametrization(layer, "weight", mask)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    model.train()
    for epoch in tqdm(range(epochs), desc="training"):
        progress = (epoch + 1) / epochs
        for mask in masks:
            mask.sparsity = sparsity * min(1, 2 * progress)
            mask.relative_tau = 0.01**progress
        for index in torch.randperm(len(data.train_inputs)).split(64):
            optimizer.zero_grad()
            outputs = model(data.train_inputs[index])
            nn.functional.cross_entropy(outputs, data.train_labels[index]).backward()
            optimizer.step()
    for layer in masked_convolutions(model):
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


@torch.no_grad()
def prune(model: nn.Module, sparsity: float) -> None:
    """Set the input channels with the smallest norms to 0."""
    for layer in masked_convolutions(model):
        kept = hard_mask_channel(layer.weight, sparsity, dim=1)
        layer.weight *= kept.view(1, -1, 1, 1)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model(images).argmax(1) == labels).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sparsity", type=float, default=0.5, help="fraction of channels to prune")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    data = digits()
    model = residual_network(1, [(32, 64, 32)] * 3)
    train(model, data, arguments.epochs, arguments.sparsity)
    prune(model, arguments.sparsity)
    model.eval()
    smaller = copy.deepcopy(model)
    removal = remove_dead_channels(smaller, data.test_inputs[:1])
    with torch.no_grad():
        difference = (model(data.test_inputs) - smaller(data.test_inputs)).abs().max().item()
    sizes = (
        ("masked", model, removal.parameters_before, removal.macs_before),
        ("smaller", smaller, removal.parameters_after, removal.macs_after),
    )
    for name, network, parameters, macs in sizes:
        print(
            f"{name}: {parameters:,} parameters, {macs / 1e6:.2f} million multiply-accumulates, "
            f"accuracy {accuracy(network, data.test_inputs, data.test_labels):.2%}"
        )
    print(f"largest difference of their outputs: {difference:.2g}")


if __name__ == "__main__":
    main()
