"""Train an image classifier with one pruning method, or dense.

    python -m studies.train_image --network mlp --method pdp --sparsity 0.98 --data-dir DIR
    python -m studies.train_image --network resnet20 --method gmp --data-dir DIR
    python -m studies.train_image --network lenet        # on scikit-learn's digits

With --data-dir the MLP (784-300-100-10) and LeNet-5 learn MNIST: four *-ubyte.gz files, in the
folder or its subfolder mnist or MNIST/raw. ResNet-20 learns CIFAR-10: cifar10-jpeg.tar.xz, or the
folder cifar10 that it holds. The program writes checkpoint.pt, log.csv, log.png and model.pt, the
weights of the finished network.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from studies import data
from studies.command_line import add_common_arguments, run
from studies.data import Images
from studies.networks import lenet, mlp, resnet20, with_small_head
from studies.training import Recipe

# By name, for a number of channels and a size of images.
NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "mlp": lambda channels, size: mlp(channels * size * size, 300, 100, 10),
    "mlp-small-head": lambda channels, size: with_small_head(
        mlp(channels * size * size, 300, 100, 10)
    ),
    "lenet": lenet,
    "resnet20": lambda channels, size: resnet20(channels).to(memory_format=torch.channels_last),
}
RECIPES = {
    "mlp": Recipe(epochs=20, batch=128, lr=0.1, weight_decay=5e-4),
    "mlp-small-head": Recipe(epochs=20, batch=128, lr=0.1, weight_decay=5e-4),
    "lenet": Recipe(epochs=20, batch=128, lr=0.05, weight_decay=5e-4),
    "resnet20": Recipe(
        epochs=100, batch=128, lr=0.1, weight_decay=5e-4, nesterov=True, bfloat16=("cpu", "cuda")
    ),
}
# Globs of the layers whose channels can be pruned: those that no shortcut adds to others.
NARROWED = {"mlp": ("1", "3"), "lenet": ("0", "2", "5"), "resnet20": ("*.conv1",)}
CROP_PADDING = 4  # pixels, as in the ResNet paper's training on CIFAR-10


class ImageTask:
    """Batches of shuffled images, and the accuracy on the test images.

    Args:
        images: The data set.
        batch: Images per batch.
        augment: Whether to crop and flip at random.
    """

    score_name = "accuracy"

    def __init__(self, images: Images, batch: int, augment: bool):
        self.images = images
        self.batch = batch
        self.augment = augment
        self.steps_per_epoch = -(-len(images.train_inputs) // batch)

    def batches(self, epoch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels in an order that epoch and seed determine.

        The CPU draws all random numbers of an epoch at its start. So they are the same on every
        device, and no step waits for their transfer.
        """
        inputs, labels, *_ = self.images
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        order = torch.randperm(len(inputs), generator=generator)
        batches = order.to(inputs.device).split(self.batch)
        if not self.augment:
            for index in batches:
                yield inputs[index], labels[index]
            return
        draws = [draw_crops(len(index), *inputs.shape[2:], generator) for index in batches]
        rows, columns = (
            torch.cat(parts).to(inputs.device).split(self.batch)
            for parts in zip(*draws, strict=True)
        )
        for index, *crops in zip(batches, rows, columns, strict=True):
            yield crop(inputs[index], *crops), labels[index]

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        """Return the accuracy on the test images."""
        right = 0
        for inputs, labels in zip(
            self.images.test_inputs.split(2000), self.images.test_labels.split(2000), strict=True
        ):
            right += (model(inputs).argmax(1) == labels).sum()
        return right.item() / len(self.images.test_labels)


def draw_crops(
    count: int, height: int, width: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the rows and columns of padded images that `crop` takes, (images, height or width).

    Each image is shifted by up to 4 pixels in each direction, and half of them are mirrored.
    """
    draws = torch.randint(2 * CROP_PADDING + 1, (2, count, 1), generator=generator)
    flipped = torch.rand(count, 1, generator=generator) < 0.5
    rows = draws[0] + torch.arange(height)
    columns = torch.where(
        flipped, draws[1] + torch.arange(width).flip(0), draws[1] + torch.arange(width)
    )
    return rows, columns


def crop(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return these rows and columns of each image, after padding."""
    padded = pad(images, [CROP_PADDING] * 4)
    every = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    # Indexing on both sides of a slice moves the channels to the end.
    return padded[every, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def load_images(network: str, folder: Path | None) -> Images:
    """Return the normalized data set of a network; without a folder, the digits."""
    if folder is not None and (prepared := prepared_file(network, folder)).exists():
        return Images(*torch.load(prepared, weights_only=True, mmap=True))
    if folder is None:
        images = data.digits()
        if not network.startswith("mlp"):  # LeNet's convolutions need 16 pixels
            images = images._replace(
                train_inputs=enlarged(images.train_inputs), test_inputs=enlarged(images.test_inputs)
            )
    elif network == "resnet20":
        images = data.cifar10(folder)
    else:
        images = data.mnist(data.first_folder(folder, "mnist", "MNIST/raw"))
    return data.normalized(images)


def prepared_file(network: str, folder: Path) -> Path:
    """Return the path of the data set that `prepare` wrote into this folder."""
    return folder / f"prepared-{network}.pt"


def prepare(network: str, folder: Path | None, into: Path) -> Path | None:
    """Write the normalized data set, which processes load at once, and return its folder.

    They share the memory of the file. The digits need no file.
    """
    if folder is None:
        return None
    if not (path := prepared_file(network, into)).exists():
        into.mkdir(parents=True, exist_ok=True)
        torch.save(tuple(load_images(network, folder)), path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    return into


def enlarged(images: Tensor) -> Tensor:
    """Return images of twice the size."""
    return images.repeat_interleave(2, 2).repeat_interleave(2, 3)


def make_task(network: str, folder: Path | None, batch: int, device: str) -> ImageTask:
    """Return the data of a network on a device."""
    images = Images(*(tensor.to(device) for tensor in load_images(network, folder)))
    return ImageTask(images, batch, augment=network == "resnet20" and folder is not None)


def make_network(network: str, task: ImageTask) -> nn.Module:
    """Return a network for the images of the task, on their device."""
    _, channels, size, _ = task.images.train_inputs.shape
    return NETWORKS[network](channels, size).to(task.images.train_inputs.device)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=NETWORKS, default="mlp")
    add_common_arguments(parser, sparsity=0.9)
    arguments = parser.parse_args()
    run(
        arguments,
        RECIPES[arguments.network],
        make_task=lambda recipe: make_task(
            arguments.network, arguments.data_dir, recipe.batch, arguments.device
        ),
        make_model=lambda task: make_network(arguments.network, task),
        narrowed=NARROWED.get(arguments.network, ()),
    )


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # see studies/grid.py
    main()
