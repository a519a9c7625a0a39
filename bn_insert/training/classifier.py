"""A network that returns one logit per class, and how it is run: device, precision, processes."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import TrainingError, as_passed, out_of_memory
from ..graph.copies import deep_copy, working_copy
from ..images.class_folders import LabelledBatch
from ..statistics.passes import preserved_random_state
from ..support.processes import Ranks
from ..support.text import first_line


@dataclass(frozen=True)
class Classifier:
    """A network ready to be trained or validated.

    Args:
        network: The network itself.
        parallel: The network as a training step calls it: inside DistributedDataParallel when there are several
            processes, otherwise `network`.
        classes: Number of logits per image.
        device: Where the network is.
        amp: Run under bfloat16 autocast.
        memory_format: That of images and conv weights.
    """

    network: nn.Module
    parallel: nn.Module
    classes: int
    device: torch.device
    amp: bool
    memory_format: torch.memory_format = torch.channels_last

    @classmethod
    def of(
        cls,
        network: nn.Module,
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
            classes: Number of logits per image.
            device: Where the network is.
            ranks: The processes that train it.
            amp: Run under bfloat16 autocast.
            example: Images to find out which memory format the network takes.
        """
        memory_format = torch.channels_last if example is None else _memory_format(network, example.to(device))
        network.to(memory_format=memory_format)
        return cls(network, _parallel(network, device, ranks), classes, device, amp, memory_format)

    def copied(self, ranks: Ranks) -> Classifier:
        """Return a classifier with a copy of the network; all processes call this together."""
        network = deep_copy(self.network)
        return replace(self, network=network, parallel=_parallel(network, self.device, ranks))

    def inputs(self, batch: LabelledBatch) -> tuple[Float[Tensor, "n c h w"], Int64[Tensor, " n"]]:
        """Return the images, in the network's dtype and memory format, and the labels of a batch, on the device."""
        dtype = next(self.network.parameters()).dtype
        images = batch.images.to(self.device, dtype, memory_format=self.memory_format)
        return images, batch.labels.to(self.device)

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
            raise TrainingError(
                f"{name} cannot run on a batch of shape {tuple(images.shape)}: {first_line(error)}; its last dense "
                "layer (without one, its last conv) is assumed to be the output layer, and all images must have one "
                f"size ({as_passed('crop')})"
            ) from error
        if not isinstance(logits, Tensor) or logits.shape != (len(images), self.classes):
            found = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise TrainingError(
                f"{name} returns {found} for a batch of {len(images)} images instead of one logit for each of "
                f"{self.classes} classes; only classifiers can be fine-tuned"
            )
        return logits


def _memory_format(network: nn.Module, images: Float[Tensor, "n c h w"]) -> torch.memory_format:
    """Return channels_last, which is faster, unless the forward takes contiguous activations alone, as x.view does."""
    # Two images, as some views are of several images alone; a copy, as a forward may keep tensors.
    images = images[:1].expand(2, -1, -1, -1).to(next(network.parameters()).dtype, memory_format=torch.channels_last)
    try:
        with preserved_random_state(), torch.inference_mode():
            # The weights too: with them, a forward that makes its images contiguous has activations in channels_last.
            working_copy(network).to(memory_format=torch.channels_last)(images)
    except Exception:  # noqa: BLE001 - whatever it is, the first step raises it again, with its context
        return torch.contiguous_format
    return torch.channels_last


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
