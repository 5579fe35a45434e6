"""The file of metrics, where the disk is full when a column is added."""

import csv
import errno

import pytest

from lora_gpt2 import runs
from lora_gpt2.errors import UserError
from lora_gpt2.reporting.metrics import Metrics
from tests.conftest import settings_of


@pytest.fixture
def logger(tmp_path) -> Metrics:
    """It has written two rows; a third waits."""
    logger = Metrics(tmp_path, name="", version="")
    for step, row in enumerate([{"train/loss": 4.0}, {"valid/loss": 3.5}]):
        logger.log_metrics(row, step)
        logger.save()
    return logger


@pytest.fixture
def full(monkeypatch) -> pytest.MonkeyPatch:
    """A disk with room for a part of a row, until it is undone."""

    def writerows(self, rows):
        self.writer.writerow(["0.5"])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(csv.DictWriter, "writerows", writerows)
    return monkeypatch


@pytest.mark.parametrize(
    ("column", "error", "expected"),
    [
        ("valid/bleu", UserError, {"train/loss": {0: 4.0}, "valid/loss": {1: 3.5}, "valid/bleu": {2: 0.5}}),
        ("train/loss", OSError, {"train/loss": {0: 4.0, 2: 0.5}, "valid/loss": {1: 3.5}}),
    ],
    ids=["a column more", "the same columns"],
)
def test_a_full_disk_loses_no_row_and_mixes_none(tmp_path, logger, full, column, error, expected):
    before = (tmp_path / "metrics.csv").read_text()
    logger.log_metrics({column: 0.5}, 2)
    with pytest.raises(error, match=r"No space left"):
        logger.save()
    assert (tmp_path / "metrics.csv").read_text() == before
    full.undo()
    logger.finalize("failed")  # as a trainer does that was interrupted
    assert {name: runs.logged(tmp_path, name) for name in expected} == expected


def test_trainings_log_so():
    assert settings_of("train", []).logger == {"_target_": "lora_gpt2.reporting.metrics.Metrics"}
