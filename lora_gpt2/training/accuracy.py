"""What is reported of a stage: loss, perplexity and accuracies, right over batches and ranks."""

import math

from torch import Tensor, nn
from torchmetrics import MeanMetric

from lora_gpt2.model.loss import CompletionReport


class StageMetrics(nn.Module):
    """Token-weighted loss, perplexity and accuracy; first-token and all-token accuracy by row."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = MeanMetric(nan_strategy=math.nan)  # which stays one
        self.token_accuracy = MeanMetric()
        self.first_token_accuracy = MeanMetric()
        self.all_token_accuracy = MeanMetric()

    def update(self, report: CompletionReport) -> None:
        if report.tokens == 0:
            return
        self.loss.update(report.loss_sum / report.tokens, report.tokens)
        self.token_accuracy.update(report.hit_sum / report.tokens, report.tokens)
        self.first_token_accuracy.update(report.accuracy.first)
        self.all_token_accuracy.update(report.accuracy.all)

    def compute(self) -> dict[str, Tensor]:
        """Values over everything seen since the last reset, over all ranks; loss in nats per token."""
        loss = self.loss.compute()
        return {
            "loss": loss,
            "perplexity": loss.exp(),
            "token_accuracy": self.token_accuracy.compute(),
            "first_token_accuracy": self.first_token_accuracy.compute(),
            "all_token_accuracy": self.all_token_accuracy.compute(),
        }

    def reset(self) -> None:
        for metric in self.children():
            metric.reset()  # type: ignore[operator]  # every child is a MeanMetric
