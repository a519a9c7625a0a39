"""How a network in train mode, which normalizes by the batch, differs from itself in eval mode."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..batchnorm.batch_renorm import BatchRenorm
from ..batchnorm.modes import set_batchnorm_mode, uses_batch_statistics
from ..errors import CalibrationError, as_passed, values_as_passed
from ..graph.copies import protected_parameters, working_copy
from ..graph.inputs import Inputs
from ..statistics.pass_options import ProgressCallback
from ..statistics.passes import NumberedBatch, failures_named, for_each_batch
from ..support.arguments import as_tuple, check_flags, is_whole
from ..support.text import counted
from .evaluation import first_output, first_tensor

BATCH_SIZES = (4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class TrainModeAgreement:
    """Differences of train mode from eval mode with batches of one size.

    Attributes:
        batch_size: Number of images in a batch.
        images: Number of images that were run, in full batches.
        top1_agreement: Fraction of them (for dense prediction: of positions) with the same largest class.
        kl_divergence: Kullback-Leibler divergence of the class probabilities in train mode from those in eval mode,
            KL(eval || train), in nats; mean over images or positions.
        relative_logit_error: Euclidean norm of the difference of all logits, divided by that of eval mode's logits.
    """

    batch_size: int
    images: int
    top1_agreement: float
    kl_divergence: float
    relative_logit_error: float

    @property
    def top1_margin(self) -> float:
        """Margin of `top1_agreement` as an estimate for all such images, at 95% confidence; also a fraction.

        Two binomial standard errors, with two images added that agree and two that do not: without them, the margin of
        a perfect agreement would be 0. For dense prediction, images are counted rather than positions, because the
        positions of one image resemble each other.

        Source: Agresti and Coull, "Approximate is better than 'exact' for interval estimation of binomial proportions",
        The American Statistician 52(2), 1998.
        """
        agreeing, images = self.top1_agreement * self.images + 2, self.images + 4
        return 2 * float(agreeing / images * (1 - agreeing / images) / images) ** 0.5

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the margin as JSON-ready data."""
        return asdict(self) | {"top1_margin": self.top1_margin}


def train_mode_agreement(
    model: nn.Module,
    batches: Iterable[Any],
    batch_sizes: Sequence[int] = BATCH_SIZES,
    *,
    renorm: bool = False,
    device: torch.device | str | None = None,
    progress: ProgressCallback | None = None,
) -> list[TrainModeAgreement]:
    """Return, for each batch size, how much a model in train mode differs from itself in eval mode.

    In train mode, BatchNorm normalizes by the batch, so the optimizer sees a different function from that of eval mode;
    the smaller the batches, the larger the difference. Only BatchNorms are put in train mode, each in its own mode
    (`set_batchnorm_mode`): dropout stays off, frozen BatchNorms keep normalizing by their running statistics, and those
    that renormalize do so within their limits, using only the batch of this process. The model and its running
    statistics are not changed, and PyTorch's random state is restored.

    Args:
        model: A network that returns logits, with the classes in dimension 1. If it has several outputs (tuples, lists,
            dicts), the first is used.
        batches: As for `insert_batchnorm`, best in random order; iterated once. The images are regrouped, in order,
            into batches of each size; a last batch that is not full is dropped.
        batch_sizes: Batch sizes to measure. Those larger than the number of images are left out of the result.
        renorm: Put all BatchNorms in the mode "renorm" without limits first, whatever mode the model's are in.
        device: Where to run; by default the model's device.
        progress: Called after each batch with the number of images so far.

    Returns:
        One entry for each batch size, in the order given.

    Raises:
        CalibrationError: If no BatchNorm of the model normalizes by the batch, outputs are not logits of two or more
            classes or are not finite, there are fewer images than the smallest batch size, images differ in shape, or
            the model cannot run on a batch.
        TrainingError: With `renorm`, if a BatchNorm cannot renormalize; see `set_batchnorm_mode`.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        >>> [agreement.batch_size for agreement in train_mode_agreement(model, [torch.rand(50, 4)], (8, 32, 128))]
        [8, 32]
    """
    sizes = as_tuple(batch_sizes)
    if not sizes or not all(is_whole(size) and size >= 1 for size in sizes):
        raise CalibrationError(
            f"{as_passed('batch_sizes')} is {values_as_passed(batch_sizes)}; pass one or more sizes of 1 or more, as "
            "whole numbers"
        )
    check_flags(CalibrationError, renorm=renorm)
    evaluated, trained = working_copy(model, device), working_copy(model, device)
    if renorm:
        set_batchnorm_mode(trained, "renorm")
    _use_batch_statistics(trained)
    totals = [_Totals(size) for size in dict.fromkeys(sizes)]

    def run(batch: NumberedBatch) -> None:
        images = _only_tensor(batch.inputs)
        with failures_named("the model in eval mode", batch), protected_parameters(evaluated):
            outputs = first_output(evaluated, batch.inputs.mapped(torch.clone))  # it may change them in place
        logits = _logits(outputs, "eval", batch)
        for total in totals:
            total.add(trained, images, logits)

    images = for_each_batch(evaluated, batches, run, progress=progress)
    results = [total.result() for total in totals if total.images]
    if not results:
        raise CalibrationError(
            f"{counted(images, 'image')} {'does' if images == 1 else 'do'} not fill one batch of the smallest size, "
            f"{min(sizes)}; use more images, or a smaller size"
        )
    return results


def smallest_agreeing(agreements: Iterable[TrainModeAgreement], least: float = 0.95) -> int | None:
    """Return the smallest batch size at and above which the top-1 agreement is at least `least`; None if there is none.

    Args:
        agreements: From `train_mode_agreement`.
        least: Fraction between 0 and 1.

    Examples:
        >>> found = [TrainModeAgreement(size, 64, top1, 0.1, 0.1) for size, top1 in ((4, 0.7), (8, 0.96), (16, 0.98))]
        >>> smallest_agreeing(found)
        8
    """
    smallest = None
    for agreement in sorted(agreements, key=lambda each: each.batch_size, reverse=True):
        if not agreement.top1_agreement >= least:
            break
        smallest = agreement.batch_size
    return smallest


def agreement_reading(
    agreements: Sequence[TrainModeAgreement], least: float = 0.95, *, renorm: Sequence[TrainModeAgreement] = ()
) -> str:
    r"""Return a sentence that names the smallest batch size with a top-1 agreement of at least `least`.

    The next sentence states the largest margin of the agreements; see `TrainModeAgreement.top1_margin`.

    Args:
        agreements: From `train_mode_agreement`.
        least: Fraction between 0 and 1.
        renorm: From `train_mode_agreement` with `renorm=True`, for a third sentence.

    Examples:
        >>> print(*agreement_reading([TrainModeAgreement(8, 64, 0.97, 0.1, 0.1)]).split(". "), sep=".\n")
        Train mode keeps at least 95% of the top-1 classes at batch sizes of 8 and above.
        This was measured on 64 images; the margin is at most ± 5.7 points.
    """
    least_certain = max(agreements, key=lambda agreement: agreement.top1_margin)
    further = (
        f" This was measured on {least_certain.images:,} images; the margin is at most ± "
        f"{100 * least_certain.top1_margin:.2g} points."
    )
    if renorm:
        lowest = min(agreement.top1_agreement for agreement in renorm)
        further += (
            f" With Batch Renormalization it keeps {100 * lowest:.4g}% at batch sizes of "
            f"{min(agreement.batch_size for agreement in renorm)} and above."
        )
    smallest = smallest_agreeing(agreements, least)
    if smallest is not None:
        return (
            f"Train mode keeps at least {100 * least:g}% of the top-1 classes at batch sizes of {smallest} and above."
            f"{further}"
        )
    largest = max(agreement.batch_size for agreement in agreements)
    return (
        f"Train mode keeps less than {100 * least:g}% of the top-1 classes, even at a batch size of {largest}. If you "
        f"keep the output layer, train with larger batches, or with Batch Renormalization; if it is replaced, "
        f"nothing needs to be done.{further}"
    )


def _use_batch_statistics(network: nn.Module) -> None:
    """Make a working copy's BatchNorms compute as in train mode, without updating running statistics."""
    name, norms = type(network).__name__, [each for each in network.modules() if isinstance(each, _BatchNorm)]
    if not norms:
        insert = as_passed("insert_batchnorm", option="bn-insert insert")
        raise CalibrationError(
            f"{name} has no BatchNorm, so both modes are the same; insert BatchNorm first ({insert})"
        )
    norms = [each for each in norms if uses_batch_statistics(each)]
    if not norms:
        raise CalibrationError(
            f"{name} has no BatchNorm that normalizes by the batch in train mode, so both modes are the same"
        )
    for norm in norms:
        if isinstance(norm, BatchRenorm):
            norm.training, norm.momentum, norm.synchronize = True, 0.0, False
            continue
        # Without them, eval mode also normalizes by the batch, and SyncBatchNorm does not wait for other processes.
        norm.running_mean, norm.running_var = None, None


@dataclass
class _Totals:
    """Sums over the batches of one size so far, and the images that do not fill a batch yet."""

    size: int
    images: int = 0
    predictions: int = 0
    agreeing: int = 0
    divergence: float = 0.0
    squared_error: float = 0.0
    squared_logits: float = 0.0
    waiting: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, network: nn.Module, inputs: Tensor, logits: Tensor) -> None:
        """Add images with their logits in eval mode, and run the batches that they fill."""
        shapes = {tuple(images.shape[1:]) for images in (inputs, *(images for images, _ in self.waiting))}
        if len(shapes) > 1:
            raise CalibrationError(
                f"images of shapes {' and '.join(map(str, sorted(shapes)))} cannot be put into one batch; crop them "
                "to one shape"
            )
        self.waiting.append((inputs, logits))
        if sum(len(images) for images, _ in self.waiting) < self.size:
            return
        all_inputs, all_logits = (torch.cat(parts) for parts in zip(*self.waiting, strict=True))
        full = len(all_inputs) // self.size * self.size
        for images, expected in zip(
            all_inputs[:full].split(self.size), all_logits[:full].split(self.size), strict=True
        ):
            self._compare(expected, _train_logits(network, images))
        self.waiting = [(all_inputs[full:], all_logits[full:])] if full < len(all_inputs) else []

    def _compare(self, expected: Tensor, actual: Tensor) -> None:
        expected_rows, actual_rows = _rows(expected), _rows(actual)
        self.images += len(expected)
        self.predictions += len(expected_rows)
        self.agreeing += int((expected_rows.argmax(1) == actual_rows.argmax(1)).sum())
        log_probabilities = actual_rows.log_softmax(1), expected_rows.log_softmax(1)
        self.divergence += float(F.kl_div(*log_probabilities, log_target=True, reduction="sum"))
        self.squared_error += float((actual_rows - expected_rows).square().sum())
        self.squared_logits += float(expected_rows.square().sum())

    def result(self) -> TrainModeAgreement:
        """Return the means over all full batches."""
        error = (self.squared_error / self.squared_logits) ** 0.5 if self.squared_logits else float("nan")
        agreement, divergence = self.agreeing / self.predictions, self.divergence / self.predictions
        return TrainModeAgreement(self.size, self.images, agreement, divergence, error)


def _only_tensor(inputs: Inputs) -> Tensor:
    if len(inputs.tensors) > 1:
        raise CalibrationError("train mode can only be measured for a forward that takes one input, not several")
    return inputs.tensors[0]


def _rows(logits: Tensor) -> Tensor:
    """Return one float64 row of logits per image and position, on the CPU: others lack float64."""
    return logits.cpu().double().movedim(1, -1).reshape(-1, logits.shape[1])


def _train_logits(network: nn.Module, images: Tensor) -> Tensor:
    batch = f"a batch of shape {tuple(images.shape)}"
    try:
        with failures_named("the model in train mode", batch), protected_parameters(network):
            outputs = network(images.clone())
        return _logits(first_tensor(outputs), "train", batch)
    except CalibrationError as error:
        if len(images) > 1:
            raise
        reason = "a BatchNorm gets a single value per channel, as after dense layers"
        if "more than 1 value per channel" not in str(error):  # a forward may squeeze() the batch axis away
            reason = str(error)
        raise CalibrationError(
            f"train mode cannot run on one image: {reason}; use batch sizes of 2 or more ({as_passed('batch_sizes')})"
        ) from error


def _logits(logits: Tensor | None, mode: str, batch: object) -> Tensor:
    if logits is None or logits.ndim < 2 or logits.shape[1] < 2:
        shape = "no tensor" if logits is None else f"the shape {tuple(logits.shape)}"
        raise CalibrationError(f"the model's output is {shape}, not logits of two or more classes in dimension 1")
    if not logits.isfinite().all():
        raise CalibrationError(f"the model's logits are not finite in {mode} mode, on {batch}")
    return logits
