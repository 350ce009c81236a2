"""PDPCallback in a data-parallel Trainer of transformers."""

import os

import pytest

from tests.support.ranks import results_on_ranks
from tests.support.trainer import (
    CONFIG,
    EPOCHS,
    assert_equal_states,
    bert,
    expected_zeros,
    new_trainer,
    targets,
    zeros,
)

pytest.importorskip("transformers")

from transformers import BertForSequenceClassification

from pdp_kernels.integrations.transformers import PDPCallback


def train_on_rank(rank, folder):
    """Train once in one piece and once from a checkpoint; return the weights of both."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in environment.items()})
    try:
        arguments = {"per_device_train_batch_size": 4, "ddp_find_unused_parameters": False}
        whole = new_trainer(folder, PDPCallback(CONFIG), save_strategy="epoch", **arguments)
        whole.train()
        assert type(whole.model_wrapped).__name__ == "DistributedDataParallel"
        whole.save_model(f"{folder}/pruned")

        callback = PDPCallback(CONFIG, finalize=False)
        resumed = new_trainer(folder, callback, model=bert(), **arguments)
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-6")
        assert callback.pruner.progress == EPOCHS
        callback.pruner.verify_replicas()
        callback.pruner.finalize()
        assert zeros(resumed.model, targets(callback)) == expected_zeros(callback)
        return whole.model.state_dict(), resumed.model.state_dict()
    finally:
        for name in environment:
            del os.environ[name]


@pytest.mark.slow
def test_ranks_prune_the_same_and_resume_bit_for_bit(tmp_path):
    (whole, resumed), *others = results_on_ranks(train_on_rank, 2, str(tmp_path))
    assert_equal_states(whole, resumed)
    for other in others[0]:
        assert_equal_states(whole, other)

    model = BertForSequenceClassification.from_pretrained(tmp_path / "pruned")
    assert_equal_states(model.state_dict(), whole)
