"""`lora-gpt2 verify-resume` sees what is the same, and what is not."""

import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from lightning import Callback

from lora_gpt2 import resuming
from tests.conftest import cli

SLOWER = ["trainer.max_epochs=8", "lora=qv", "callbacks.last.every_n_train_steps=3", "keep=last",
          "+callbacks.slow={_target_: tests.training.test_checkpoints.Slow}"]  # fmt: skip


class Forgetful(Callback):
    """Changes weights by what no checkpoint holds: how often this process has trained."""

    def __init__(self) -> None:
        self.trained = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.trained += 1
        with torch.no_grad():
            next(one for one in pl_module.parameters() if one.requires_grad).add_(1e-3 * self.trained)


@pytest.mark.slow
def test_kills_change_nothing(tmp_path, tiny):
    done = cli("verify-resume", *tiny, *SLOWER, "--kills", 6, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert re.search(r"48 steps in \d+ s undisturbed; .* times resumed, .* 0 differences", done.stdout)
    assert sum(map(int, re.findall(r"(\d+) SIG", done.stdout))) == 6
    assert "is not empty" in cli("verify-resume", *tiny, "-o", tmp_path / "out").stderr


@pytest.mark.slow
def test_a_callback_that_forgets_is_found(tmp_path, tiny):
    forgets = "+callbacks.forgets={_target_: tests.test_resuming.Forgetful}"
    done = cli("verify-resume", *tiny, *SLOWER, forgets, "--kills", 8, "-o", tmp_path / "out")
    assert done.returncode == 1
    assert re.search(r"(step \d+ has the loss .*, not|has other bytes)", done.stderr)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_told_to_stop_it_takes_the_training_along(tmp_path, tiny, number):
    asked = ["verify-resume", *tiny, "trainer.max_epochs=100000", "-o", tmp_path / "out"]
    command = [sys.executable, "-m", "lora_gpt2.cli", *map(str, asked)]
    verifying = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not (begun := psutil.Process(verifying.pid).children()):
        assert verifying.poll() is None
        time.sleep(0.05)
    time.sleep(1)
    verifying.send_signal(number)
    assert verifying.communicate(timeout=60)[0] == f"{number.name}: stopped\n"
    assert verifying.returncode == 128 + number
    assert not psutil.wait_procs(begun, timeout=30)[1]


def test_where_it_cannot_write_is_told(tmp_path, tiny):
    (file := tmp_path / "file").touch()
    for place in (file, file / "below"):
        done = cli("verify-resume", *tiny, "-o", place)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert "cannot be written" in done.stderr
    assert "No such option" in cli("verify-resume", *tiny, "--kill", "3", "-o", tmp_path / "out").stderr


def test_files_of_several_adapters_are_compared(tmp_path):
    for run, content in (("whole", b"a"), ("broken", b"b")):
        (tmp_path / run / "lora.rank-2").mkdir(parents=True)
        (tmp_path / run / "lora.rank-2" / "adapter.safetensors").write_bytes(content)
    found = resuming.Verified(1.0)
    resuming._compare(tmp_path / "whole", tmp_path / "broken", found)
    assert found.differences == ["broken: lora.rank-2/adapter.safetensors has other bytes"]


def test_without_losses_nothing_is_verified(tmp_path, tiny):
    done = cli("verify-resume", *tiny, "logger=none", "trainer.max_epochs=1", "-o", tmp_path / "out")
    assert done.returncode == 1
    assert "has no losses or no weights to compare; leave logger=none out" in done.stderr


def test_a_training_that_fails_by_itself_is_told(tmp_path, tiny):
    done = cli("verify-resume", *tiny, "lora.rank=-1", "-o", tmp_path / "out")
    assert done.returncode == 1
    assert "a run ended with exit code 1: model, lora: LoRA rank must be" in done.stderr
