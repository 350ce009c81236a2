"""The networks that studies and benchmarks train."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional


def mlp(*widths: int) -> nn.Sequential:
    """Return an MLP on flattened inputs, with ReLU between its linear layers.

    784, 300, 100, 10 is LeNet-300-100 of LeCun et al. (1998).
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def with_small_head(network: nn.Sequential) -> nn.Sequential:
    """Return the network with a new last layer of small weights, as fine-tuning starts with."""
    head = network[-1]
    assert isinstance(head, nn.Linear)
    nn.init.normal_(head.weight, std=0.005)
    nn.init.zeros_(head.bias)
    return network


def lenet(channels: int, size: int) -> nn.Sequential:
    """Return LeNet-5 for images of size x size, with the widths that pruning papers use.

    They are those of Caffe's example: 20-50-500-10.
    """
    end = ((size - 4) // 2 - 4) // 2
    return nn.Sequential(
        nn.Conv2d(channels, 20, 5),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(50 * end * end, 500),
        nn.ReLU(),
        nn.Linear(500, 10),
    )


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> list[nn.Module]:
    """Return a convolution without bias and its batch norm."""
    layer = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return [layer, nn.BatchNorm2d(outputs)]


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions. The shortcut drops pixels and appends channels of zeros."""

    def __init__(self, inputs: int, hidden: int, outputs: int):
        super().__init__()
        self.stride = outputs // inputs
        self.conv1, self.bn1 = convolution(inputs, hidden, 3, self.stride)
        self.conv2, self.bn2 = convolution(hidden, outputs, 3)
        self.new_channels = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.new_channels:
            half = self.new_channels // 2
            x = x[:, :, :: self.stride, :: self.stride]
            x = functional.pad(x, (0, 0, 0, 0, half, self.new_channels - half))
        return (x + residual).relu()


def residual_network(channels: int, blocks: Sequence[tuple[int, int, int]]) -> nn.Sequential:
    """Return a residual classifier of images of any size into 10 classes.

    Args:
        channels: Channels of an image.
        blocks: Input, hidden and output channels of each residual block.
    """
    return nn.Sequential(
        *convolution(channels, blocks[0][0], 3),
        nn.ReLU(),
        *(ResidualBlock(*block) for block in blocks),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(blocks[-1][2], 10),
    )


def resnet20(channels: int) -> nn.Sequential:
    """Return the CIFAR ResNet with n = 3 and shortcuts without parameters.

    He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385, section 4.2.
    """
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    model = residual_network(channels, [(a, b, b) for a, b in pairwise(widths)])
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    return model


class Bottleneck(nn.Module):
    """A block of ResNet-50: 1 x 1, 3 x 3 with the stride, 1 x 1, and the shortcut."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            *convolution(inputs, width, 1),
            nn.ReLU(inplace=True),
            *convolution(width, width, 3, stride),
            nn.ReLU(inplace=True),
            *convolution(width, outputs, 1),
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Sequential(*([] if same else convolution(inputs, outputs, 1, stride)))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.shortcut(x))


def resnet50() -> nn.Sequential:
    """Return ResNet-50 in channels_last, with strides where torchvision has them."""
    blocks, inputs = [], 64
    for stage, (width, count) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(count):
            blocks.append(Bottleneck(inputs, width, 2 if block == 0 and stage > 0 else 1))
            inputs = 4 * width
    stem = [*convolution(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000)]
    return nn.Sequential(*stem, *blocks, *head).to(memory_format=torch.channels_last)


class AttentionBlock(nn.Module):
    """Causal self-attention and an MLP, each after a layer norm and added to its input."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.expand = nn.Linear(width, 4 * width, bias=False)
        self.contract = nn.Linear(4 * width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        joint = self.queries_keys_values(self.norm1(x)).view(batch, length, 3, self.heads, -1)
        queries, keys, values = joint.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(
            queries,
            keys,
            values,
            dropout_p=self.dropout.p if self.training else 0.0,
            is_causal=True,
        )
        attended = attended.transpose(1, 2).reshape(batch, length, width)
        x = x + self.dropout(self.projection(attended))
        return x + self.dropout(self.contract(functional.gelu(self.expand(self.norm2(x)))))


class GPT(nn.Module):
    """nanoGPT's model without biases.

    Args:
        vocabulary: Number of tokens.
        context: Longest sequence.
        layers: Number of blocks.
        heads: Attention heads of a block.
        width: Size of an embedding.
        dropout: Probability.
        tied: Whether the head shares the weight of the token embedding.
    """

    def __init__(
        self,
        vocabulary: int,
        context: int,
        layers: int,
        heads: int,
        width: int,
        dropout: float = 0.0,
        tied: bool = True,
    ):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(AttentionBlock(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                # As in GPT-2, what is added to the residual stream starts smaller.
                last = name.endswith(("projection.weight", "contract.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * layers) ** 0.5 if last else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.tokens(tokens) + self.positions(positions))
        return self.head(self.norm(self.blocks(x)))


def character_gpt() -> GPT:
    """Return nanoGPT's character model, untied: 10.6 million weights in Linear layers."""
    return GPT(vocabulary=65, context=256, layers=6, heads=6, width=384, tied=False)


def gpt2() -> GPT:
    """Return GPT-2 124M, untied: 123.5 million weights in Linear layers."""
    return GPT(vocabulary=50257, context=1024, layers=12, heads=12, width=768, tied=False)
