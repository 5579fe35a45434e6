"""Runs that are told to stop, disks that are full, files that are not what they seem."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import psutil
import pytest
import torch
from lightning import Callback
from safetensors.torch import load_file

from lora_gpt2 import experiment, jobs
from lora_gpt2.errors import UserError
from lora_gpt2.files import locked
from lora_gpt2.jobs import Job, State
from lora_gpt2.training.callbacks import Progress
from lora_gpt2.weights.store import read_pickle
from tests.conftest import ROOT, script, settings_of, train

LONG = ["trainer.max_epochs=4", "callbacks.progress.every=0", "lora=qv"]
TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]


def stopped(number, *arguments):
    """A training that is told to stop behind its third step; its exit code and what it said.

    Ctrl-C goes to all of its processes, as from a terminal.
    """
    command = [sys.executable, ROOT / "train.py", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    tell = os.killpg if number == signal.SIGINT else os.kill
    said, told = "", False
    for line in process.stdout:
        said += line
        if "step 3/" in line and not told:
            tell(process.pid, number)
            told = True
    return process.wait(timeout=120), said


@pytest.mark.parametrize(
    ("number", "more"), [(signal.SIGTERM, TWO), (signal.SIGINT, []), (signal.SIGUSR1, [])], ids=str
)
def test_a_run_that_is_told_to_stop_goes_on_to_the_same_weights(tmp_path, tiny, number, more):
    whole, broken, resumed = (tmp_path / name for name in ("whole", "broken", "resumed"))
    arguments = [*tiny, *LONG, *more]
    slow = "+callbacks.slow={_target_: tests.training.test_checkpoints.Slow}"
    code, said = stopped(number, *arguments, slow, f"hydra.run.dir={broken}")
    assert code == 128 + number, said
    assert f"{number.name}: stopped behind step" in said
    assert f"go on with resume={broken}" in said
    assert "Traceback" not in said
    assert not (broken / "adapter.safetensors").exists()
    again = script("train", *arguments, slow, f"hydra.run.dir={broken}")
    told = f"{broken}: holds the checkpoint of a run that has not come to its end; go on with resume={broken}"
    assert (again.returncode, again.stderr.splitlines()) == (1, [f"{told}, or give another hydra.run.dir"])
    for folder, add in ((whole, []), (resumed, [f"resume={broken}"])):
        done = script("train", *arguments, *add, f"hydra.run.dir={folder}")
        assert done.returncode == 0, done.stderr
        behind = re.search(rf"goes on behind step [1-9]\d* of {broken}/checkpoints/last.ckpt", done.stdout)
        assert bool(behind) == bool(add)
    expected, got = (load_file(folder / "adapter.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(got[name], weight) for name, weight in expected.items())


class Slow(Callback):
    """Leaves time to send a signal."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("number", "more"), [(signal.SIGTERM, []), (signal.SIGTERM, TWO), (signal.SIGINT, TWO)], ids=str
)
def test_a_sweep_that_is_told_to_stop_begins_no_other_job(tmp_path, tiny, number, more):
    slow = "+callbacks.slow={_target_: tests.training.test_checkpoints.Slow}"
    where = f"hydra.sweep.dir={tmp_path}"
    code, said = stopped(number, "-m", *tiny, *LONG, *more, slow, "seed=1,2", where)
    assert code == 128 + number, said
    assert "Traceback" not in said
    assert not (tmp_path / "1").exists()
    assert (tmp_path / "0" / "checkpoints" / "last.ckpt").is_file()
    deadline = time.monotonic() + 30
    while any(
        str(tmp_path) in " ".join(one.info["cmdline"] or []) for one in psutil.process_iter(["cmdline"])
    ):
        assert time.monotonic() < deadline, "its processes live on"
        time.sleep(0.2)


class Told(Callback):
    """Is told to stop in the validation behind the last step."""

    def on_validation_start(self, trainer, pl_module):
        if trainer.global_step == trainer.max_steps:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("more", [[], TWO], ids=["one device", "two"])
def test_a_signal_behind_the_last_step_is_obeyed_when_all_is_saved(tmp_path, tiny, more):
    told = "+callbacks.told={_target_: tests.training.test_checkpoints.Told}"
    arguments = [
        "-m",
        *tiny,
        *more,
        "lora=qv",
        "trainer.max_steps=6",
        "seed=1,2",
        "score=valid",
        "decoding.eval_len=16",
    ]
    done = script("train", *arguments, told, f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "SIGTERM: stopped behind the last step, go on with resume=" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["0"]
    assert (tmp_path / "0" / "adapter.safetensors").is_file()
    assert not (tmp_path / "0" / "scores.json").exists()
    assert Job.read(tmp_path / "0").error == "Stopped: SIGTERM"


@pytest.mark.parametrize(
    ("number", "more"), [(signal.SIGTERM, TWO), (signal.SIGINT, []), (signal.SIGUSR1, [])], ids=str
)
def test_decoding_that_is_told_to_stop_keeps_what_is_done(tmp_path, run, tiny_corpus, number, more):
    told = f"+callbacks.told={{_target_: tests.training.test_checkpoints.Decoded, number: {int(number)}}}"
    arguments = ["data=jsonl", f"data.root={tiny_corpus}", "split=train", f"adapter={run / 'adapter'}"]
    slow = ["decoding.batch_size=1", "decoding.eval_len=16", told, f"hydra.run.dir={tmp_path}"]
    done = script("generate", *arguments, *slow, *more)
    assert done.returncode == 128 + number, done.stderr
    assert f"stopped decoding, what is done is kept in {tmp_path}" in done.stdout
    assert not (tmp_path / "scores.json").exists()
    assert "Traceback" not in done.stderr
    lines = [path.read_bytes().count(b"\n") for path in tmp_path.glob(".part-*.jsonl")]
    assert len(lines) < sum(lines) < 10, "some are done, and not half of them"


class Decoded(Progress):
    """Is told to stop behind the first output of the first process; the others have as much as they like."""

    def __init__(self, number):
        super().__init__(0)
        self.number = number

    def on_decoded(self, total):
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(1)
        elif not self._decoded:
            signal.raise_signal(self.number)
        super().on_decoded(total)


def test_a_folder_belongs_to_one_run(tmp_path, tiny):
    with locked(tmp_path):
        for name, arguments in (("train", tiny), ("generate", ["data=demo", "adapter=/no/where"])):
            done = script(name, *arguments, f"hydra.run.dir={tmp_path}")
            assert done.returncode == 1
            assert "another run writes there; wait for it, or give another folder" in done.stderr
            assert name == "generate" or not (tmp_path / ".hydra").exists()
    assert not (tmp_path / "status.json").exists()


def test_another_run_s_weights_are_not_written_over(tmp_path, tiny):
    train(tmp_path, *tiny, "trainer.max_steps=1")
    given = [*tiny, "trainer.max_steps=1", f"hydra.run.dir={tmp_path}"]
    Job(settings_of("train", given[:-1]).decisive(), State.finished, "today").write(tmp_path)
    done = script("train", *given, "optimizer.weight_decay=0.5", "dry_run=true")
    assert done.returncode == 1
    told = "holds a job of other settings: optimizer.weight_decay 0.01 (here 0.5); give another hydra.run.dir"
    assert done.stderr.splitlines() == [f"{tmp_path}: {told}"]
    assert not (tmp_path / ".hydra").exists()
    assert script("train", *given, "dry_run=true").returncode == 0
    assert (tmp_path / ".hydra").exists()


def test_a_folder_that_cannot_be_made_is_told(tmp_path, tiny):
    (tmp_path / "file").write_text("")
    done = script("train", *tiny, f"hydra.run.dir={tmp_path / 'file'}")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert str(tmp_path / "file") in done.stderr


def test_a_run_goes_on_with_its_own_settings(tmp_path, tiny):
    """Its checkpoint says them, wherever it lies."""
    train(tmp_path, *tiny, "trainer.max_steps=1")
    shutil.copy(tmp_path / "checkpoints" / "last.ckpt", tmp_path / "elsewhere.ckpt")
    for place in (tmp_path, tmp_path / "checkpoints" / "last.ckpt", tmp_path / "elsewhere.ckpt"):
        other = settings_of("train", [*tiny, "optimizer.lr=0.5", "data.batch_size=5", f"resume={place}"])
        with pytest.raises(
            UserError, match=r"data.batch_size \d+ \(here 5\), optimizer.lr .* \(here 0.5\); leave"
        ):
            jobs.check_unclaimed(tmp_path / "new", other)
    fewer = settings_of("train", [*tiny, "trainer.max_steps=0", f"resume={tmp_path}"])
    with pytest.raises(UserError, match=r"its global step is 1 already, trainer.max_steps is 0; give more"):
        jobs.check_unclaimed(tmp_path, fewer)
    longer = settings_of("train", [*tiny, "trainer.max_steps=2", f"resume={tmp_path}"])
    assert jobs.run(longer, tmp_path, lambda *_: 1.0, once=False) == 1.0
    assert Job.read(tmp_path).settings["resume"] is None, "it is still the same job"


def test_a_run_goes_on_over_its_own_rows(tmp_path, tiny, tiny_corpus):
    """The same ones may lie elsewhere by now; the other way round is another order."""
    train(tmp_path / "a", *tiny, "trainer.max_steps=1")
    for name, change in (("moved", lambda lines: lines), ("turned", reversed)):
        shutil.copytree(tiny_corpus, tmp_path / name)
        rows = tmp_path / name / "train.jsonl"
        rows.write_text("".join(change(rows.read_text().splitlines(keepends=True))))
    again = [*tiny, "trainer.max_steps=2", f"resume={tmp_path / 'a'}"]
    train(tmp_path / "b", *again, f"data.root={tmp_path / 'moved'}")
    other = settings_of("train", [*again, f"data.root={tmp_path / 'turned'}"])
    finished = Job(settings_of("train", tiny).decisive(), State.finished, "today", valid_loss=1.5)
    finished.write(tmp_path / "a")
    before = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"of a run over other rows, or in another order; give the corpus"):
        jobs.run(other, tmp_path / "a", experiment.train, once=False)
    after = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert after == before, "it is the finished run that it was"


def test_a_run_that_goes_on_takes_no_other_run_s_folder(tmp_path, tiny):
    for name in "ab":
        train(tmp_path / name, *tiny, "trainer.max_steps=1", f"seed={ord(name)}")
        Job(settings_of("train", [*tiny, f"seed={ord(name)}"]).decisive(), State.finished, "today").write(
            tmp_path / name
        )
    given = [*tiny, f"seed={ord('a')}", f"resume={tmp_path / 'a'}", "dry_run=true"]
    done = script("train", *given, f"hydra.run.dir={tmp_path / 'b'}")
    assert done.returncode == 1
    assert "holds a job of other settings" in done.stderr
    assert script("train", *given, f"hydra.run.dir={tmp_path / 'a'}").returncode == 0
    done = script("train", *given, "optimizer.lr=0.5", f"hydra.run.dir={tmp_path / 'new'}")
    assert "optimizer.lr 0.01 (here 0.5)" in done.stderr
    assert not [path for path in (tmp_path / "new").rglob("*") if path.name != ".lock"], "nothing is noted"


def test_settings_may_name_the_run_s_own_folder(tmp_path, tiny):
    given = [*tiny, "dry_run=true", f"hydra.run.dir={tmp_path}"]
    done = script("train", *given, "+trainer.default_root_dir=${hydra:runtime.output_dir}")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_full_disk_is_one_clear_error_and_the_last_good_file_stays(tmp_path, tiny):
    """The limit on a file's size stands for the disk's."""
    train(tmp_path, *tiny, "lora=qv", "trainer.max_epochs=1")
    last = tmp_path / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    more = [
        "lora=qv",
        "callbacks.last.every_n_train_steps=1",
        f"resume={tmp_path}",
        f"hydra.run.dir={tmp_path}",
    ]
    command = [sys.executable, ROOT / "train.py", *tiny, *more]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) - 1, len(before) - 1))  # noqa: E731
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "cannot be written (File too large); what was there is kept; raise the limit" in done.stderr
    assert "Traceback" not in done.stderr
    assert last.read_bytes() == before
    assert not list(last.parent.glob("*.tmp"))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("nothing", "there is no such file"),
        ("empty.ckpt", "is empty"),
        ("text.ckpt", "is no checkpoint of this"),
    ],
)
def test_a_checkpoint_that_is_none_is_told_in_a_line_before_anything_is_read(tmp_path, given, told):
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "text.ckpt").write_text("weights")
    nowhere = ["data=e2e", "data.root=/no/where", f"hydra.run.dir={tmp_path / 'run'}"]
    done = script("train", *nowhere, f"resume={tmp_path / given}")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert f"{tmp_path / given}: {told}" in done.stderr
    assert not (tmp_path / "run" / "status.json").exists()


@pytest.mark.parametrize("fault", ["a byte", "cut", "compressed"])
def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path, tiny, fault):
    train(tmp_path / "a", *tiny, "lora=qv", "trainer.max_steps=1")
    path = tmp_path / "a" / "checkpoints" / "last.ckpt"
    held = bytearray(path.read_bytes())
    if fault == "compressed":
        with (
            zipfile.ZipFile(path) as old,
            zipfile.ZipFile(tmp_path / "new", "w", zipfile.ZIP_DEFLATED) as new,
        ):
            for part in old.namelist():
                new.writestr(part, old.read(part))
        os.replace(tmp_path / "new", path)
    else:
        at = held.index(
            read_pickle(path)["state_dict"]["model.transformer.h.0.attn.c_attn.lora_A"].numpy().tobytes()
        )
        held[at] ^= 1
        path.write_bytes(held if fault == "a byte" else held[:at])
    message = {"a byte": "is damaged at", "cut": "is damaged", "compressed": "has compressed parts"}
    with pytest.raises(UserError, match=message[fault]):
        train(tmp_path / "b", *tiny, "lora=qv", f"resume={tmp_path / 'a'}")
