"""Forward passes kept for gradient checkpointing, which runs them again within the backward pass."""

from __future__ import annotations

import weakref
from collections import deque

import torch
from torch import Tensor, nn

from .batch_renorm_function import Normalization

# How many passes that leave no graph (under `no_grad`, as in reentrant checkpointing) can still be recomputed.
_GRAPHLESS_PASSES = 64
# A recomputation whose batch statistics differ by less, in standard deviations, is of the same batch: kernels on a GPU
# do not sum in the same order each time. Two batches differ by about 1 / sqrt(values per channel).
_SAME_BATCH = 1e-2


class Passes:
    """Forward passes of one layer that may be recomputed.

    Gradient checkpointing runs a forward pass again within the backward pass, after the running statistics have been
    updated. What the first pass normalized by is therefore kept: by the graph if there is one, so that it is freed with
    the graph, or else in a queue of bounded length. A pass is recognized by the statistics of its batch, so several
    passes may be pending, in any order.
    """

    def __init__(self) -> None:
        """Keep nothing yet."""
        self._passes: list[weakref.ref[Normalization]] = []
        self._graphless: deque[Normalization] = deque(maxlen=_GRAPHLESS_PASSES)

    def __len__(self) -> int:
        """Number of passes that are kept."""
        return sum(kept() is not None for kept in self._passes)

    def keep(self, normalization: Normalization, *, in_graph: bool) -> None:
        """Keep a pass as long as its graph, or, if it left none, until 64 later ones without a graph."""
        if not in_graph:
            self._graphless.append(normalization)
        self._passes = [kept for kept in self._passes if kept() is not None]
        self._passes.append(weakref.ref(normalization))

    def find(self, mean: Tensor, var: Tensor, eps: float) -> Normalization | None:
        """Return the pass over a batch with these statistics, or None."""
        kept = [normalization for ref in self._passes if (normalization := ref()) is not None]
        if not kept:
            return None
        means = torch.stack([normalization.local_mean for normalization in kept])
        variances = torch.stack([normalization.local_var for normalization in kept])
        spread = var + eps
        differences = torch.maximum((means - mean).abs() / spread.sqrt(), (variances - var).abs() / spread)
        distances = differences.amax(1).tolist()
        same = [index for index, distance in enumerate(distances) if distance < _SAME_BATCH]
        if not same:
            return None
        # Of equal batches, the latest that was not recomputed: backward passes go from the last to the first.
        best = min(same, key=lambda index: (round(distances[index], 4), kept[index].recomputed, -index))
        return kept[best]


# Not in the modules themselves, where it would be copied, pickled, and kept by a conversion.
_kept: weakref.WeakKeyDictionary[nn.Module, Passes] = weakref.WeakKeyDictionary()


def kept_passes(module: nn.Module) -> Passes:
    """Return the passes that are kept for a layer."""
    return _kept.setdefault(module, Passes())
