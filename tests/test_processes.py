"""Several processes: a sweep over devices, ranks that die, ranks that disagree, jobs given to a cluster."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
import torch
from lightning import Callback
from safetensors.torch import load_file

from lora_gpt2.jobs import Job, State
from tests.conftest import ROOT, script

TRAIN = ROOT / "train.py"
TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]


def test_a_sweep_over_two_devices_has_exactly_its_jobs(tmp_path, tiny):
    common = [*tiny, *TWO, "lora=qv", "trainer.max_epochs=1"]
    where = f"hydra.sweep.dir={tmp_path / 'a sweep'}"
    planned = script("train", "-m", *common, "lora.rank=1,2", where, "dry_run=true")
    assert planned.returncode == 0, planned.stderr
    swept = script("train", "-m", *common, "lora.rank=1,2", where)
    assert swept.returncode == 0, swept.stderr
    jobs = sorted(path.name for path in (tmp_path / "a sweep").iterdir() if path.is_dir())
    assert jobs == ["0", "1"]
    for number, rank in enumerate((1, 2)):
        folder = tmp_path / "a sweep" / str(number)
        weights = load_file(folder / "adapter.safetensors")
        assert weights["transformer.h.0.attn.c_attn.lora_B"].shape[1] == rank
        assert len(list((folder / "checkpoints").glob("last*.ckpt"))) == 1
        assert len(list((folder / "checkpoints").glob("best*.ckpt"))) == 1
        assert len(list(folder.glob("metrics*.csv"))) == 1
        assert Job.read(folder).state is State.finished
        assert Job.read(folder).valid_loss is not None


def test_a_sweep_over_numbers_of_devices(tmp_path, tiny):
    more = ["lora=qv", "lora.dropout=0", "trainer=ddp", "trainer.accelerator=cpu", "trainer.max_epochs=1"]
    swept = script("train", "-m", *tiny, *more, "trainer.devices=1,2", f"hydra.sweep.dir={tmp_path}")
    assert swept.returncode == 0, swept.stderr
    one, two = (Job.read(tmp_path / name) for name in "01")
    assert (one.state, two.state) == (State.finished, State.finished)
    assert two.valid_loss == pytest.approx(one.valid_loss, rel=1e-4)
    alone, both = (load_file(tmp_path / name / "adapter.safetensors") for name in "01")
    assert all(torch.allclose(alone[name], both[name], atol=1e-5) for name in alone)


def test_a_job_over_two_devices_says_why_it_failed(tmp_path, tiny):
    more = ["lora=qv", "base=/no/where"]
    swept = script("train", "-m", *tiny, *TWO, *more, "seed=1", f"hydra.sweep.dir={tmp_path}")
    assert swept.returncode == 1
    assert "/no/where" in Job.read(tmp_path / "0").error


def test_a_sweep_under_torchrun_is_refused(tmp_path, tiny):
    sweep = ["-m", *tiny, "seed=1,2", f"hydra.sweep.dir={tmp_path}"]
    done = script("train", *sweep, TORCHELASTIC_RUN_ID="1")
    assert done.returncode == 1
    assert "torchrun: would run the whole sweep in each of its processes" in done.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_run_within_seconds(tmp_path, tiny, rank):
    command = [sys.executable, TRAIN, *tiny, *TWO, "trainer.max_epochs=100000", "callbacks.progress.every=0",
               f"hydra.run.dir={tmp_path}"]  # fmt: skip
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in first.stdout:
        if "step 20/" in line:
            break
    (second,) = psutil.Process(first.pid).children()
    (second if rank else first).send_signal(signal.SIGKILL)
    start = time.monotonic()
    first.stdout.close()
    assert first.wait(timeout=60) != 0
    second.wait(timeout=60)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("waits", [False, True], ids=["as it starts", "as it waits"])
def test_a_process_whose_first_was_killed_before_they_met_ends_too(tmp_path, tiny, waits):
    command = [sys.executable, TRAIN, *tiny, *TWO, "lora=qv", f"hydra.run.dir={tmp_path}"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    others: list[psutil.Process] = []
    while not others:
        assert first.poll() is None
        time.sleep(0.05)
        for child in psutil.Process(first.pid).children():
            with suppress(psutil.Error):  # git, which tells the commit, is gone by now
                others += [child] if "hydra.job.name=train_ddp_process_1" in child.cmdline() else []
    while waits and others[0].num_threads() == 1:
        time.sleep(0.05)
    first.kill()
    first.wait()
    others[0].wait(timeout=30)


@pytest.mark.parametrize("whose", ["TORCHELASTIC_RUN_ID", "SLURM_PROCID", None])
def test_a_process_that_lightning_did_not_start_lives_on_without_the_one_that_did(whose):
    """Whichever process of a run was noted in what it inherits."""
    code = "import time; from lora_gpt2 import signals; signals.end_together(False); print(1, flush=True)"
    inherited = {} if whose is None else {whose: "1", "LORA_GPT2_FIRST_PROCESS": str(2**22 + 1)}
    starter = (
        "import subprocess as s, sys;"
        f"s.Popen([sys.executable, '-c', {code + '; time.sleep(3); print(2)'!r}], stdout=1); input()"
    )
    first = subprocess.Popen([sys.executable, "-c", starter], env={**os.environ, **inherited},
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert first.stdout.readline() == "1\n"
    assert first.communicate("\n")[0] == "2\n"


def test_ranks_that_were_told_different_things_stop(tmp_path, tiny):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(2):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2,
                     "GROUP_RANK": 0,
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": 1}  # fmt: skip
        command = [
            sys.executable,
            TRAIN,
            *tiny,
            *TWO,
            f"optimizer.lr={0.01 + rank}",
            f"hydra.run.dir={tmp_path}",
        ]
        told = {name: str(value) for name, value in variables.items()}
        running.append(
            subprocess.Popen(command, env={**os.environ, **told}, stderr=subprocess.PIPE, text=True)
        )
    for process in running:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 1
        assert "the processes of this run were given different settings" in error


class HalfOfABlock(Callback):
    """Fails unless each process holds half of every block's frozen weights."""

    def on_train_start(self, trainer, pl_module):
        for block in pl_module.model.transformer.h:
            whole = [one for one in block.parameters() if not one.requires_grad]
            held = sum(one.to_local().numel() for one in whole)
            assert held == sum(one.numel() for one in whole) // trainer.world_size


def test_a_sharded_base_trains_to_the_numbers_of_ddp(tmp_path, tiny):
    common = [*tiny, *TWO[1:], "lora=qv", "trainer.max_epochs=1"]
    half = "+callbacks.half={_target_: tests.test_processes.HalfOfABlock}"
    for strategy in ("ddp", "fsdp"):
        folder = tmp_path / strategy
        more = [half] if strategy == "fsdp" else []
        done = script("train", *common, *more, f"trainer={strategy}", f"hydra.run.dir={folder}")
        assert done.returncode == 0, done.stderr
    whole, sharded = (load_file(tmp_path / name / "adapter.safetensors") for name in ("ddp", "fsdp"))
    assert all(torch.equal(sharded[name], weight) for name, weight in whole.items())
    assert any(weight.any() for name, weight in whole.items() if name.endswith("lora_B"))
    resumed = script("train", *common, "trainer=fsdp", "trainer.max_epochs=2",
                     f"resume={tmp_path / 'fsdp'}", f"hydra.run.dir={tmp_path / 'resumed'}")  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["lora=none"], "trainer.strategy: shards the frozen base of one adapter"),
        (["lora=qv", "callbacks=scores"], "callbacks.scores: cannot decode with a sharded base"),
        (
            ["lora=qv", "data.eval_batch_size=1"],
            "data.eval_batch_size: a batch of 1 rows is too small for 2 devices",
        ),
    ],
)
def test_what_cannot_be_sharded_is_refused(tmp_path, tiny, more, message):
    done = script("train", *tiny, *TWO[1:], "trainer=fsdp", *more, f"hydra.run.dir={tmp_path}")
    assert done.returncode == 1
    assert message in done.stderr


@pytest.mark.slow
def test_jobs_given_to_a_launcher_of_a_cluster(tmp_path, tiny):
    """submitit's local executor stands for SLURM."""
    done = script("train", "-m", *tiny, "lora=qv", "trainer.max_epochs=1", "lora.rank=1,2",
                  "hydra/launcher=submitit_local", f"hydra.sweep.dir={tmp_path}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [Job.read(tmp_path / name).state for name in "01"] == [State.finished] * 2
