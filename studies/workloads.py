"""The networks that grids train: the data, the network and the recipe of each, by name."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import nn

from studies import train_image, train_text
from studies.training import Recipe, Task


class Workload(NamedTuple):
    """What a network learns, and how it is trained.

    make_task takes the folder of the data (None: data that needs no download), the recipe and the
    device; make_network takes the task. prepare takes the folder of the data and one in which it
    may write, and returns the one from which processes load the data fast.
    """

    recipe: Recipe
    make_task: Callable[[Path | None, Recipe, str], Task]
    make_network: Callable[[Task], nn.Module]
    prepare: Callable[[Path | None, Path], Path | None]
    exclude: tuple[str, ...] = ()  # globs of layers that stay dense
    narrowed: tuple[str, ...] = ()  # globs of layers whose channels can be pruned


def image_workload(network: str, recipe: Recipe) -> Workload:
    """Return one of the networks of train_image."""
    return Workload(
        recipe,
        lambda folder, recipe, device: train_image.make_task(network, folder, recipe.batch, device),
        partial(train_image.make_network, network),
        partial(train_image.prepare, network),
        narrowed=train_image.NARROWED.get(network, ()),
    )


def text_workload(size: train_text.Size) -> Workload:
    """Return one of the GPTs of train_text."""
    return Workload(
        size.recipe,
        lambda folder, recipe, device: train_text.make_task(
            folder, size, recipe.batch, train_text.STEPS_PER_EPOCH, device
        ),
        partial(train_text.make_network, size),
        lambda folder, _: folder,
        exclude=train_text.EXCLUDED,
        narrowed=train_text.NARROWED,
    )


WORKLOADS: dict[str, Workload] = {
    **{name: image_workload(name, recipe) for name, recipe in train_image.RECIPES.items()},
    **{f"gpt-{name}": text_workload(size) for name, size in train_text.SIZES.items()},
}
