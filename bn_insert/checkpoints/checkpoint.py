"""Read and write checkpoint files: a network in, a network out, with what a state dict leaves out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..graph.copies import unwrapped
from ..graph.inputs import reference_tensor
from ..support.files import StrPath, check_writable, publish, real_path, stage, stage_file, staging_folder
from ..support.text import printable
from ..surgery.history import Architecture, Change
from .model_function import make_network
from .settings import Settings
from .sidecar import is_foreign, is_left_over, read_sidecar, sidecar_path, transitional_json
from .state_dict import file_kind, independent, is_plain, read_metadata, read_state_dict, without_prefix

__all__ = ["check_output", "load_checkpoint", "read_settings", "save_checkpoint"]

_PICKLED = (".pth", ".pt")
_SUFFIXES = (*_PICKLED, ".safetensors")
_HEADER_KEY = "bn-insert"
_MISMATCHES_SHOWN = 8


def load_checkpoint(
    path: StrPath, *, model: str | nn.Module | Callable[[], nn.Module] | None = None, mmap: bool = False
) -> nn.Module:
    """Return the network of a checkpoint file, in eval mode, on the CPU; no code from the file is ever run.

    A VGG is rebuilt from keys and shapes alone, with the dtypes of the file (`vgg.vgg_from_state_dict` has the rules).
    Settings that `save_checkpoint` stored are applied; a VGG without them has BatchNorm with eps 1e-5 and momentum 0.1,
    and dropout with p 0.5.

    path: .pth, .pt, .bin or .safetensors; the format is told by the content.  A state dict, or a dict with one under
        "state_dict", "model", "model_state_dict" or "model_ema"; prefixes "module.", "model." and "_orig_mod." go.
    model: the architecture where it is no VGG: a module, of which a copy is returned, or a function without arguments
        that makes one, or that function's name as "package.module:function", which is imported. Its dtype and device
        stay. The checkpoint is loaded strictly. It may be the architecture without the BatchNorms that bn-insert put
        in: what bn-insert did (inserting, folding, another output layer) is stored with the settings and done again.
    mmap: leave a VGG's values in the file, from which they are read when they are used, as in `torch.load`: quick, for
        a look at the layers. The file has to stay as it is meanwhile, damage that only changes values goes unnoticed,
        and tensors that share memory in the file do so in the network.
    A checkpoint whose settings name such a function is not read without `model`: only the caller decides what code is
    imported.  Raises CheckpointError with the path, the reason and the way out.

    >>> from bn_insert.demo import network_path
    >>> model = load_checkpoint(network_path())
    >>> type(model).__name__, len(model.features), model.training
    ('VGG', 16, False)
    """
    tensors = read_state_dict(Path(path), mmap=mmap)
    settings = read_settings(path) or Settings()
    given = None if model is None else _made(model)
    try:
        if given is None:
            # Importing torchvision takes as long as everything else here, and only this way needs it.
            from .vgg import vgg_from_state_dict  # noqa: PLC0415

            _check_needs_no_function(settings.architecture)
            prefix, tensors = without_prefix(tensors)
            network: nn.Module = vgg_from_state_dict(tensors if mmap else _own(tensors, path))
            architecture = Architecture() if prefix else settings.architecture
        else:
            network, changes, prefix = _filled(given, tensors, settings.architecture)
            architecture = Architecture(model if isinstance(model, str) else None, changes)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {printable(error)}") from error
    if architecture != Architecture():
        architecture.keep_with(network)
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

    The settings also hold what bn-insert changed in the model's architecture, so that `load_checkpoint` can do it again
    to a network as its own function makes it.

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
    with staging_folder(real_path(path)) as folder:
        stage_checkpoint(model, path, folder, transform=transform, overwrite=overwrite)()


def stage_checkpoint(
    model: nn.Module,
    path: StrPath,
    folder: Path,
    *,
    transform: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Callable[[], None]:
    """Write into a staging folder what `save_checkpoint` would write, and return the function that puts it in place."""
    network = unwrapped(model)
    try:
        tensors = _tensors(network)
        settings = Settings.of(network, transform)
    except CheckpointError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
    target = real_path(path)
    if _suffix(path) == ".safetensors":
        metadata = {_HEADER_KEY: settings.to_json()}  # with more keys their order would vary
        write = partial(safetensors.torch.save_file, tensors, metadata=metadata)
        return stage_file(target, write, folder, overwrite=overwrite)
    return _stage_with_sidecar(tensors, settings, target, folder, overwrite)


def check_output(path: StrPath, *, overwrite: bool = False) -> None:
    """Raise CheckpointError if `save_checkpoint` could not write there: better before the work than after."""
    if _suffix(path) not in _SUFFIXES:
        raise CheckpointError(f"cannot write {path}: the name of a checkpoint ends in {', '.join(_SUFFIXES)}")
    check_writable(path, overwrite=overwrite)
    if _suffix(path) in _PICKLED:
        target = real_path(path)
        check_writable(sidecar_path(target), overwrite=overwrite or is_left_over(target))
        if is_foreign(sidecar_path(target)):
            raise CheckpointError(
                f"cannot write {path}: its settings go into {sidecar_path(target)}, and that is another kind of file; "
                "rename one of them"
            )
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


def _own(tensors: Mapping[str, Tensor], path: StrPath) -> dict[str, Tensor]:
    """Return tensors just read from a file that share memory neither with each other nor with the file."""
    if file_kind(Path(path)) == "safetensors":  # a mapped file
        return {key: tensor.clone() for key, tensor in tensors.items()}
    return independent(tensors)


def _suffix(path: StrPath) -> str:
    return Path(path).suffix.lower()


def _stage_with_sidecar(
    tensors: dict[str, Tensor], settings: Settings, target: Path, folder: Path, overwrite: bool
) -> Callable[[], None]:
    sidecar = sidecar_path(target)
    # All is written before the first name changes: a full disk changes nothing.
    staged = stage(folder / target.name, partial(_pickle, tensors), target)
    final = stage(folder / sidecar.name, partial(_write_text, settings.to_json()), sidecar)
    first = stage(
        folder / f"{sidecar.name}.first",
        lambda path: _write_text(transitional_json(settings, target), path),
        sidecar,
    )

    def put_in_place() -> None:
        left_over = is_left_over(target)
        is_new = left_over or not sidecar.exists()
        publish(first, sidecar, overwrite=overwrite or left_over)
        try:
            publish(staged, target, overwrite=overwrite)
        except BaseException:
            if is_new:
                sidecar.unlink(missing_ok=True)  # it was made above, and without its checkpoint it would be in the way
            raise
        publish(final, sidecar, overwrite=True)

    return put_in_place


def _pickle(tensors: dict[str, Tensor], path: Path) -> None:
    # Through a file object: given a path, torch.save would write the staged name into the file.
    with path.open("wb") as file:
        torch.save(tensors, file)


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's state dict as plain tensors on the CPU, contiguous, none sharing memory with another."""
    state = model.state_dict()
    for key, value in state.items():
        if type(value) not in (Tensor, nn.Parameter) or not is_plain(value):
            raise CheckpointError(f"{key} is no ordinary dense tensor with values, and only those can be stored")
    return independent(state)


def _made(model: str | nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """Return a network of the caller's own architecture, with values that do not matter."""
    if isinstance(model, str):
        model = make_network(model)
    made = copy.deepcopy(model) if isinstance(model, nn.Module) else model()
    if not isinstance(made, nn.Module):
        raise CheckpointError(f"model should be a module or make one, and made a {type(made).__name__}")
    if any(isinstance(value, Tensor) and value.is_meta for value in made.state_dict().values()):
        raise CheckpointError("the given model is on the meta device, which has no memory; make it on the CPU")
    return made


def _check_needs_no_function(architecture: Architecture) -> None:
    if name := architecture.function:
        raise CheckpointError(
            f"its settings name the function that makes its network, {name}, and code is imported only when you ask "
            f"for it: if you trust that code, pass model={name!r} (--model {name})"
        )


def _filled(
    network: nn.Module, tensors: dict[str, Tensor], architecture: Architecture
) -> tuple[nn.Module, tuple[Change, ...], str]:
    """Load the tensors into the network, in place; all of them, and into all that it has.

    Changes of the checkpoint's architecture are made first, unless the network has the checkpoint's keys and shapes
    without. Return the network, the changes that were made, and the prefix that the checkpoint's keys have lost.
    """
    device, described = reference_tensor(network).device, type(network).__name__
    changes: tuple[Change, ...] = ()
    prefix, named = without_prefix(tensors, network.state_dict().keys())
    if architecture.changes and not _has_all_of(network, named):
        changes = architecture.changes
        try:
            network = architecture.make_changes(network)
        except CheckpointError as error:
            raise CheckpointError(
                f"its settings tell of changes that cannot be made to {described}: {error}; pass the architecture that "
                "the changes were made to"
            ) from error
        described += " with the changes that its settings tell of"
        prefix, named = without_prefix(tensors, network.state_dict().keys())
    without_memory = [
        key for key, value in network.state_dict().items() if isinstance(value, Tensor) and value.is_meta and value.ndim
    ]
    absent = [f"{key} is not in the file" for key in without_memory if key not in named]
    _check_fit(described, absent + _misfits(network, named))  # before memory is taken: settings may tell anything
    _give_memory(network, device)
    try:
        missing, unexpected = network.load_state_dict(named, strict=False)
    except RuntimeError as error:  # an architecture may load its tensors in ways of its own
        raise CheckpointError(f"the checkpoint does not fit {described}: {error}") from error
    mismatches = [f"{key} is not in the file" for key in missing]
    _check_fit(described, mismatches + [f"{key} is not in the model" for key in unexpected])
    return network, changes, prefix


def _has_all_of(network: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    """Say whether a network has the keys and shapes of these tensors, and no others."""
    different = network.state_dict().keys() ^ tensors.keys()
    # PyTorch itself loads a BatchNorm without its counter.
    return all(key.endswith("num_batches_tracked") for key in different) and not _misfits(network, tensors)


def _misfits(network: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    wanted = network.state_dict()
    both = {key: (tensors[key], value) for key, value in wanted.items() if key in tensors and isinstance(value, Tensor)}
    return [
        f"{key} is {tuple(stored.shape)} in the file and {tuple(value.shape)} in the model"
        for key, (stored, value) in both.items()
        if value.shape != stored.shape
    ] + [
        f"{key} is of {stored.dtype} in the file and of {value.dtype} in the model"
        for key, (stored, value) in both.items()
        if stored.is_complex() and not value.is_complex()
    ]


def _give_memory(network: nn.Module, device: torch.device) -> None:
    """Put modules that are on the meta device onto a device, in place, with zeros for values."""
    for module in network.modules():
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(tensor.is_meta for tensor in tensors):
            module.to_empty(device=device, recurse=False)
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor.detach().zero_()


def _check_fit(described: str, mismatches: Sequence[str]) -> None:
    if mismatches:
        shown = "; ".join(mismatches[:_MISMATCHES_SHOWN])
        more = f"; and {len(mismatches) - _MISMATCHES_SHOWN} more" if len(mismatches) > _MISMATCHES_SHOWN else ""
        raise CheckpointError(
            f"the checkpoint does not fit {described}: {shown}{more}; pass the architecture that it was written from"
        )
