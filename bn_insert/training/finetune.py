"""Fine-tune a network on labelled images: what `bn-insert finetune` does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from ..batchnorm.modes import freeze_batchnorm
from ..errors import TrainingError
from ..images.class_folders import ClassFolders
from ..statistics.passes import preserved_random_state
from ..support.files import StrPath, output_folder
from ..support.processes import Ranks, on_every_rank
from ..surgery.output_layer import output_layer, replace_output
from .loop import RESULTS, STATE, StepMetrics, Training
from .metrics import EpochMetrics
from .settings import TrainingSettings
from .state import load_state

__all__ = ["FineTuning", "StepMetrics", "finetune"]


@dataclass(frozen=True)
class FineTuning:
    """What came of a run.  interrupted: it was stopped before its last epoch, and can be resumed."""

    epochs: tuple[EpochMetrics, ...]
    best: EpochMetrics | None
    interrupted: bool


def finetune(
    model: nn.Module,
    images: ClassFolders,
    output_dir: StrPath,
    settings: TrainingSettings | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: torch.device | str = "cpu",
    on_step: Callable[[StepMetrics], None] | None = None,
    on_epoch: Callable[[EpochMetrics], None] | None = None,
    stop: Callable[[], bool] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> FineTuning:
    """Train a copy of a classifier on labelled images, and write into a folder what comes of it.

    After each epoch BatchNorm's running statistics are estimated anew on training images (`settings.recalibrate`), the
    network is validated, and these are written, each whole or not at all: metrics.csv, curves.png, last.pth, best.pth
    when its validation accuracy is the highest so far, classes.txt, state.pth, from which a run can be resumed, and the
    run's page report.html with its data, report.json.

    The copy gets a new output layer where the model's outputs are not as many as the classes, float32 for half
    precision, and the memory format channels_last.
    output_dir: is made; one that holds results is refused unless `resume` or `overwrite` is given. The latter replaces
        them, when this run's first results are there.
    resume: go on from state.pth with the same settings and images; on a CPU that gives exactly the weights that an
        uninterrupted run gives. Without results in the folder the run begins.
    stop: asked after each step; True ends the run there, with state.pth and last.pth written. Statistics are not
        re-estimated then: nobody who stops a run wants to wait.
    facts: JSON-ready values that the report shows as they are: which checkpoint the model is from, say.
    In a torch.distributed process group all ranks call it: batches are per rank, gradients are averaged by
    DistributedDataParallel, and the first rank alone writes.
    Each epoch's last batch is left out where it is one image and a BatchNorm would have to normalize by it.
    Raises TrainingError for what cannot be trained or resumed as asked, DivergenceError when the loss is not finite
    (files stay as they were after the last complete epoch), ImageError and CheckpointError.
    """
    settings = settings or TrainingSettings()
    folder = Path(output_dir)
    state_path = folder / STATE
    ranks = Ranks.current()
    begun = _results_in(folder)
    if begun and not (resume or overwrite):
        raise TrainingError(
            f"{folder} holds results already ({begun[0]}): go on with resume=True (--resume), replace them with "
            "overwrite=True (--force), or choose another output folder"
        )
    if resume and begun and not state_path.exists():
        raise TrainingError(f"{folder} has no {STATE} to resume from; begin again with overwrite=True (--force)")
    # Random state is the caller's; every process that trains has a sequence of its own for dropout.
    with preserved_random_state():
        torch.manual_seed(settings.seed * 1000 + ranks.rank)
        network = _prepared(model, settings, images, torch.device(device), ranks)
        training = Training(
            network=network,
            images=images,
            folder=folder,
            settings=settings,
            device=torch.device(device),
            ranks=ranks,
            replaced=() if resume else begun,
            on_step=on_step,
            stop=stop,
            facts=facts or {},
        )
        if resume and state_path.exists():
            training.go_on_from(load_state(state_path))
        ranks.wait()  # none has looked into the folder after the first changes it
        with ExitStack() as results:
            on_every_rank(lambda: results.enter_context(output_folder(folder)) if ranks.first else None)
            finished = training.run(on_epoch)
    state = training.state
    return FineTuning(tuple(state.history), state.best, interrupted=not finished)


def _results_in(folder: Path) -> list[str]:
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"{folder} is not a folder; choose another output folder")
    return [name for name in RESULTS if (folder / name).exists()]


def _prepared(
    model: nn.Module, settings: TrainingSettings, images: ClassFolders, device: torch.device, ranks: Ranks
) -> nn.Module:
    """Return a copy of the model as it is to be trained, on its device."""
    network = copy.deepcopy(model)
    if next(network.parameters()).dtype in (torch.float16, torch.bfloat16):
        network.float()  # small steps would be rounded away
    if output_layer(network)[1].out_features != len(images.classes):
        replace_output(network, len(images.classes))
    if settings.dropout is not None:
        layers = [module for module in network.modules() if isinstance(module, _DropoutNd)]
        if not layers:
            raise TrainingError(f"{type(model).__name__} has no dropout layer whose p could be {settings.dropout}")
        for layer in layers:
            layer.p = settings.dropout
    network.to(device).to(memory_format=torch.channels_last)
    if settings.sync_bn and device.type != "cuda":
        raise TrainingError("sync_bn (--sync-bn) works on GPUs alone; leave it out")
    if settings.sync_bn and ranks.count > 1:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    freeze_batchnorm(network, settings.batchnorm)
    if settings.freeze_features:
        features = _part(network, "features")
        _part(network, "classifier")
        freeze_batchnorm(features, "freeze")
        features.requires_grad_(requires_grad=False)
    return network


def _part(network: nn.Module, name: str) -> nn.Module:
    part = getattr(network, name, None)
    if not isinstance(part, nn.Module):
        raise TrainingError(
            f"freeze_features (--freeze-features) is for networks with features and classifier, and "
            f"{type(network).__name__} has no {name}"
        )
    return part
