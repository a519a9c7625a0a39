"""Compare two models' outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import CalibrationError
from ..graph.copies import working_copy
from ..graph.inputs import Inputs
from ..statistics.passes import Progress, checked, preserved_random_state


@dataclass(frozen=True)
class Comparison:
    """How far a candidate's outputs are from a reference's, over all images.

    images: their number. max_abs: largest absolute difference. max_rel: the largest, over the images, of an image's
    largest absolute difference divided by its largest absolute reference output. top1_agreement: fraction of images
    (for dense prediction: positions) with the same largest class, nan where outputs have fewer than two. bit_identical:
    every output equals its reference exactly (+0 and -0 count as equal).
    """

    images: int
    max_abs: float
    max_rel: float
    top1_agreement: float
    bit_identical: bool

    def within(self, atol: float | None = None, rtol: float | None = None) -> bool:
        """Say whether both bounds hold; None means no bound."""
        return (atol is None or self.max_abs <= atol) and (rtol is None or self.max_rel <= rtol)


def compare_outputs(
    reference: nn.Module, candidate: nn.Module, batches: Iterable[Any], *, progress: Progress | None = None
) -> Comparison:
    """Run both models in eval mode on the same inputs and return how far the outputs are apart.

    batches: as for `insert_batchnorm`.  Each model runs where it is, in its own dtype; of a DataParallel,
    DistributedDataParallel or compiled model the module in it.  Several outputs (tuples, lists,
    dicts) are compared one by one; top-1 is taken from the first.  Training flags and random state are put back.
    progress: called after each batch with the number of images so far.
    Raises CalibrationError for no data, outputs of different shapes, and reference outputs that are not finite.

    >>> model = nn.Linear(4, 3)
    >>> compare_outputs(model, model, [torch.rand(8, 4)]).bit_identical
    True
    """
    images, max_abs, max_rel, identical = 0, 0.0, 0.0, True
    agreeing, predictions = 0, 0
    reference, candidate = working_copy(reference), working_copy(candidate)  # what a forward leaves in them is lost
    with preserved_random_state(), torch.inference_mode():
        for number, batch in enumerate(checked(batches)):
            inputs = Inputs.of(batch, number, reference)
            if len(inputs) == 0:
                continue
            expected = _outputs(reference, inputs, number)
            actual = _outputs(candidate, Inputs.of(batch, number, candidate), number)
            _check(expected, actual, number)
            for position, (e, a) in enumerate(zip(expected, actual, strict=True)):
                # An output that is NaN is off by more than any bound.
                difference = (a.double() - e.double()).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
                worst = difference.reshape(len(e), -1).amax(1)
                scale = e.double().abs().reshape(len(e), -1).amax(1)
                identical &= torch.equal(e, a)
                max_abs = max(max_abs, float(worst.max()))
                max_rel = max(max_rel, float(torch.where(worst == 0, 0.0, worst / scale).max()))
                if position == 0 and e.ndim > 1 and e.shape[1] > 1:
                    same = e.argmax(1) == a.argmax(1)
                    agreeing, predictions = agreeing + int(same.sum()), predictions + same.numel()
            images += len(expected[0])
            if progress:
                progress(images)
    if images == 0:
        raise CalibrationError("nothing to compare on: no batch arrived")
    agreement = agreeing / predictions if predictions else float("nan")
    return Comparison(images, max_abs, max_rel, agreement, identical)


def finite_part(model: nn.Module) -> tuple[nn.Module, str]:
    """Return the part of a VGG in front of a classifier that holds NaN or Inf, and a remark; else the model and "".

    torchvision ships VGG16 weights with a NaN classifier, meant for their features alone (IMAGENET1K_FEATURES).
    """
    from torchvision.models import VGG  # noqa: PLC0415 - takes a second, and the API works without it

    # The sum is finite only where all values are, and five times as fast; it may overflow, which is looked into.
    if not isinstance(model, VGG) or all(
        parameter.sum().isfinite() or parameter.isfinite().all() for parameter in model.classifier.parameters()
    ):
        return model, ""
    part = nn.Sequential(model.features, model.avgpool)
    return part, "The classifier holds NaN or Inf: outputs are compared in front of it."


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold a model in eval mode, and put the training flag of every module back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def _outputs(model: nn.Module, inputs: Inputs, number: int) -> list[Tensor]:
    try:
        outputs = inputs.run(model)
    except Exception as error:  # the user's forward may raise anything; here it gains its context
        raise CalibrationError(
            f"{type(model).__name__} failed on batch {number} of shape {inputs.shapes}: {error}"
        ) from error
    return [leaf.cpu().reshape(leaf.shape or (1,)) for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _check(expected: list[Tensor], actual: list[Tensor], number: int) -> None:
    shapes = [tuple(output.shape) for output in expected], [tuple(output.shape) for output in actual]
    if shapes[0] != shapes[1] or not expected:
        raise CalibrationError(f"the two models' outputs cannot be compared: shapes {shapes[0]} and {shapes[1]}")
    if not all(output.isfinite().all() for output in expected):
        raise CalibrationError(
            f"the reference's outputs are not finite on batch {number}; "
            "compare in front of the layer that makes them so"
        )
