"""An interrupted run that is resumed ends in the very numbers of one that was not."""

import csv
from pathlib import Path

import pytest
import torch
from lightning import Callback
from safetensors.torch import load_file

from lora_gpt2.errors import UserError
from lora_gpt2.runs import begun_at, logged
from tests.conftest import train

MORE = ["model.dropout=0.2", "callbacks.last.every_n_train_steps=1", "trainer.log_every_n_steps=1"]


class Killed(Exception):
    pass


class KillInValidation(Callback):
    """Ends the process' work in the validation behind a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise Killed


class KillAfter(Callback):
    """Ends the process' work behind a step, after its checkpoint was written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise Killed


def losses(folder: Path) -> dict[int, float]:
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        return {int(r["step"]): float(r["train/loss"]) for r in csv.DictReader(file) if r["train/loss"]}


KINDS: list[list[str]] = [[], ["lora=qv", "lora.dropout=0.3"]]
EXTRAS: list[list[str]] = [
    [],
    ["trainer.max_steps=16"],
    ["trainer.accumulate_grad_batches=2"],
    ["trainer.val_check_interval=3", "callbacks.last.every_n_train_steps=3"],
]


@pytest.mark.parametrize(
    ("lora", "extra"),
    [(lora, extra) for lora in KINDS for extra in EXTRAS] + [(["lora=qv", "precision=bfloat16"], [])],
    ids=str,
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, tiny, lora, extra):
    arguments = [*tiny, *MORE, *lora, *extra]
    whole = tmp_path / "whole"
    train(whole, *arguments)
    file = "adapter.safetensors" if lora else "model.safetensors"
    expected, steps = load_file(whole / file), losses(whole)
    for step in (1, 3, 6, 7, 8):
        broken, resumed = tmp_path / f"broken-{step}", tmp_path / f"resumed-{step}"
        kill = f"+callbacks.kill={{_target_: tests.training.test_resume.KillAfter, step: {step}}}"
        with pytest.raises(Killed):
            train(broken, *arguments, kill)
        begun = (broken / "checkpoints" / "last.ckpt").is_file()
        train(resumed, *arguments, *([f"resume={broken}"] if begun else []))
        got, tail = load_file(resumed / file), losses(resumed)
        assert max(tail) == max(steps)
        assert tail == {k: v for k, v in steps.items() if k >= min(tail)}, step
        assert min(tail) <= step
        assert logged(resumed, "valid/loss").items() <= logged(whole, "valid/loss").items()
        assert all(torch.equal(got[name], expected[name]) for name in expected), step


def test_what_cannot_be_resumed_is_named(tmp_path, tiny):
    train(tmp_path / "a", *tiny, "lora=qv", "trainer.max_steps=1")
    with pytest.raises(UserError, match=r"adapter.safetensors: is no checkpoint of this version"):
        train(tmp_path / "b", *tiny, "lora=qv", f"resume={tmp_path / 'a' / 'adapter.safetensors'}")


@pytest.mark.parametrize("change", [{"loops": {}}, {"optimizer_states": 3}, {"config": 5}], ids=str)
def test_a_checkpoint_without_its_parts_is_named(tmp_path, tiny, change):
    train(tmp_path / "a", *tiny, "lora=qv", "trainer.max_steps=1")
    last = tmp_path / "a" / "checkpoints" / "last.ckpt"
    torch.save({**torch.load(last, weights_only=True), **change}, last)
    with pytest.raises(UserError, match=r"holds no state of a run|the checkpoint does not say its model"):
        train(tmp_path / "b", *tiny, "lora=qv", f"resume={tmp_path / 'a'}")


def test_a_run_killed_in_its_validation_validates_again(tmp_path, tiny):
    """Or it would know of no better weights than those of before."""
    arguments = [*tiny, *MORE, "lora=qv", "trainer.val_check_interval=3"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(whole, *arguments)
    kill = "+callbacks.kill={_target_: tests.training.test_resume.KillInValidation, step: 9}"
    with pytest.raises(Killed):
        train(broken, *arguments, kill)
    train(broken, *arguments, f"resume={broken}")
    assert logged(broken, "valid/loss") == logged(whole, "valid/loss")
    expected, got = (load_file(folder / "adapter.safetensors") for folder in (whole, broken))
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    names = [sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in (whole, broken)]
    assert names[0] == names[1]


def test_a_checkpoint_says_where_its_run_had_begun(tmp_path, tiny):
    every = "trainer.val_check_interval=1", "callbacks.last.every_n_train_steps=4"
    arguments, here = [*tiny, "lora=qv", *every], tmp_path / "a"
    kill = "+callbacks.kill={{_target_: tests.training.test_resume.KillAfter, step: {}}}"
    with pytest.raises(Killed):
        train(here, *arguments, kill.format(6))
    last = here / "checkpoints" / "last.ckpt"
    assert begun_at(last) is None
    (best,) = here.glob("checkpoints/best*.ckpt")
    train(tmp_path / "b", *arguments, f"resume={here}")
    assert begun_at(tmp_path / "b" / "checkpoints" / "last.ckpt") == last.resolve()
    for step, begun in ((9, best), (13, here)):
        with pytest.raises(Killed):
            train(here, *arguments, kill.format(step), f"resume={begun}")
        assert begun_at(last) == best.resolve()
