"""What W&B's own files hold of a run, read back; and a training that W&B cannot stop."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2

from tests.conftest import cli, script


def records(folder: Path) -> list[Any]:
    """Of the one run that a folder logged offline: a log as LevelDB has them, behind a header of 7 bytes.

    Blocks of 32 KiB hold pieces: checksum (4), length (2), kind (1: whole, 2: first, 3: middle, 4: last).
    """
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, place, found, parts = path.read_bytes(), 7, [], b""
    assert data.startswith(b":W&B")
    while place + 7 <= len(data):
        if _BLOCK - place % _BLOCK < 7:
            place += _BLOCK - place % _BLOCK
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            found.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return found


_BLOCK = 32768


def items(update: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in update}


def test_a_sweep_is_a_group_of_runs_with_config_scalars_and_tables(tmp_path, tiny, run):
    """Each job is a run of its own that ends; resumed, it goes on in the same run."""
    sweep = tmp_path / "ranks"
    options = [*tiny, "lora=qv", f"base={run / 'base'}", "logger=wandb", "logger.offline=true",
               "callbacks=scores", "callbacks.scores.contexts=2", "callbacks.scores.decoding.eval_len=8",
               "trainer.max_epochs=1",
               "trainer.log_every_n_steps=1", "logger.upload_adapter=true"]  # fmt: skip
    done = script("train", "-m", *options, "lora.rank=1,2", f"hydra.sweep.dir={sweep}")
    assert done.returncode == 0, done.stderr
    ids = set()
    for number, rank in enumerate((1, 2)):
        found = records(sweep / str(number))
        (about,) = (record.run for record in found if record.WhichOneof("record_type") == "run")
        assert (about.run_group, about.display_name) == ("ranks", f"lora.rank={rank}")
        assert about.project == "lora-gpt2"
        config = items(about.config.update)
        for record in found:
            config.update(items(record.config.update))
        assert config["lora"]["rank"] == rank
        assert config["optimizer"]["lr"] == 0.01
        history = [items(r.history.item) for r in found if r.WhichOneof("record_type") == "history"]
        seen = {name for row in history for name in row}
        assert {"train/loss", "valid/loss", "valid/perplexity", "valid/token_accuracy", "lr",
                "tokens_per_second", "memory_gb", "valid/bleu", "predictions/path"} <= seen  # fmt: skip
        (table,) = (sweep / str(number)).glob("wandb/offline-run-*/files/media/table/predictions_*.json")
        held = json.loads(table.read_text())
        assert held["columns"] == ["step", "input", "references", "prediction"]
        assert len(held["data"]) == 2
        assert any(record.WhichOneof("record_type") == "exit" for record in found), "the run has ended"
        artifacts = [r for r in found if r.WhichOneof("record_type") in ("request", "artifact")]
        assert any("adapter" in str(record) for record in artifacts)
        ids.add(about.run_id)
    assert len(ids) == 2
    send_the_report(sweep)


def send_the_report(sweep: Path) -> None:
    """One run more in the group, with the page, heat map and all, and a table of ranks and alphas."""
    assert cli("report", sweep, "--wandb", WANDB_MODE="offline").returncode == 0
    found = records(sweep)
    (about,) = (record.run for record in found if record.WhichOneof("record_type") == "run")
    assert (about.run_group, about.display_name, about.job_type) == ("ranks", "report", "report")
    (logged,) = [items(r.history.item) for r in found if r.WhichOneof("record_type") == "history"]
    assert logged["report/_type"] == "html-file"
    (html,) = sweep.glob("wandb/offline-run-*/files/media/html/*.html")
    assert "valid_loss by rank and alpha" in html.read_text(encoding="utf-8")
    (table,) = sweep.glob("wandb/offline-run-*/files/media/table/*.json")
    held = json.loads(table.read_text())
    assert held["columns"][:4] == ["run", "lora.rank", "lora.alpha", "valid_loss"]
    assert {tuple(row[:2]) for row in held["data"]} == {("rank 1", 1), ("rank 2", 2)}


def test_a_report_of_runs_that_were_not_logged_is_not_sent(swept):
    done = cli("report", swept, "--wandb", WANDB_MODE="offline")
    assert done.returncode == 1
    assert "none of these runs was logged there" in done.stderr


def test_a_bogus_key_and_no_network_do_not_stop_a_training(tmp_path, tiny):
    """The key is in none of the files that the run leaves."""
    key = "0123456789abcdef" * 2 + "deadbeef"
    nowhere = {"WANDB_API_KEY": key, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = script(
        "train", *tiny, "logger=wandb", "trainer.max_steps=2", f"hydra.run.dir={tmp_path}", **nowhere
    )
    assert done.returncode == 0, done.stderr
    assert "logged offline" in done.stdout
    assert (tmp_path / "model.safetensors").is_file()
    assert records(tmp_path)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or key.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("resumed_in", ["same", "other"])
def test_a_resumed_run_goes_on_in_the_same_run(tmp_path, tiny, resumed_in):
    place, options = tmp_path / "same", [*tiny, "logger=wandb", "logger.offline=true"]
    assert script("train", *options, "trainer.max_epochs=1", f"hydra.run.dir={place}").returncode == 0
    first = json.loads((place / "wandb.json").read_text())["id"]
    again = tmp_path / resumed_in
    done = script("train", *options, "trainer.max_epochs=2", f"resume={place}", f"hydra.run.dir={again}")
    assert done.returncode == 0, done.stderr
    assert json.loads((again / "wandb.json").read_text())["id"] == first
