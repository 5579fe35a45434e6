"""Lightning's metrics.csv, of which no row is lost that was written once."""

import csv
import os
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from lora_gpt2.files import replacing


class Metrics(CSVLogger):
    """A new column makes the file anew; it takes the old one's place when it is whole."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        self._experiment = self._experiment or _Writer(self.log_dir)
        return self._experiment


class _Writer(ExperimentWriter):
    def save(self) -> None:
        """Writes all rows that wait; on a full disk none, and the file is as it was."""
        if not self.metrics:
            return
        path, known = Path(self.metrics_file_path), self.metrics_keys[:]
        try:
            if self._record_new_keys() or not path.exists():
                self._write_anew(path)
            else:
                self._append(path)
        except Exception:
            self.metrics_keys = known
            raise
        self.metrics = []

    def _write_anew(self, path: Path) -> None:
        """With the rows that are there already, under all names."""
        rows: list[dict[str, Any]] = []
        if path.exists():
            with open(path, encoding="utf-8", newline="") as old:
                rows = list(csv.DictReader(old))
        with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as new:
            writer = csv.DictWriter(new, self.metrics_keys)
            writer.writeheader()
            writer.writerows([*rows, *self.metrics])

    def _append(self, path: Path) -> None:
        size = path.stat().st_size
        try:
            with open(path, "a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self.metrics_keys).writerows(self.metrics)
        except OSError:
            os.truncate(path, size)  # part of a row, perhaps
            raise
