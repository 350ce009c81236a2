"""A small model of transformers, and the Trainer that tests of PDPCallback train it with."""

import pytest
import torch

pytest.importorskip("transformers")

from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from pdp_kernels import PDPConfig

EPOCHS, BATCHES = 8, 3
CONFIG = PDPConfig(0.8, warmup=1, ramp=4, reallocate=0.5, relative_tau=(1.0, 0.1), anneal=7)
EXAMPLES = [
    {"input_ids": torch.arange(index, index + 6) * 7 % 29, "labels": index % 2}
    for index in range(8 * BATCHES)
]


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=29,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
        problem_type="single_label_classification",
    )
    return BertForSequenceClassification(config)


def new_trainer(folder, callback, *others, model=None, trainer_class=Trainer, **arguments):
    """A Trainer of three batches an epoch. Others are callbacks that come before the pruner's."""
    how = {k: arguments.pop(k) for k in ("compute_metrics", "model_init") if k in arguments}
    settings = {
        "num_train_epochs": EPOCHS,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
    }
    data = arguments.pop("train_dataset", EXAMPLES)
    return trainer_class(
        None if "model_init" in how else model or bert(),
        TrainingArguments(str(folder), **settings | arguments),
        train_dataset=data,
        eval_dataset=EXAMPLES,
        callbacks=[*others, callback],
        **how,
    )


def targets(callback):
    names = {layer.name for layer in callback.pruner.report().layers}
    return {
        name: weight for name, weight in callback.pruner.model.named_parameters() if name in names
    }


def zeros(model, names):
    weights = dict(model.named_parameters())
    return sum(int((weights[name] == 0).sum()) for name in names)


def expected_zeros(callback, sparsity=0.8):
    return round(sparsity * sum(weight.numel() for weight in targets(callback).values()))


class Recorder(TrainerCallback):
    """Calls a function at each event of a name, with its arguments by name."""

    def __init__(self, event, function):
        setattr(self, event, lambda args, state, control, **others: function(state, **others))


def assert_equal_states(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
