"""Each guard meets the fault that it is there for."""

import pytest
import torch
from lightning import Callback

from lora_gpt2 import conversion
from lora_gpt2.errors import UserError
from lora_gpt2.model.lora import MergedLinear
from lora_gpt2.training.accuracy import StageMetrics
from lora_gpt2.training.module import LanguageModeling
from lora_gpt2.training.together import AdaptersTogether
from tests.conftest import script, train

KINDS: list[list[str]] = [
    ["lora.dora=true", "lora.bias=all"], ["lora.init=pissa", "precision=bfloat16"], ["lora.rank=[1,2]"]
]  # fmt: skip


class ChangeFrozen(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        next(one for one in pl_module.parameters() if not one.requires_grad).data[0] += 1e-3


class ChangeOnOneRank(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step == 3:
            next(one for one in pl_module.parameters() if one.requires_grad).data[0] += 1e-3


class BreakTheLastStep(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.is_last_batch:
            next(one for one in pl_module.parameters() if one.requires_grad).data[0] = torch.inf


@pytest.fixture
def short(tiny) -> list[str]:
    return [*tiny, "lora=qv", "trainer.max_epochs=1", "callbacks.guards.steps=4"]


@pytest.mark.parametrize("more", KINDS, ids=str)
def test_sound_trainings_pass(tmp_path, short, more):
    train(tmp_path, *short, *more)


def test_a_fresh_adapter_that_changes_the_base(tmp_path, short, monkeypatch):
    start = MergedLinear.start_from_base

    def faulty(layer):
        start(layer)
        if layer.enabled:
            torch.nn.init.normal_(layer.lora_B)

    monkeypatch.setattr(MergedLinear, "start_from_base", faulty)
    with pytest.raises(UserError, match="before any step the adapter changes logits"):
        train(tmp_path, *short)


def test_a_base_that_is_not_finite(tmp_path, short, monkeypatch):
    start = MergedLinear.start_from_base

    def faulty(layer):
        start(layer)
        layer.weight.data[0, 0] = torch.nan

    monkeypatch.setattr(MergedLinear, "start_from_base", faulty)
    with pytest.raises(UserError, match="changes logits by nan"):
        train(tmp_path, *short)


@pytest.mark.parametrize(
    ("module", "lora", "value"),
    [
        (LanguageModeling, ["lora=none"], torch.nan),
        (LanguageModeling, [], torch.inf),
        (AdaptersTogether, ["lora.rank=[1,2]"], torch.nan),
    ],
)
def test_a_loss_that_is_not_finite(tmp_path, short, monkeypatch, module, lora, value):
    step, rows = module.training_step, []

    def faulty(self, batch, batch_idx):
        rows.append(torch.cat([one.rows for one in batch]) if isinstance(batch, list) else batch.rows)
        return step(self, batch, batch_idx) * (value if len(rows) == 3 else 1)

    monkeypatch.setattr(module, "training_step", faulty)
    with pytest.raises(UserError) as found:
        train(tmp_path, *short, *lora)
    assert str(found.value).startswith(f"{found.value.where}: the loss of step 3 is {value}")
    assert found.value.where.endswith("train.jsonl")
    assert f"lines {', '.join(str(int(row) + 1) for row in rows[2])};" in str(found.value)
    assert len(rows) == 3
    kept = torch.load(tmp_path / "checkpoints" / "not-finite.ckpt", weights_only=True)
    assert kept["global_step"] == 2
    assert all(value.isfinite().all() for value in kept["state_dict"].values())


@pytest.mark.parametrize("lora", [[], ["lora.rank=[1,2]"]])
def test_a_validation_that_is_not_finite(tmp_path, short, monkeypatch, lora):
    update, reports = StageMetrics.update, []

    def faulty(self, report):
        reports.append(report)
        factor = torch.nan if len(reports) == 1 else 1
        update(self, report._replace(loss_sum=report.loss_sum * factor))

    monkeypatch.setattr(StageMetrics, "update", faulty)
    with pytest.raises(UserError, match="the validation loss behind step 6 is nan"):
        train(tmp_path, *short, *lora)
    assert not (tmp_path / "adapter.safetensors").exists()


def test_weights_that_are_not_finite_in_the_end(tmp_path, short):
    fault = "+callbacks.fault={_target_: tests.training.test_guards.BreakTheLastStep}"
    with pytest.raises(UserError, match="is not finite behind the last step, 6"):
        train(tmp_path, *short, fault, "trainer.limit_val_batches=0", "keep=last")
    assert not (tmp_path / "adapter.safetensors").exists()


def test_a_matrix_that_does_not_move(tmp_path, short, monkeypatch):
    configure = LanguageModeling.configure_optimizers

    def faulty(self):
        self.model.transformer.h[1].attn.c_attn.lora_B.register_hook(lambda grad: grad * 0)
        return configure(self)

    monkeypatch.setattr(LanguageModeling, "configure_optimizers", faulty)
    what = r"after 4 steps lora_B is as it was in h.1.attn.c_attn \(0\), h.1.attn.c_attn \(2\)"
    with pytest.raises(UserError, match=what):
        train(tmp_path, *short)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_base_that_changes(tmp_path, short, precision):
    fault = "+callbacks.fault={_target_: tests.training.test_guards.ChangeFrozen}"
    with pytest.raises(UserError, match="frozen weights of the base have changed"):
        train(tmp_path, *short, f"precision={precision}", fault)
    assert not (tmp_path / "adapter.safetensors").exists()


def test_processes_whose_weights_differ(tmp_path, short):
    fault = "+callbacks.fault={_target_: tests.training.test_guards.ChangeOnOneRank}"
    two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    done = script("train", *short, *two, fault, f"hydra.run.dir={tmp_path}")
    assert done.returncode == 1
    assert "processes [1] hold other weights than process 0 at step 6" in done.stderr
    assert not (tmp_path / "adapter.safetensors").exists()


def test_a_merge_that_its_type_cannot_hold(tmp_path, run, monkeypatch):
    delta = MergedLinear.delta_weight
    monkeypatch.setattr(MergedLinear, "delta_weight", lambda layer: delta(layer) + 1e5)
    monkeypatch.setattr(conversion, "ROUNDING", {**conversion.ROUNDING, torch.float32: torch.inf})
    with pytest.raises(UserError, match=r"logits differ by nan, nothing was written"):
        conversion.merge(str(run / "other"), None, tmp_path / "merged", torch.float16)
    assert not (tmp_path / "merged").exists()


def test_a_merge_that_is_not_the_sum(tmp_path, run, monkeypatch):
    delta = MergedLinear.delta_weight
    monkeypatch.setattr(MergedLinear, "delta_weight", lambda layer: 1.1 * delta(layer))
    with pytest.raises(UserError, match=r"logits differ by .*, nothing was written"):
        conversion.merge(str(run / "other"), None, tmp_path / "merged", torch.float32)
    assert not (tmp_path / "merged").exists()
