"""Lightning's metrics.csv, of which no row is lost that was written once."""

import csv
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
    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        with open(self.metrics_file_path, encoding="utf-8", newline="") as old:
            rows = list(csv.DictReader(old))
        with replacing(self.metrics_file_path) as path, open(path, "w", encoding="utf-8", newline="") as new:
            writer = csv.DictWriter(new, fieldnames)
            writer.writeheader()
            writer.writerows(rows)
