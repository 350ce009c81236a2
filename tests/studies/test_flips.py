"""Counts of the weights of N:M groups that change sides."""

import torch

from studies import flips
from studies.command_line import budget_of
from studies.methods import make_method
from tests.support.studies import digits_mlp


def test_flips_of_groups_are_counted(call_main, tmp_path):
    output = call_main(flips, "--epochs", 2, "--methods", "pdp", "sr-ste", "--out", tmp_path)
    assert (tmp_path / "flips.md").read_text() == output
    assert "| epoch | pdp | sr-ste |" in output
    first, second = output.splitlines()[-2:]
    assert first.startswith("| 1 | ") and second.startswith("| 2 | ")


def test_a_flip_is_a_change_of_sides():
    model = digits_mlp()
    method = make_method("one-shot", model, budget_of(0.0, "2:4", 4))
    counter = flips.FlipCounter(method)
    weight = counter.weights[0]
    total = sum(each.numel() for each in counter.weights)
    with torch.no_grad():
        weight[0, :4] = torch.tensor([1.0, -2.0, 3.0, 4.0])
    method.step(0.1)
    with torch.no_grad():
        weight[0, :4] = torch.tensor([-5.0, -2.0, 3.0, 3.5])  # the first and third swap sides
    method.step(0.2)
    method.step(0.3)
    assert counter.flips[1:] == [2 / total, 0.0]
