"""The plan of an experiment against what training really does."""

import json

import psutil
import pytest
import torch

from lora_gpt2.costs import Shape, count_step
from lora_gpt2.errors import UserError
from lora_gpt2.memory import LiveBytes
from lora_gpt2.model.language_model import GPT2LMModel, Targets
from lora_gpt2.model.settings import gpt2_config
from lora_gpt2.plan import plan
from tests.conftest import settings_of, train


def test_the_plan_of_a_run_is_what_the_run_does(tmp_path, tiny):
    import csv

    overrides = [*tiny, "lora=qv", "trainer.accumulate_grad_batches=2", "trainer.log_every_n_steps=1"]
    made = plan(settings_of("train", overrides), "cpu", 2)
    train(tmp_path, *overrides)
    with open(tmp_path / "metrics.csv") as file:
        steps = max(int(line["step"]) for line in csv.DictReader(file)) + 1
    assert made.steps == steps == 9  # 6 batches an epoch, two a step, 3 epochs
    assert made.rows == 41
    size = (tmp_path / "adapter.safetensors").stat().st_size
    assert 0 < size - made.adapter_bytes < 3000  # the header
    assert made.trainable == made.parameters["LoRA"] == 2 * 2 * (4 * 16 + 4 * 16)
    assert made.measured.seconds_per_step > 0
    assert made.measured.peak > made.memory.process > 0
    assert 0 < made.padding < made.padding_to_seq_len < 1


def test_weights_gradients_and_adams_values_are_counted_to_the_byte():
    for overrides, share in (([], 1), (["lora=qv", "lora.rank=2"], None)):
        settings = settings_of("train", ["model.n_layer=2", "model.n_embd=32", *overrides])
        config = gpt2_config(settings.model, settings.lora, 300)
        memory, _ = count_step(config, settings, "cpu", Shape(4, 10, 20))
        model = GPT2LMModel(config)
        weights = sum(4 * p.numel() for p in model.parameters())
        trained = weights if share else 2 * 2 * 2 * (32 + 32) * 4
        assert weights <= memory.weights < weights + 100_000  # and what making them left alive
        assert (memory.gradients, memory.optimizer) == (trained, 2 * trained)
        assert memory.step > memory.weights + memory.activations > memory.weights


def test_operations_are_those_of_the_matrix_products():
    """Training everything: 2 for each weight and token forward, 4 backward; attention and head on top.

    The last block is computed at the targets alone, but for its queries, keys and values.
    """
    settings = settings_of("train", ["model.n_layer=2", "model.n_embd=32", "model.n_head=2"])
    config = gpt2_config(settings.model, settings.lora, 300)
    rows, tokens, targets = 4, 10, 32
    _, flops = count_step(config, settings, "cpu", Shape(rows, tokens, targets))
    linear = 32**2 * ((12 + 3) * rows * tokens + 9 * targets)
    attention = 2 * 2 * rows * tokens * tokens * 32
    head = 32 * 300 * targets
    assert flops == 3 * 2 * (linear + attention + head)


def test_a_frozen_base_saves_a_third_of_the_operations():
    counts = []
    for overrides in ([], ["lora=qv", "lora.rank=1"]):
        settings = settings_of("train", ["model.n_layer=2", "model.n_embd=256", "model.n_head=2", *overrides])
        config = gpt2_config(settings.model, settings.lora, 300)
        counts.append(count_step(config, settings, "cpu", Shape(4, 10, 20))[1])
    assert 0.6 < counts[1] / counts[0] < 0.75


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_memory_is_counted_for_any_device_and_precision(device, precision):
    settings = settings_of("train", [f"trainer.precision={precision}", "lora=qv", "model.dropout=0.1"])
    config = gpt2_config(settings.model, settings.lora, 300)
    memory, flops = count_step(config, settings, device, Shape(4, 10, 20))
    size = 2 if precision == "bf16-true" else 4
    weights = size * sum(p.numel() for p in GPT2LMModel(config).parameters())
    layouts = 3 if device == "cpu" and size == 2 else 1  # matrices twice, the head beside its table
    assert weights <= memory.weights < 1.1 * layouts * weights + 100_000
    assert flops > 0
    assert memory.peak == memory.step > memory.weights


@pytest.mark.parametrize(("batch", "layers"), [(8, 2), (16, 4)])
def test_the_estimate_is_what_tensors_really_take(batch, layers):
    """The same counter over real tensors of the same step."""
    settings = settings_of("train", [f"model.n_layer={layers}", "model.n_embd=64", "model.n_head=2"])
    config = gpt2_config(settings.model, settings.lora, 300)
    memory, _ = count_step(config, settings, "cpu", Shape(batch, 20, 50))
    with LiveBytes() as live:
        model = GPT2LMModel(config)
        positions = torch.arange(50)
        loss = model.loss_at(torch.zeros(batch, 20, dtype=torch.long), Targets.at(positions, positions))
        loss.backward()
    assert memory.step - memory.optimizer == pytest.approx(live.most, rel=0.02)


def test_few_batches_many_devices_and_a_start_to_subtract(tiny):
    """Two batches for five timed steps; three devices have a third each; PiSSA is saved at twice the rank."""
    made = plan(settings_of("train", [*tiny, "data.batch_size=30", "lora=qv"]), "cpu", 4)
    assert made.steps == 6
    assert made.measured.seconds_per_step > 0
    alone, shared = (plan(settings_of("train", [*tiny, f"trainer.devices={n}"]), "cpu", 0) for n in (1, 3))
    assert shared.padding == pytest.approx(alone.padding, abs=0.1)
    assert alone.steps == shared.steps == 18, "a step has the same rows on one device and on many"
    assert (alone.largest_batch[0], shared.largest_batch[0]) in ((7, 3), (7, 2), (6, 2))
    plain, pissa = (
        plan(settings_of("train", [*tiny, "lora=qv", f"lora.init={init}"]), "cpu", 0).adapter_bytes
        for init in ("kaiming", "pissa")
    )
    assert pissa == 2 * plain > 0


def test_an_unknown_device_is_refused(tiny):
    with pytest.raises(UserError, match="--device tpu: is not known; use cpu or cuda"):
        plan(settings_of("train", tiny), "tpu", 0)


@pytest.mark.parametrize(
    ("arguments", "steps", "devices"),
    [
        (["trainer.limit_train_batches=2"], 6, 1),
        (["trainer.limit_train_batches=0.5"], 9, 1),
        (["trainer.devices=[0,1]"], 18, 2),
        (["trainer.devices='2'"], 18, 2),
        (["trainer.devices='0,1,'"], 18, 2),
        (["+trainer.num_nodes=2"], 18, 2),
        (["trainer.devices=auto"], 18, 1),
        (["trainer.max_epochs=-1", "trainer.max_steps=5"], 5, 1),
    ],
)
def test_steps_and_devices_are_counted_as_lightning_counts_them(tiny, arguments, steps, devices):
    """Of two devices each has half of a batch of 6 or 7 rows."""
    made = plan(settings_of("train", [*tiny, *arguments]), "cpu", 0)
    assert made.steps == steps
    assert made.largest_batch[0] in {1: (6, 7), 2: (3, 4)}[devices]


def test_a_run_without_end_is_not_planned(tiny):
    with pytest.raises(UserError, match=r"trainer.max_epochs: -1 has no end"):
        plan(settings_of("train", [*tiny, "trainer.max_epochs=-1"]), "cpu", 0)


def test_accumulated_batches_cost_time_and_operations(tiny):
    one, four = (
        plan(settings_of("train", [*tiny, f"trainer.accumulate_grad_batches={n}"]), "cpu", 0).flops_per_step
        for n in (1, 4)
    )
    assert four == 4 * one


def test_the_mean_batch_does_not_depend_on_a_size_that_no_batch_has(tiny):
    counts = {
        plan(settings_of("train", [*tiny, f"data.batch_size={size}"]), "cpu", 0).flops_per_step
        for size in (41, 100, 1000)
    }
    assert len(counts) == 1


def test_short_names_of_precisions_are_lightnings(tiny):
    for short, long in (("bf16", "bf16-mixed"), ("32", "32-true")):
        made = [
            plan(settings_of("train", [*tiny, f"trainer.precision={name}"]), "cpu", 0)
            for name in (short, long)
        ]
        assert made[0].memory.weights == made[1].memory.weights


def test_json_names_every_figure(tiny):
    made = plan(settings_of("train", tiny), "cpu", 1)
    values = json.loads(json.dumps(made.as_json()))
    assert values["memory"]["peak"] == made.memory.peak > made.memory.step * 1.25
    assert values["measured"]["peak"] == made.measured.peak
    assert values["seconds"] == pytest.approx(made.measured.seconds_per_step * made.steps)
    assert values["largest_batch"] == {"rows": 7, "tokens": made.largest_batch[1]}


def test_a_step_that_does_not_fit_is_not_tried(tiny, monkeypatch):
    free = psutil.virtual_memory()._replace(available=10**6)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with pytest.raises(UserError, match=r"a step would take .* GB, 0.0 GB are free; add --steps 0"):
        plan(settings_of("train", tiny), "cpu", 1)
    assert plan(settings_of("train", tiny), "cpu", 0).measured is None
