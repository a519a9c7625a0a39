"""A network that returns one logit per class, and how it is run: device, precision, processes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ..errors import TrainingError, as_passed, out_of_memory, too_small
from ..graph.copies import deep_copy, protected_parameters, working_copy
from ..images.class_folders import LabelledBatch
from ..statistics.passes import preserved_random_state
from ..support.processes import Ranks
from ..support.text import first_line, with_article


@dataclass(frozen=True)
class Classifier:
    """A network ready to be trained or validated.

    Args:
        network: The network itself.
        parallel: The network as a training step calls it: inside DistributedDataParallel when there are several
            processes, otherwise `network`.
        output: Name of its output layer; None if it has none, see `OutputLayer`.
        classes: Number of logits per image.
        device: Where the network is.
        amp: Run under bfloat16 autocast.
        memory_format: That of images and conv weights.
        takes_one_image: Whether it runs on a batch of one image, whose batch axis squeeze() in a forward removes.
    """

    network: nn.Module
    parallel: nn.Module
    output: str | None
    classes: int
    device: torch.device
    amp: bool
    memory_format: torch.memory_format = torch.channels_last
    takes_one_image: bool = True

    @classmethod
    def of(
        cls,
        network: nn.Module,
        output: str | None,
        classes: int,
        device: torch.device,
        ranks: Ranks,
        *,
        amp: bool,
        example: Float[Tensor, "n c h w"] | None = None,
    ) -> Classifier:
        """Return a network that is on its device as a classifier.

        Args:
            network: The network; its conv weights get the memory format.
            output: Name of its output layer, or None.
            classes: Number of logits per image.
            device: Where the network is.
            ranks: The processes that train it.
            amp: Run under bfloat16 autocast.
            example: Two images to find out which memory format the network takes, whether it takes one image, and
                whether it returns one logit per class.

        Raises:
            TrainingError: When it does not return one logit per class for the example, which may be too small for it.
        """
        memory_format, takes_one_image = torch.channels_last, True
        if example is not None:
            # Two images, as some views need several images.
            images = example[:1].expand(2, -1, -1, -1).to(device, next(network.parameters()).dtype)
            # channels_last is faster; some forwards take only contiguous activations, as x.view does.
            memory_format = torch.channels_last if _runs(network, images, memory_format) else torch.contiguous_format
            takes_one_image = _runs(network, images[:1], memory_format) or not _runs(network, images, memory_format)
        network.to(memory_format=memory_format)
        parallel = _parallel(network, device, ranks)
        classifier = cls(network, parallel, output, classes, device, amp, memory_format, takes_one_image)
        if example is not None:
            classifier._check_logits(example)
        return classifier

    def copied(self, ranks: Ranks) -> Classifier:
        """Return a classifier with a copy of the network; all processes call this together."""
        network = deep_copy(self.network)
        return replace(self, network=network, parallel=_parallel(network, self.device, ranks))

    def inputs(self, batch: LabelledBatch) -> tuple[Float[Tensor, "n c h w"], Int64[Tensor, " n"]]:
        """Return the images, in the network's dtype and memory format, and the labels of a batch, on the device."""
        dtype = next(self.network.parameters()).dtype
        images = batch.images.to(self.device, dtype, memory_format=self.memory_format)
        return images, batch.labels.to(self.device)

    def each_input(
        self, batches: Iterable[LabelledBatch]
    ) -> Iterator[tuple[Float[Tensor, "n c h w"], Int64[Tensor, " n"]]]:
        """Return the inputs of batches outside of training; an image that cannot run by itself joins others."""
        return map(self.inputs, batches if self.takes_one_image else _single_images_joined(batches))

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which the network is run."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.amp else nullcontext()

    def without_exchange(self) -> AbstractContextManager[Any]:
        """Return the context in which gradients are kept, to be exchanged between processes by a later batch."""
        return self.parallel.no_sync() if isinstance(self.parallel, DistributedDataParallel) else nullcontext()

    def training_logits(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        """Return the outputs of a training step.

        Raises:
            TrainingError: When the network cannot run on the images, or does not return one logit per class.
        """
        name = type(self.network).__name__
        try:
            with self.autocast():
                logits = self.parallel(images)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            assumed = f"{self.output} is assumed to be its output layer, and " if self.output else ""
            raise TrainingError(
                f"{name} cannot run on a batch of shape {tuple(images.shape)}: {first_line(error)}; {assumed}all "
                f"images must have one size ({as_passed('crop')})"
            ) from error
        return self._checked(logits, len(images))

    def _check_logits(self, images: Float[Tensor, "n c h w"]) -> None:
        """Run a copy in train mode, before anything is fitted; most errors of the forward are left to the first step.

        Raises:
            TrainingError: When it does not return one logit per class, or the images are too small for it.
        """
        network = working_copy(self.network, training=True)
        for module in network.modules():
            if isinstance(module, _BatchNorm):  # neither a batch of one value nor other processes matter
                module.eval()
        images = images.to(self.device, next(network.parameters()).dtype, memory_format=self.memory_format, copy=True)
        try:
            with preserved_random_state(), torch.no_grad(), self.autocast(), protected_parameters(network):
                logits = network(images)
        except Exception as error:  # whatever else it is, the first step raises it again, with its context
            if too_small(error):
                height, width = images.shape[2:]
                raise TrainingError(
                    f"images of {height} x {width} pixels are too small for {type(self.network).__name__} "
                    f"({first_line(error)}); use larger ones ({as_passed('resize')}, {as_passed('crop')})"
                ) from error
            return
        self._checked(logits, len(images))

    def _checked(self, logits: object, images: int) -> Float[Tensor, "n classes"]:
        if not isinstance(logits, Tensor) or logits.shape != (images, self.classes):
            found = tuple(logits.shape) if isinstance(logits, Tensor) else with_article(logits)
            raise TrainingError(
                f"{type(self.network).__name__} returns {found} for a batch of {images} images instead of one logit "
                f"for each of {self.classes} classes; only classifiers can be fine-tuned"
            )
        return logits


def _runs(network: nn.Module, images: Float[Tensor, "n c h w"], memory_format: torch.memory_format) -> bool:
    """Return whether a network runs on images in a memory format, and its outputs have one row for each of them."""
    try:
        with preserved_random_state(), torch.no_grad():
            # The weights too: with them, a forward that makes its images contiguous has activations in channels_last.
            # Copies, as a forward may keep tensors, or change them in place.
            logits = working_copy(network).to(memory_format=memory_format)(images.clone(memory_format=memory_format))
    except Exception:  # noqa: BLE001 - whatever it is, the first step raises it again, with its context
        return False
    return isinstance(logits, Tensor) and logits.shape[:1] == images.shape[:1]


def _single_images_joined(batches: Iterable[LabelledBatch]) -> Iterator[LabelledBatch]:
    """Yield batches of two images or more: a single image joins the batch before it, or else the next."""
    waiting: LabelledBatch | None = None
    for batch in batches:
        if waiting is None:
            waiting = batch
        elif 1 in {len(waiting.labels), len(batch.labels)} and waiting.images.shape[1:] == batch.images.shape[1:]:
            waiting = LabelledBatch(*map(torch.cat, zip(waiting, batch, strict=True)))
        else:
            yield waiting
            waiting = batch
    if waiting is not None:
        yield waiting


def cross_entropy(
    logits: Float[Tensor, "n classes"], labels: Int64[Tensor, " n"], smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """Return the mean loss of a batch, computed in float32 or higher."""
    return F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, label_smoothing=smoothing
    )


def batch_totals(
    loss: Float[Tensor, ""], logits: Float[Tensor, "n classes"], labels: Int64[Tensor, " n"]
) -> Float64[Tensor, " totals"]:
    """Return the `Totals` of a batch as a tensor on its device, so that the caller decides when to wait for it."""
    correct = (logits.detach().argmax(1) == labels).sum()
    return torch.stack([loss.detach() * len(labels), correct, torch.full_like(correct, len(labels))]).double()


def _parallel(network: nn.Module, device: torch.device, ranks: Ranks) -> nn.Module:
    if ranks.count == 1:
        return network
    with warnings.catch_warnings():
        # The replacement of this argument is newer than the oldest PyTorch that we support.
        warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
        # Running statistics are shared once per epoch; DDP would send them before every forward pass.
        return DistributedDataParallel(
            network, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False
        )
