"""Differences between the outputs of two models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError, as_passed
from ..graph.copies import working_copy
from ..graph.inputs import Inputs
from ..graph.outputs import tensors_of
from ..statistics.pass_options import ProgressCallback
from ..statistics.passes import NumberedBatch, failures_named, for_each_batch, preserved_random_state


@dataclass(frozen=True)
class Comparison:
    """Differences of a candidate's outputs from a reference's, over all images.

    Attributes:
        images: Number of images.
        max_abs: Largest absolute difference.
        max_rel: Largest relative difference of an image: its largest absolute difference, divided by its largest
            absolute reference output.
        top1_agreement: Fraction of images (for dense prediction: of positions) with the same largest class; NaN where
            outputs have fewer than two classes.
        bit_identical: Whether every output equals its reference exactly (+0 and -0 count as equal).
        random: Whether a model draws random numbers from PyTorch in eval mode, as a variational autoencoder does, and a
            forward that calls `F.dropout` without `training=self.training`. On one device, both draw the same.
    """

    images: int
    max_abs: float
    max_rel: float
    top1_agreement: float
    bit_identical: bool
    random: bool = False

    def within(self, atol: float | None = None, rtol: float | None = None) -> bool:
        """Return whether no difference is larger than is allowed.

        Args:
            atol: Bound on `max_abs`; None for no bound.
            rtol: Bound on `max_rel`; None for no bound.
        """
        return (atol is None or self.max_abs <= atol) and (rtol is None or self.max_rel <= rtol)


def compare_outputs(
    reference: nn.Module, candidate: nn.Module, batches: Iterable[Any], *, progress: ProgressCallback | None = None
) -> Comparison:
    """Run both models in eval mode on the same inputs, and return the differences of their outputs.

    Each model runs on its own device and in its own dtype. Several outputs (tuples, lists, dicts) are compared one by
    one; top-1 agreement is that of the first. Models that draw random numbers in eval mode draw the same on one device.
    The models are not changed, and PyTorch's random state is restored.

    Args:
        reference: The model whose outputs are taken as correct. If it is a DataParallel, DistributedDataParallel or
            compiled model, the module inside it runs.
        candidate: The model to compare with it.
        batches: As for `insert_batchnorm`.
        progress: Called after each batch with the number of images so far.

    Raises:
        CalibrationError: If there are no images, outputs differ in shape, the reference's outputs are not finite, or a
            model cannot run on a batch.

    Examples:
        >>> model = nn.Linear(4, 3)
        >>> compare_outputs(model, model, [torch.rand(8, 4)]).bit_identical
        True
    """
    reference, candidate = working_copy(reference), working_copy(candidate)  # a forward may change its module
    differences = _Differences()

    def run(batch: NumberedBatch) -> None:
        with preserved_random_state():
            before = _random_states()
            expected = _outputs("reference", reference, batch)
            differences.random |= not all(map(torch.equal, before, _random_states()))
        actual = _outputs("candidate", candidate, batch)
        differences.random |= not all(map(torch.equal, before, _random_states()))
        _check(expected, actual, batch.number)
        differences.add(expected, actual)

    images = for_each_batch(reference, batches, run, progress=progress)
    if images == 0:
        raise CalibrationError("there are no images to compare the outputs on: the iterable yielded no batches")
    return differences.comparison(images)


def finite_part(model: nn.Module) -> tuple[nn.Module, str]:
    """Return the part of a model whose parameters are finite, and a remark for the user.

    torchvision has VGG16 weights with a NaN classifier, which are meant for their features (IMAGENET1K_FEATURES).

    Args:
        model: Any network; it is not changed.

    Returns:
        For a VGG whose classifier contains NaN or Inf, everything before it, with a remark that says so; for any other
        model, the model itself with an empty remark.
    """
    from torchvision.models import VGG  # noqa: PLC0415 - takes a second, and the API works without it

    # The sum is finite only where all values are, and takes a fifth of the time; since it may overflow, a sum that is
    # not finite is checked value by value.
    if not isinstance(model, VGG) or all(
        parameter.sum().isfinite() or parameter.isfinite().all() for parameter in model.classifier.parameters()
    ):
        return model, ""
    part = nn.Sequential(model.features, model.avgpool)
    return part, "The classifier contains NaN or Inf, so outputs are compared before it."


@dataclass
class _Differences:
    """Differences over the batches so far."""

    max_abs: float = 0.0
    max_rel: float = 0.0
    agreeing: int = 0
    predictions: int = 0
    bit_identical: bool = True
    random: bool = False

    def add(self, expected: Sequence[Tensor], actual: Sequence[Tensor]) -> None:
        """Include one batch: its outputs from the reference and from the candidate, with the images in dimension 0."""
        for reference, candidate in zip(expected, actual, strict=True):
            self.bit_identical &= torch.equal(reference, candidate)
            if not reference.numel():  # a detector that finds nothing
                continue
            wide = torch.complex128 if reference.is_complex() else torch.float64
            values, others = (tensor.to(wide).reshape(len(tensor), -1) for tensor in (reference, candidate))
            difference = torch.where(values == others, 0, others - values)  # for equal infinities, it would be NaN
            # An output that is NaN exceeds every bound.
            largest = difference.abs().nan_to_num(nan=torch.inf, posinf=torch.inf).amax(1)
            scale = torch.where(values.isfinite(), values, 0).abs().amax(1)
            self.max_abs = max(self.max_abs, float(largest.max()))
            self.max_rel = max(self.max_rel, float(torch.where(largest == 0, 0.0, largest / scale).max()))
        logits, candidate_logits = expected[0], actual[0]
        if logits.ndim > 1 and logits.shape[1] > 1 and not logits.is_complex():
            same = logits.argmax(1) == candidate_logits.argmax(1)
            self.agreeing += int(same.sum())
            self.predictions += same.numel()

    def comparison(self, images: int) -> Comparison:
        """Return the differences over all batches."""
        agreement = self.agreeing / self.predictions if self.predictions else float("nan")
        return Comparison(images, self.max_abs, self.max_rel, agreement, self.bit_identical, self.random)


def _random_states() -> list[Tensor]:
    """Return the states of PyTorch's random number generators, on all devices."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())]


def _outputs(role: str, model: nn.Module, batch: NumberedBatch) -> list[Tensor]:
    inputs = Inputs.of(batch.value, batch.number, model)
    with failures_named(f"the {role} ({type(model).__name__})", batch):
        outputs = inputs.run(model)
    return [leaf.cpu().reshape(leaf.shape or (1,)) for leaf in tensors_of(outputs)]


def _check(expected: Sequence[Tensor], actual: Sequence[Tensor], number: int) -> None:
    shapes = [tuple(output.shape) for output in expected], [tuple(output.shape) for output in actual]
    match shapes:
        case [(images, reference)], [(as_many, candidate)] if images == as_many and reference != candidate:
            a, b = as_passed("reference", option="A"), as_passed("candidate", option="B")
            raise CalibrationError(
                f"the two models' outputs cannot be compared: {a} returns {reference} outputs for each image, {b} "
                f"{candidate}"
            )
    if shapes[0] != shapes[1] or not expected:
        raise CalibrationError(f"the two models' outputs cannot be compared: shapes {shapes[0]} and {shapes[1]}")
    if not all(map(_is_usable, expected)):
        raise CalibrationError(
            f"the reference's outputs are not finite on batch {number}; compare a submodule that ends before the layer "
            "that produces them"
        )


def _is_usable(output: Tensor) -> bool:
    """Return whether an output is finite, but for -inf, which a forward may fill in for masked classes."""
    usable = output.isfinite()
    return bool((usable if output.is_complex() else usable | output.isneginf()).all())
