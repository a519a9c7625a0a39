"""One training step, of the run itself and of the trials that choose its learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from ..batchnorm.renorm_limits import RenormScheduler
from ..images.class_folders import LabelledBatch
from ..support.processes import Ranks
from .classifier import Classifier, batch_totals, cross_entropy
from .metrics import Totals
from .settings import TrainingSettings
from .stopping import StopCheck


@dataclass(frozen=True)
class TrainingStep:
    """Takes the steps that train a classifier.

    Args:
        classifier: The network.
        optimizer: Its optimizer.
        renorm_scheduler: Sets the limits of Batch Renormalization after each step.
        settings: Settings of the run.
        ranks: The processes of the run.
        stop: Polled in each step.
    """

    classifier: Classifier
    optimizer: torch.optim.Optimizer
    renorm_scheduler: RenormScheduler | None
    settings: TrainingSettings
    ranks: Ranks
    stop: StopCheck

    def take(self, batches: Iterable[LabelledBatch], images: int, rate: float) -> tuple[Totals, bool]:
        """Accumulate the gradients of some batches and update the weights, unless the loss is not finite.

        Args:
            batches: The batches of the step in this process.
            images: Number of their images.
            rate: Learning rate of the step.

        Returns:
            The totals over all processes, and whether any of them was asked to stop.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        figures = self._accumulate(batches, images)
        # One exchange per step: all ranks stop, and see that the loss is not finite, after the same step.
        asked = figures.new_tensor([self.stop.requested()])
        *sums, stopping = self.ranks.total(torch.cat([figures, asked])).tolist()
        totals = Totals(*sums)
        if math.isfinite(totals.mean_loss):
            self.optimizer.step()
            if self.renorm_scheduler:
                self.renorm_scheduler.step()
        return totals, stopping > 0 or self.stop.alone()

    def _accumulate(self, batches: Iterable[LabelledBatch], images: int) -> Float64[Tensor, " totals"]:
        """Accumulate the gradients of the batches of a step, which have `images` images, and return their totals."""
        figures, seen = None, 0
        for batch in batches:
            inputs, labels = self.classifier.inputs(batch)
            seen += len(labels)
            with self.classifier.without_exchange() if seen < images else nullcontext():
                logits = self.classifier.training_logits(inputs)
                loss = cross_entropy(logits, labels, self.settings.label_smoothing)
                (loss if len(labels) == images else loss * (len(labels) / images)).backward()
            totals = batch_totals(loss, logits, labels)
            figures = totals if figures is None else figures + totals
        if figures is None:
            raise RuntimeError("a step without a batch")
        return figures
