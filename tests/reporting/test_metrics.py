"""The file of metrics, where the disk is full when a column is added."""

import csv
import errno

import pytest

from lora_gpt2 import runs
from lora_gpt2.errors import UserError
from lora_gpt2.reporting.metrics import Metrics
from tests.conftest import settings_of


def test_a_full_disk_loses_no_row_when_a_column_is_added(tmp_path, monkeypatch):
    def full(self, rows):
        raise OSError(errno.ENOSPC, "No space left on device")

    logger = Metrics(tmp_path, name="", version="")
    for step, row in enumerate([{"train/loss": 4.0}, {"valid/loss": 3.5}]):
        logger.log_metrics(row, step)
        logger.save()
    logger.log_metrics({"valid/bleu": 0.5}, 2)
    monkeypatch.setattr(csv.DictWriter, "writerows", full)
    with pytest.raises(UserError, match="what was there is kept; make room"):
        logger.save()
    assert runs.logged(tmp_path, "train/loss") == {0: 4.0}
    assert runs.logged(tmp_path, "valid/loss") == {1: 3.5}


def test_trainings_log_so():
    assert settings_of("train", []).logger == {"_target_": "lora_gpt2.reporting.metrics.Metrics"}
