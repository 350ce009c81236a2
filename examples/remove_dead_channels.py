"""Channel pruning to the end: train, prune channels by their norms, remove them for good.

A small residual network learns scikit-learn's digits while `pdp_mask_channel` masks the channels
between the two convolutions of each block, as inputs of the second: batch norm, which comes before
it, would scale a masked output of the first up again. Torch-Pruning then cuts the dead channels
out, and the smaller network gives the outputs of the masked one.

    python examples/remove_dead_channels.py --sparsity 0.5
"""

import argparse
import copy

import torch
import torch_pruning
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from pdp_kernels import channel_report, hard_mask_channel, pdp_mask_channel


class ChannelMaskedConv2d(nn.Conv2d):
    """A convolution whose input channels are masked while it trains."""

    sparsity = 0.0
    relative_tau = 1.0

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.training:
            weight = pdp_mask_channel(weight, self.sparsity, dim=1, relative_tau=self.relative_tau)
        return self._conv_forward(x, weight, self.bias)


class Block(nn.Module):
    def __init__(self, channels: int, inside: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inside, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv2 = ChannelMaskedConv2d(inside, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.bn1(self.conv1(x)).relu()
        return (x + self.bn2(self.conv2(inside))).relu()


class SmallResNet(nn.Module):
    def __init__(self, channels: int = 32, inside: int = 64, blocks: int = 3):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1, bias=False),
                                  nn.BatchNorm2d(channels), nn.ReLU())  # fmt: skip
        self.blocks = nn.Sequential(*(Block(channels, inside) for _ in range(blocks)))
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train with, and to test with."""
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 16
    order = torch.randperm(len(images))
    train, test = order[:1400], order[1400:]
    return images[train], labels[train], images[test], labels[test]


def train(model: SmallResNet, images: Tensor, labels: Tensor, epochs: int, sparsity: float) -> None:
    """The share of masked channels rises to `sparsity` in the first half of the epochs, and the
    temperature falls from 1 to 0.01 t^2: at the end hardly a channel is half masked."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for epoch in tqdm(range(epochs), desc="training"):
        progress = (epoch + 1) / epochs
        for block in model.blocks:
            block.conv2.sparsity = sparsity * min(1, 2 * progress)
            block.conv2.relative_tau = 0.01**progress
        model.train()
        for index in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[index]), labels[index]).backward()
            optimizer.step()


@torch.no_grad()
def prune(model: SmallResNet, sparsity: float) -> None:
    for block in model.blocks:
        kept = hard_mask_channel(block.conv2.weight, sparsity, dim=1)
        block.conv2.weight *= kept.view(1, -1, 1, 1)


def remove_dead_channels(model: SmallResNet, example: Tensor) -> SmallResNet:
    """A copy of the model without its dead channels, and without the weights that make them."""
    model = copy.deepcopy(model)
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example)
    layers = dict(model.named_modules())
    for report in channel_report(model, dim=1):
        if report.dead:
            graph.get_pruning_group(
                layers[report.name], torch_pruning.prune_conv_in_channels, idxs=report.dead
            ).prune()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model.eval()(images).argmax(1) == labels).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.5, help="share of channels to prune")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    images, labels, test_images, test_labels = digits()
    model = SmallResNet()
    train(model, images, labels, arguments.epochs, arguments.sparsity)
    prune(model, arguments.sparsity)
    model.eval()
    smaller = remove_dead_channels(model, images[:1]).eval()
    with torch.no_grad():
        difference = (model(test_images) - smaller(test_images)).abs().max().item()
    for name, network in (("masked", model), ("smaller", smaller)):
        macs, weights = torch_pruning.utils.count_ops_and_params(network, images[:1])
        print(
            f"{name}: {weights:,.0f} parameters, {macs / 1e6:.2f} million multiply-adds, "
            f"accuracy {accuracy(network, test_images, test_labels):.2%}"
        )
    print(f"largest difference of their outputs: {difference:.2g}")


if __name__ == "__main__":
    main()
