"""The training loop: steps, epochs, validation, and what is written."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ..batchnorm.modes import trains_on_batches
from ..checkpoints.save import stage_checkpoint
from ..compare.outputs import evaluating
from ..errors import CalibrationError, CheckpointError, DivergenceError, ImageError, TrainingError
from ..images.batches import sample
from ..images.class_folders import ClassFolders, LabelledBatch, LabelledImage
from ..report import run_report, write_report
from ..statistics.recalibrate import recalibrate
from ..support.files import stage_file, staging_folder
from ..support.processes import Ranks, on_every_rank
from .metrics import EpochMetrics, write_curves, write_metrics
from .parameter_groups import parameter_groups
from .settings import TrainingSettings
from .state import TrainingState, random_state, set_random_state, write_state

STATE, METRICS, CURVES, CLASSES = "state.pth", "metrics.csv", "curves.png", "classes.txt"
BEST, LAST = "best.pth", "last.pth"
REPORTS = ("report.json", "report.html")
RESULTS = (STATE, METRICS, CURVES, CLASSES, *REPORTS, BEST, LAST, "best.json", "last.json")
_ADVICE = "a lower learning rate (--lr), a warm-up (--lr-warmup-epochs 1), or BatchNorm in it (bn-insert insert)"


@dataclass(frozen=True)
class StepMetrics:
    """One step of training; epoch, step and steps are counted from 1, and loss is the batch's mean."""

    epoch: int
    step: int
    steps: int
    loss: float


class Training:
    """One run: the network, its optimizer, and where it is."""

    def __init__(
        self,
        *,
        network: nn.Module,
        images: ClassFolders,
        folder: Path,
        settings: TrainingSettings,
        device: torch.device,
        ranks: Ranks,
        replaced: Sequence[str],
        on_step: Callable[[StepMetrics], None] | None,
        stop: Callable[[], bool] | None,
        facts: Mapping[str, Any],
    ) -> None:
        """Take a network that is ready to be trained; raises TrainingError where batches would be too small.

        replaced: names of another run's results, which stay in the folder until this run has results of its own.
        """
        self.facts = facts
        self.network, self.images, self.folder, self.settings = network, images, folder, settings
        self.device, self.ranks, self.on_step, self.stop = device, ranks, on_step, stop
        self.replaced = tuple(replaced)
        self.optimizer = _optimizer(network, settings)
        self.parallel: nn.Module = network
        if ranks.count > 1:
            device_ids = [device] if device.type == "cuda" else None
            with warnings.catch_warnings():
                # Its replacement is newer than the oldest PyTorch that we support.
                warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
                # Running statistics are shared once an epoch; DDP would send them in front of every forward pass.
                self.parallel = DistributedDataParallel(network, device_ids=device_ids, broadcast_buffers=False)
        share, size = -(-len(images.train) // ranks.count), settings.batch_size
        self.images_per_rank = share
        if any(map(trains_on_batches, network.modules())):
            if size == 1 or share < 2:
                raise TrainingError(
                    f"BatchNorm cannot normalize a batch of one image ({share} training images a process, batch size "
                    f"{size}); give a batch size of 2 or more, or --batchnorm freeze-statistics"
                )
            self.images_per_rank -= share % size == 1
        self.steps = -(-self.images_per_rank // size)
        facts = {"images": images.digest, "processes": ranks.count, "preprocessing": images.transform.to_dict()}
        facts["layers"] = [f"{key} {tuple(tensor.shape)}" for key, tensor in network.state_dict().items()]
        self.state = TrainingState.beginning(settings, facts)

    def go_on_from(self, state: TrainingState) -> None:
        """Take up a state that was saved."""
        state.check_continues(self.state, self.folder / STATE)
        state.settings = self.state.settings
        self.network.load_state_dict(state.model)
        self.optimizer.load_state_dict(state.optimizer)
        set_random_state(state.random[self.ranks.rank], self.device)
        self.state = state

    def run(self, on_epoch: Callable[[EpochMetrics], None] | None) -> bool:
        """Train to the last epoch, and return True; False when stopped before."""
        while self.state.epoch < self.settings.epochs:
            started = time.monotonic()
            if not self._train():
                self._save()
                return False
            try:
                metrics = self._complete_epoch(started)
            except _StoppedError:
                self._save()
                return False
            if on_epoch:
                on_epoch(metrics)
        return True

    def _train(self) -> bool:
        """Train to the end of the epoch, from wherever in it the run is; return False when stopped."""
        state = self.state
        order = self._order(self.images.train, state.epoch)[: self.images_per_rank]
        left = order[state.step * self.settings.batch_size :]
        self.parallel.train()
        try:
            for batch in self.images.batches(left, self.settings.batch_size, full=True):
                if self._step(self._mirrored(batch)):
                    return False
        except ImageError:
            if self._stopped_alone():  # a signal to the whole process group has ended the processes that decode
                return False
            raise
        return True

    def _step(self, batch: LabelledBatch) -> bool:
        """Take one step; return whether the run is to stop behind it."""
        state = self.state
        learning_rate = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        images, labels = self._on_device(batch)
        logits = self._logits(images)
        loss = _loss(logits, labels, self.settings.label_smoothing)
        right = (logits.detach().argmax(1) == labels).sum()
        wish = bool(self.stop and self.stop())
        figures = torch.stack([loss.detach() * len(labels), right, torch.full_like(right, len(labels))]).double()
        # One exchange a step: all ranks stop, and see that the loss is not finite, behind the same step.
        totals = self.ranks.total(torch.cat([figures, figures.new_tensor([wish])])).tolist()
        mean = totals[0] / totals[2]
        if not math.isfinite(mean):
            raise self._diverged(f"the loss is {mean} in step {state.step + 1} of epoch {state.epoch + 1}")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        state.step += 1
        state.seen = (state.seen[0] + totals[0], state.seen[1] + totals[1], state.seen[2] + totals[2])
        if self.on_step:
            self.on_step(StepMetrics(state.epoch + 1, state.step, self.steps, mean))
        return totals[3] > 0 or self._stopped_alone()

    def _logits(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        """Return the network's outputs; raises TrainingError where it is no classifier for these images."""
        name, classes = type(self.network).__name__, len(self.images.classes)
        try:
            with self._autocast():
                logits = self.parallel(images)
        except (torch.OutOfMemoryError, DivergenceError):
            raise
        except RuntimeError as error:
            raise TrainingError(
                f"{name} cannot run on a batch of shape {tuple(images.shape)}: {_first_line(error)}; its last dense "
                "layer is taken for the output layer, and all images have one size (--crop)"
            ) from error
        if not isinstance(logits, Tensor) or logits.shape != (len(images), classes):
            given = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise TrainingError(
                f"{name} gives {given} for a batch of {len(images)} images, not one logit for each of {classes} "
                "classes; only classifiers can be fine-tuned"
            )
        return logits

    def _complete_epoch(self, started: float) -> EpochMetrics:
        """Re-estimate, validate, and write everything."""
        state = self.state
        self.ranks.share_buffers(self.network)
        if self.settings.recalibrate:
            self._recalibrate()
        val_loss, val_accuracy = self._validate()
        if not math.isfinite(val_loss):
            raise self._diverged(f"the validation loss is {val_loss} after epoch {state.epoch + 1}")
        loss, right, seen = state.seen
        last_step = state.epoch * self.steps + state.step - 1
        metrics = EpochMetrics(
            epoch=state.epoch + 1,
            step=last_step + 1,
            lr=self.settings.learning_rate(last_step, self.steps),
            train_loss=loss / seen,
            train_accuracy=right / seen,
            val_loss=val_loss,
            val_accuracy=val_accuracy,
            seconds=round(time.monotonic() - started, 3),
        )
        state.history.append(metrics)
        state.epoch, state.step, state.seen = state.epoch + 1, 0, (0.0, 0.0, 0.0)
        self._save()
        return metrics

    def _recalibrate(self) -> None:
        """Make the running statistics those of training images under the weights that the network has now."""
        # Statistics are pooled over ranks: the first one runs as many images as one process would, the others none.
        part, inputs = self.network, self._recalibration_images() if self.ranks.first else iter(())
        if self.settings.freeze_features:
            # The frozen part keeps its statistics, and its BatchNorms normalize by them.
            part, inputs = self.network.get_submodule("classifier"), self._features(inputs)
        if not any(trains_on_batches(module) and next(module.buffers(), None) is not None for module in part.modules()):
            return
        try:
            result = recalibrate(
                part,
                inputs,
                autocast=torch.bfloat16 if self.settings.amp else None,
                progress=lambda _images: self._end_if_stopped(),
            )
        except CalibrationError as error:
            raise self._diverged(f"the running statistics could not be estimated: {error}") from error
        with torch.no_grad():
            for name, buffer in result.named_buffers():
                part.get_buffer(name).copy_(buffer)
        self.ranks.share_buffers(self.network)

    def _recalibration_images(self) -> Iterator[Tensor]:
        chosen = self._order(self.images.train, self.state.epoch)
        bound = self.settings.recalibration_images
        for batch in self.images.batches(chosen[:bound], self.settings.batch_size, full=True):
            yield self._on_device(batch)[0]

    def _features(self, inputs: Iterator[Tensor]) -> Iterator[Tensor]:
        """Give what the classifier is given for each batch of images."""
        seen: list[Tensor] = []
        classifier = self.network.get_submodule("classifier")
        with ExitStack() as hooks:
            hooks.callback(classifier.register_forward_pre_hook(lambda _module, given: seen.append(given[0])).remove)
            for images in inputs:
                with evaluating(self.network), self._autocast():
                    self.network(images)
                if not seen:
                    raise TrainingError(f"{type(self.network).__name__} does not call its classifier")
                yield seen.pop()

    def _validate(self) -> tuple[float, float]:
        """Return loss and accuracy on all validation images."""
        images = self.ranks.share(self.images.val, equal=False)
        sums = torch.zeros(3, dtype=torch.float64)
        with torch.inference_mode(), evaluating(self.network):
            for batch in self.images.batches(images, self.settings.batch_size) if images else ():
                inputs, labels = self._on_device(batch)
                with self._autocast():
                    logits = self.network(inputs)
                right = (logits.argmax(1) == labels).sum()
                loss = _loss(logits, labels) * len(labels)
                sums += torch.stack([loss, right, torch.full_like(right, len(labels))]).double().cpu()
                self._end_if_stopped()
        loss_sum, right_sum, count = self.ranks.total(sums.to(self.device)).tolist()
        if count == 0:
            path, reason = self.images.unreadable[-1]
            raise TrainingError(f"no validation image can be read; one of them is {path}: {reason}")
        return loss_sum / count, right_sum / count

    def _end_if_stopped(self) -> None:
        # Ranks have shares of different sizes here, and could not agree: several finish the epoch.
        if self._stopped_alone():
            raise _StoppedError

    def _stopped_alone(self) -> bool:
        return bool(self.ranks.count == 1 and self.stop and self.stop())

    def _save(self) -> None:
        """Write what the run has come to; the state last, so that it never tells of files that are not there."""
        self.state.model, self.state.optimizer = self.network.state_dict(), self.optimizer.state_dict()
        self.state.random = self.ranks.gathered(random_state(self.device))
        on_every_rank(lambda: self._write() if self.ranks.first else None)  # no rank waits for one whose disk is full

    def _write(self) -> None:
        """Write all files, each whole; on a full disk none of them changes."""
        state = self.state
        transform = self.images.transform.to_dict()
        names = "".join(f"{name}\n" for name in self.images.classes)
        checkpoints = [LAST]
        writers: dict[str, Callable[[Path], object]] = {}
        if state.history:
            if state.step == 0 and state.best is state.history[-1]:
                checkpoints.append(BEST)
            writers[METRICS] = partial(write_metrics, state.history)
            writers[CURVES] = partial(write_curves, state.history)
        writers[CLASSES] = lambda path: path.write_text(names, encoding="utf-8")
        writers[STATE] = partial(write_state, state)
        with staging_folder(self.folder / STATE) as staging:
            staged = {
                name: stage_checkpoint(self.network, self.folder / name, staging, transform=transform, overwrite=True)
                for name in checkpoints
            }
            for name, write in writers.items():
                staged[name] = stage_file(self.folder / name, write, staging, overwrite=True)
            if self.replaced:  # without its state nobody can resume the old run with files of this one
                (self.folder / STATE).unlink(missing_ok=True)
            *others, state_file = staged.values()
            for put_in_place in others:
                put_in_place()
            written = {*staged, *(Path(name).with_suffix(".json").name for name in checkpoints)}
            for name in self.replaced:
                if name not in written:
                    (self.folder / name).unlink(missing_ok=True)
            self.replaced = ()
            state_file()
            self._write_reports()

    def _write_reports(self) -> None:
        facts = {
            "data": {
                "folder": str(self.images.folder),
                "classes": len(self.images.classes),
                "training_images": len(self.images.train),
                "validation_images": len(self.images.val),
                "preprocessing": self.images.transform.to_dict(),
            },
            "batchnorms": sum(isinstance(module, _BatchNorm) for module in self.network.modules()),
            "device": str(self.device),
            "processes": self.ranks.count,
        }
        epochs = [asdict(epoch) for epoch in self.state.history]
        data = run_report(self.folder.resolve().name, asdict(self.settings), epochs, {**self.facts, **facts})
        try:
            for name in REPORTS:
                write_report(self.folder / name, data, overwrite=True)
        except CheckpointError as error:  # the run itself is saved, and worth more
            warnings.warn(f"{error}; all else is saved, and training goes on", stacklevel=2)

    def _order(self, images: tuple[LabelledImage, ...], epoch: int) -> list[LabelledImage]:
        """Return this rank's share of the images, in the order of an epoch."""
        return self.ranks.share(sample(images, None, self.settings.seed + 1_000_003 * epoch))

    def _mirrored(self, batch: LabelledBatch) -> LabelledBatch:
        if self.settings.hflip == 0:
            return batch
        number = (self.state.epoch * self.steps + self.state.step) * self.ranks.count + self.ranks.rank
        generator = torch.Generator().manual_seed(self.settings.seed + 1_000_003 * number)
        chosen = torch.rand(len(batch.labels), generator=generator) < self.settings.hflip
        return LabelledBatch(torch.where(chosen[:, None, None, None], batch.images.flip(3), batch.images), batch.labels)

    def _on_device(self, batch: LabelledBatch) -> tuple[Float[Tensor, "n c h w"], Int64[Tensor, " n"]]:
        dtype = next(self.network.parameters()).dtype
        images = batch.images.to(self.device, dtype, memory_format=torch.channels_last)
        return images, batch.labels.to(self.device)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.settings.amp else nullcontext()

    def _learning_rate(self) -> float:
        return self.settings.learning_rate(self.state.epoch * self.steps + self.state.step, self.steps)

    def _diverged(self, fact: str) -> DivergenceError:
        saved = (self.folder / STATE).exists()
        kept = f"{self.folder} keeps what was saved last" if saved else "nothing was written"
        return DivergenceError(
            f"{fact} (learning rate {self._learning_rate():.3g}): training diverged. Try {_ADVICE}; {kept}"
        )


class _StoppedError(Exception):
    """Ends re-estimation or validation; both are done again when the run is resumed."""


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _optimizer(network: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    groups = parameter_groups(network, settings.weight_decay, settings.norm_weight_decay)
    if settings.opt == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr)
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)


def _loss(logits: Float[Tensor, "n classes"], labels: Int64[Tensor, " n"], smoothing: float = 0.0) -> Float[Tensor, ""]:
    return F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, label_smoothing=smoothing
    )
