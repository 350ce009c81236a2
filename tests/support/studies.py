"""What the tests of studies share."""

import csv

from studies import data
from studies.networks import mlp, residual_network


def digits_mlp():
    """The MLP of the studies for scikit-learn's digits."""
    return mlp(64, 300, 100, 10)


def small_residual_network():
    """Two residual blocks for images of one channel; the hidden channels are 8 and 16."""
    return residual_network(1, [(8, 8, 8), (8, 16, 16)])


def read_csv(path):
    """The rows of a CSV file as dictionaries."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def short_text():
    """Python's help texts, with a test text that is scored in no time."""
    text = data.help_text()
    return text._replace(test=text.test[:4000])
