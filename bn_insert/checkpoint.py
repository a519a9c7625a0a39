"""Read and write checkpoint files: a network in, a network out, with what a state dict leaves out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from .atomic import StrPath, check_writable, publish, real_path, stage, staging_folder, write_atomically
from .errors import CheckpointError
from .settings import Settings
from .sidecar import read_sidecar, sidecar_path, transitional_json
from .state_dict import file_kind, is_plain, printable, read_metadata, read_state_dict, without_prefix

__all__ = ["check_output", "load_checkpoint", "read_settings", "save_checkpoint"]

_PICKLED = (".pth", ".pt")
_SUFFIXES = (*_PICKLED, ".safetensors")
_HEADER_KEY = "bn-insert"
_MISMATCHES_SHOWN = 8


def load_checkpoint(path: StrPath, *, model: nn.Module | Callable[[], nn.Module] | None = None) -> nn.Module:
    """Return the network of a checkpoint file, in eval mode, on the CPU; no code from the file is ever run.

    A VGG is rebuilt from keys and shapes alone, with the dtypes of the file (`vgg.vgg_from_state_dict` has the rules).
    Settings that `save_checkpoint` stored are applied; a VGG without them has BatchNorm with eps 1e-5 and momentum 0.1,
    and dropout with p 0.5.

    path: .pth, .pt, .bin or .safetensors; the format is told by the content.  A state dict, or a dict with one under
        "state_dict", "model", "model_state_dict" or "model_ema"; prefixes "module.", "model." and "_orig_mod." go.
    model: the architecture where it is no VGG: a module, of which a copy is returned, or what makes one. Its dtype and
        device stay.
    Raises CheckpointError with the path, the reason and the way out.

    >>> from bn_insert.demo import network_path
    >>> model = load_checkpoint(network_path())
    >>> type(model).__name__, len(model.features), model.training
    ('VGG', 16, False)
    """
    tensors = read_state_dict(Path(path))
    settings = read_settings(path) or Settings()
    try:
        if model is None:
            # Importing torchvision takes as long as everything else here, and only this way needs it.
            from .vgg import vgg_from_state_dict  # noqa: PLC0415

            prefix, tensors = without_prefix(tensors)
            network: nn.Module = vgg_from_state_dict(tensors)
        else:
            network = _architecture(model)
            prefix, tensors = without_prefix(tensors, network.state_dict().keys())
            _fill(network, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {printable(error)}") from error
    try:
        settings.without_prefix(prefix).apply_to(network)
    except CheckpointError as error:
        place = "its header" if file_kind(Path(path)) == "safetensors" else sidecar_path(real_path(path))
        raise CheckpointError(
            f"{path}: the settings in {place} belong to another checkpoint: {printable(error)}; delete them, or "
            "write the checkpoint again with save_checkpoint"
        ) from error
    return network.eval()


def save_checkpoint(
    model: nn.Module, path: StrPath, *, transform: Mapping[str, Any] | None = None, overwrite: bool = False
) -> None:
    """Write a model's state dict, and its settings: eps and momentum of BatchNorm, p of dropout, and the transform.

    `.safetensors` takes the settings into its header.  A `.pth` or `.pt` is a plain dict of tensors, as
    `load_state_dict` takes it; its settings go into a file beside it, `NAME.json`.  What torch.compile, DataParallel or
    DistributedDataParallel put around a model is left out.

    transform: how images are prepared for the model, anything that JSON can hold.
    overwrite: replace files that are there.
    Raises CheckpointError; then nothing has changed.  A kill at any moment leaves the old checkpoint or the new one,
    whole and with its own settings.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "network.pth")
    >>> save_checkpoint(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, eps=1e-3)), path)
    >>> read_settings(path).batchnorm["1"].eps
    0.001
    """
    check_output(path, overwrite=overwrite)
    network = _network(model)
    try:
        tensors = _tensors(network)
        settings = Settings.of(network, transform)
    except CheckpointError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
    if _suffix(path) == ".safetensors":
        metadata = {_HEADER_KEY: settings.to_json()}  # with more keys their order would vary
        write_atomically(path, partial(safetensors.torch.save_file, tensors, metadata=metadata), overwrite=overwrite)
    else:
        _save_with_sidecar(tensors, settings, real_path(path), overwrite)


def check_output(path: StrPath, *, overwrite: bool = False) -> None:
    """Raise CheckpointError if `save_checkpoint` could not write there: better before the work than after."""
    if _suffix(path) not in _SUFFIXES:
        raise CheckpointError(f"cannot write {path}: the name of a checkpoint ends in {', '.join(_SUFFIXES)}")
    check_writable(path, overwrite=overwrite)
    if _suffix(path) in _PICKLED:
        target = real_path(path)
        check_writable(sidecar_path(target), overwrite=overwrite)
        for other in (target.with_suffix(suffix) for suffix in _PICKLED):
            if other != target and other.exists():
                raise CheckpointError(
                    f"cannot write {path}: {other.name} stands beside it, and both would have their settings in "
                    f"{sidecar_path(target).name}; choose another name"
                )


def read_settings(path: StrPath) -> Settings | None:
    """Return the settings stored with a checkpoint, or None if there are none.

    Raises CheckpointError when the checkpoint is no file of a known format, or its settings are damaged.
    """
    real = real_path(path)
    if file_kind(real) != "safetensors":
        return read_sidecar(real)
    text = read_metadata(real).get(_HEADER_KEY)
    try:
        return None if text is None else Settings.from_json(text)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path}: the settings in its header are damaged: {printable(error)}; write it again"
        ) from error


def _suffix(path: StrPath) -> str:
    return Path(path).suffix.lower()


def _save_with_sidecar(tensors: dict[str, Tensor], settings: Settings, target: Path, overwrite: bool) -> None:
    sidecar = sidecar_path(target)
    # All is written before the first name changes: a full disk changes nothing.
    with staging_folder(target) as folder:
        staged = stage(folder / "checkpoint", partial(_pickle, tensors), target)
        staged_sidecar = stage(folder / "settings", partial(_write_text, settings.to_json()), sidecar)
        if overwrite and target.exists():
            transition = stage(
                folder / "transition", lambda path: _write_text(transitional_json(settings, target), path), sidecar
            )
            publish(transition, sidecar, overwrite=True)
            publish(staged, target, overwrite=True)
            publish(staged_sidecar, sidecar, overwrite=True)
            return
        publish(staged_sidecar, sidecar, overwrite=overwrite)
        try:
            publish(staged, target, overwrite=overwrite)
        except BaseException:
            sidecar.unlink(missing_ok=True)  # it was made above, and without its checkpoint it would be in the way
            raise


def _pickle(tensors: dict[str, Tensor], path: Path) -> None:
    # Through a file object: given a path, torch.save would write the staged name into the file.
    with path.open("wb") as file:
        torch.save(tensors, file)


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def _network(model: nn.Module) -> nn.Module:
    """Return the network inside what torch.compile, DataParallel and DistributedDataParallel put around it."""
    inner = getattr(model, "_orig_mod", None)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner = model.module
    return _network(inner) if isinstance(inner, nn.Module) else model


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's state dict as plain tensors on the CPU, contiguous, none sharing memory with another."""
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, value in model.state_dict().items():
        if type(value) not in (Tensor, nn.Parameter) or not is_plain(value):
            raise CheckpointError(f"{key} is no ordinary dense tensor with values, and only those can be stored")
        tensor = value.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage()
        # A view would drag its whole storage into the file, and safetensors takes no tensors that share one.
        if storage.nbytes() != tensor.numel() * tensor.element_size() or storage.data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[key] = tensor
    return tensors


def _architecture(model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    made = copy.deepcopy(model) if isinstance(model, nn.Module) else model()
    if not isinstance(made, nn.Module):
        raise CheckpointError(f"model should be a module or make one, and made a {type(made).__name__}")
    return made


def _fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load the tensors into the model, in place; all of them, and into all that it has."""
    wanted = model.state_dict()
    if any(isinstance(value, Tensor) and value.is_meta for value in wanted.values()):
        raise CheckpointError("the given model is on the meta device, which has no memory; make it on the CPU")
    mismatches = [
        f"{key} is {tuple(tensors[key].shape)} in the file and {tuple(value.shape)} in the model"
        for key, value in wanted.items()
        if key in tensors and isinstance(value, Tensor) and value.shape != tensors[key].shape
    ]
    mismatches += [
        f"{key} is of {tensors[key].dtype} in the file and of {value.dtype} in the model"
        for key, value in wanted.items()
        if key in tensors and isinstance(value, Tensor) and tensors[key].is_complex() and not value.is_complex()
    ]
    if not mismatches:
        try:
            missing, unexpected = model.load_state_dict(tensors, strict=False)
        except RuntimeError as error:  # an architecture may load its tensors in ways of its own
            raise CheckpointError(f"the checkpoint does not fit {type(model).__name__}: {error}") from error
        mismatches = [f"{key} is not in the file" for key in missing]
        mismatches += [f"{key} is not in the model" for key in unexpected]
    if mismatches:
        shown = "; ".join(mismatches[:_MISMATCHES_SHOWN])
        more = f"; and {len(mismatches) - _MISMATCHES_SHOWN} more" if len(mismatches) > _MISMATCHES_SHOWN else ""
        raise CheckpointError(
            f"the checkpoint does not fit {type(model).__name__}: {shown}{more}; pass the architecture that it was "
            "written from"
        )
