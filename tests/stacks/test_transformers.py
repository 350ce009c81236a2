"""PDPCallback in the real Trainer of transformers: schedule, logs, models and mistakes."""

import doctest
import re
import warnings

import pytest
import torch

from tests.support.trainer import (
    BATCHES,
    CONFIG,
    EPOCHS,
    EXAMPLES,
    Recorder,
    assert_equal_states,
    bert,
    expected_zeros,
    new_trainer,
    targets,
    zeros,
)

pytest.importorskip("transformers")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._dynamo.utils import counters
from transformers import (
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    Trainer,
)

from pdp_kernels import PDPConfig, PDPPruner
from pdp_kernels.integrations import transformers as integration
from pdp_kernels.integrations.transformers import PDPCallback


def test_the_saved_model_has_exact_zeros_and_the_checkpoints_dense_weights(tmp_path):
    callback = PDPCallback(0.8)
    trainer = new_trainer(tmp_path, callback, save_strategy="epoch")
    before = {name: type(module) for name, module in trainer.model.named_modules()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer.train()
    assert {name: type(module) for name, module in trainer.model.named_modules()} == before

    trainer.save_model(str(tmp_path / "pruned"))
    for folder, count in (("pruned", expected_zeros(callback)), ("checkpoint-24", 0)):
        model, info = BertForSequenceClassification.from_pretrained(
            tmp_path / folder, output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert zeros(model, targets(callback)) == count
        assert model.config.architectures == ["BertForSequenceClassification"]


class Unsized(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(EXAMPLES)


@pytest.mark.parametrize(
    ("arguments", "steps_per_epoch", "steps"),
    [
        ({"num_train_epochs": 2}, 3, 6),
        ({"num_train_epochs": 1.5}, 3, 5),
        ({"max_steps": 4}, 3, 4),
        ({"num_train_epochs": 2, "gradient_accumulation_steps": 2}, 2, 4),
        ({"max_steps": 5, "train_dataset": Unsized()}, 5, 5),  # which repeats after three batches
    ],
)
def test_progress_is_in_epochs_of_optimizer_steps(tmp_path, arguments, steps_per_epoch, steps):
    callback = PDPCallback(0.8)
    seen = []
    recorder = Recorder("on_step_end", lambda state, **_: seen.append(callback.pruner.progress))
    new_trainer(tmp_path, callback, recorder, **arguments).train()
    assert seen == [(step + 1) / steps_per_epoch for step in range(steps)]
    assert callback.pruner.config == PDPConfig.for_epochs(0.8, steps / steps_per_epoch)


def test_steps_that_a_scaler_skips_do_not_count(tmp_path):
    class Scaled(Trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)

        def compute_loss(self, *args, **kwargs):
            overflow = 1e30 if self.state.global_step in (0, 4) else 1.0
            return overflow * super().compute_loss(*args, **kwargs)

    callback = PDPCallback(CONFIG)
    seen = []
    recorder = Recorder("on_step_end", lambda state, **_: seen.append(callback.pruner.progress))
    arguments = {"max_grad_norm": 0.0, "save_strategy": "epoch", "num_train_epochs": 6}
    arguments["optim"] = "adamw_torch"  # the fused one skips steps on the device
    new_trainer(tmp_path, callback, recorder, trainer_class=Scaled, **arguments).train()
    steps_taken = [0, 1, 2, 3, 3, *range(4, 17)]
    assert seen == [steps / BATCHES for steps in steps_taken]

    callback, whole = PDPCallback(CONFIG), seen[12:]
    seen.clear()
    trainer = new_trainer(tmp_path, callback, recorder, trainer_class=Scaled, **arguments)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert seen == whole


def test_evaluation_in_mid_training_is_that_of_the_pruned_model(tmp_path):
    callback = PDPCallback(CONFIG)
    losses = []

    def compare(state, metrics, **_):
        copy = callback.pruner.pruned_copy()
        losses.append((zeros(copy, targets(callback)), metrics["eval_loss"]))
        batches = [EXAMPLES[start : start + 8] for start in range(0, len(EXAMPLES), 8)]
        each = [
            copy(
                input_ids=torch.stack([example["input_ids"] for example in batch]),
                labels=torch.tensor([example["labels"] for example in batch]),
            ).loss.item()
            for batch in batches
        ]
        assert metrics["eval_loss"] == pytest.approx(sum(each) / len(each), rel=1e-6)

    recorder = Recorder("on_evaluate", compare)
    new_trainer(tmp_path, callback, recorder, eval_strategy="epoch").train()
    assert losses[0][0] == 0 and losses[2][0] > 0
    assert losses[-1][0] == expected_zeros(callback)


def test_tensorboard_sees_each_layer_and_the_console_the_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    callback = PDPCallback(CONFIG)
    trainer = new_trainer(tmp_path, callback, report_to="tensorboard", eval_strategy="epoch")
    trainer.train()
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    scalars = {
        tag: [each.value for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    assert len(scalars["train/pdp/sparsity"]) == EPOCHS * BATCHES
    assert scalars["train/pdp/sparsity"][-1] == pytest.approx(0.8, abs=1e-3)
    for name in targets(callback):
        assert {f"train/pdp/{what}/{name}" for what in ("sparsity", "threshold", "soft")} <= set(
            scalars
        )
    last = [log for log in trainer.state.log_history if "loss" in log][-1]
    assert last["pdp/sparsity/classifier.weight"] > 0
    printed = capsys.readouterr().out
    assert "'pdp/sparsity': '0.8001'" in printed and "pdp/sparsity/" not in printed


def test_logs_can_be_left_alone(tmp_path):
    trainer = new_trainer(tmp_path, PDPCallback(CONFIG, log=False))
    trainer.train()
    assert not any(name.startswith("pdp/") for log in trainer.state.log_history for name in log)


def test_other_callbacks_see_the_pruner_of_the_same_step(tmp_path):
    seen = []
    callback = PDPCallback(0.8)
    saver = Recorder("on_step_end", lambda state, **_: seen.append(callback.state()["pruner"]))
    new_trainer(tmp_path, callback, saver, max_steps=4).train()
    assert [each["progress"] for each in seen] == [step / 3 for step in (1, 2, 3, 4)]


def test_several_gpus_in_one_process_are_refused(tmp_path):
    trainer = new_trainer(tmp_path, PDPCallback(0.8))
    trainer.args._n_gpu = 2
    before = {name: type(module) for name, module in trainer.model.named_modules()}
    with pytest.raises(
        RuntimeError, match=r"DataParallel cannot.*DistributedDataParallel \(torchr"
    ):
        trainer.train()
    assert {name: type(module) for name, module in trainer.model.named_modules()} == before


def test_a_compiled_model_is_pruned_with_one_graph_for_the_whole_schedule(tmp_path):
    torch._dynamo.reset()
    counters.clear()
    callback = PDPCallback(CONFIG)
    trainer = new_trainer(tmp_path, callback, torch_compile=True, torch_compile_backend="eager")
    trainer.train()
    assert counters["stats"]["unique_graphs"] == 1
    assert type(trainer.model_wrapped).__name__ == "OptimizedModule"
    trainer.save_model(str(tmp_path / "pruned"))
    model = BertForSequenceClassification.from_pretrained(tmp_path / "pruned")
    assert zeros(model, targets(callback)) == expected_zeros(callback)


def test_a_language_model_with_tied_embeddings_under_autocast_and_checkpointing(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=29, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    data = [{"input_ids": each["input_ids"], "labels": each["input_ids"]} for each in EXAMPLES]
    callback = PDPCallback(0.8)
    trainer = new_trainer(
        tmp_path,
        callback,
        model=GPT2LMHeadModel(config),
        train_dataset=data,
        bf16=True,
        activation_checkpointing=True,
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "pruned"))
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "pruned")
    names = [f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "mlp.c_fc")]
    assert set(names) < targets(callback).keys()
    assert zeros(model, targets(callback)) == expected_zeros(callback)
    assert (model.lm_head.weight != 0).all()


def test_a_second_training_of_a_pruned_model_raises(tmp_path):
    trainer = new_trainer(tmp_path, PDPCallback(0.8), max_steps=3)
    trainer.train()
    pruned = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"has pruned this model already.*freeze_zeros"):
        trainer.train()
    assert_equal_states(trainer.model.state_dict(), pruned)


def test_each_training_of_model_init_is_pruned_anew(tmp_path):
    callback = PDPCallback(CONFIG)
    trainer = new_trainer(tmp_path, callback, model_init=bert)
    trainer.train()
    first = trainer.model
    trainer.train()
    assert callback.pruner.model is trainer.model is not first
    assert_equal_states(trainer.model.state_dict(), first.state_dict())
    assert zeros(trainer.model, targets(callback)) == expected_zeros(callback)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("0.9",), TypeError, "config must be a PDPConfig, a mapping .*, got str"),
        ((True,), TypeError, "config must be .*, got bool"),
        ((1.5,), ValueError, r"config \(the sparsity\) must be in \[0, 1\], got 1\.5"),
        (({"sparse": 0.9},), ValueError, r"keys among .*, got \['sparse'\]"),
    ],
)
def test_a_wrong_config_raises(arguments, error, message):
    with pytest.raises(error, match=message):
        PDPCallback(*arguments)


@pytest.mark.parametrize("name", ["log", "finalize"])
def test_a_wrong_switch_raises(name):
    with pytest.raises(TypeError, match=f"{name} must be a bool, got int"):
        PDPCallback(0.9, **{name: 1})


def test_the_example_of_the_docstring_runs():
    results = doctest.testmod(integration)
    assert (results.failed, results.attempted) == (0, 3)


def test_the_program_of_the_module_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"::\n\n((?:    .*\n|\n)+)", integration.__doc__)
    names = {}
    exec("if True:\n" + program, names)
    (callback,) = [
        each
        for each in names["trainer"].callback_handler.callbacks
        if isinstance(each, PDPCallback)
    ]
    model = BertForSequenceClassification.from_pretrained(tmp_path / "pruned")
    assert zeros(model, targets(callback)) == expected_zeros(callback, 0.9)


def test_the_mixer_of_mamba_reads_masked_weights():
    """It passes the weight of its convolution to a function, and that of dt_proj."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "state_size": 4, "time_step_rank": 2}
    model = MambaForCausalLM(MambaConfig(num_hidden_layers=2, **sizes))
    pruner = PDPPruner(model, PDPConfig(0.5, warmup=0, ramp=0))
    inputs = torch.randint(0, 32, (2, 8))
    model.train()(inputs, labels=inputs).loss.backward()
    with torch.no_grad():
        expected = pruner.pruned_copy().eval()(inputs).logits
        assert torch.equal(model.eval()(inputs).logits, expected)
