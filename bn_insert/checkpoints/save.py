"""Save a network as a checkpoint: one file with its state dict and its settings."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..batchnorm.batch_renorm import PLAIN_BATCHNORMS
from ..batchnorm.modes import has_own_pre_hooks
from ..errors import CheckpointError
from ..graph.copies import check_module, unwrapped
from ..graph.layers import outputs_of
from ..support.arguments import check_flags, is_list
from ..support.files import StrPath, check_writable, real_path, stage_file, staging_folder
from ..support.text import counted, with_article
from ..surgery.replace_output import output_layer, possible_output_layers
from .settings import HEADER_KEY, METADATA_KEY, Settings
from .state_dict import independent, is_plain

_SUFFIXES = (".pth", ".pt", ".safetensors")
_ENDING = f"{', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}"


def save_checkpoint(
    model: nn.Module,
    path: StrPath,
    *,
    transform: Mapping[str, Any] | None = None,
    classes: Sequence[str] = (),
    input_shape: Sequence[int] = (),
    overwrite: bool = False,
) -> None:
    """Save the state dict of a model in one file, with the settings that a state dict does not store.

    The settings are eps and momentum of every BatchNorm, p of every dropout layer, the transform, the names of the
    classes, the shape of an input, and the changes that bn-insert made to the modules, which `load_checkpoint` replays
    on the network that the model's function builds.

    A `.pth` or `.pt` is what `torch.save(model.state_dict(), path)` writes, so any program can load it. Its settings
    are a string in the metadata that PyTorch keeps with a state dict, `state_dict._metadata[""]["bn_insert"]`. A
    program that overwrites the file with a plain dict of the tensors, or with the state dict of its own model, loses
    them. A `.safetensors` file has its settings in the header.

    Wrappers such as torch.compile, DataParallel and DistributedDataParallel are not saved. Writing is atomic: if the
    process is killed at any moment, the path holds either the old file or the new one, complete. No other file is
    written or removed; a `NAME.json` that an older bn-insert wrote next to the `.pth` stays but is ignored, since
    settings in the file take precedence.

    Args:
        model: The model to save.
        path: A file name that ends in .pth, .pt or .safetensors.
        transform: Preprocessing of images for the model, as `bn_insert.images.Transform(...).to_dict()` returns it, for
            the commands; any other JSON object is stored, but the commands refuse it unless options replace all of it.
        classes: Names of the classes, in the order of the model's outputs; none if they are not known. Warns if their
            number differs from the number of outputs of the output layer.
        input_shape: Shape of one input, such as (3, 32, 32), for the commands that run a network without images
            (`inspect` and `fold`), where the transform does not give it.
        overwrite: Replace an existing file.

    Raises:
        CheckpointError: The file exists or cannot be written, or the model has values that cannot be stored. Then
            nothing has changed.
        GraphError: The model is not a module.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "network.pth")
        >>> save_checkpoint(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, eps=1e-3)), path)
        >>> "bn_insert" in torch.load(path)._metadata[""]
        True
    """
    check_module(model)
    check_output(path, overwrite=overwrite)
    with staging_folder(real_path(path)) as folder:
        put_in_place = stage_checkpoint(
            model, path, folder, transform=transform, classes=classes, input_shape=input_shape, overwrite=overwrite
        )
        _warn_of_other_classes(unwrapped(model), classes)
        put_in_place()


def stage_checkpoint(
    model: nn.Module,
    path: StrPath,
    folder: Path,
    *,
    transform: Mapping[str, Any] | None = None,
    classes: Sequence[str] = (),
    input_shape: Sequence[int] = (),
    overwrite: bool = False,
) -> Callable[[], None]:
    """Write what `save_checkpoint` would write into a staging folder; return the function that puts it in place.

    The number of classes is not compared with the layers: `finetune` knows how many logits the network returns.
    """
    network = unwrapped(model)
    if transform is not None and not isinstance(transform, Mapping):
        raise CheckpointError(
            f"cannot write {path}: transform is {with_article(transform)}, not a dict; pass "
            "bn_insert.images.Transform(...).to_dict()"
        )
    if not is_list(classes):  # in a set, they would have another order in each process
        raise CheckpointError(
            f"cannot write {path}: classes is {classes!r:.40}; pass a list with the name of each class"
        )
    if not isinstance(input_shape, list | tuple):  # a set has no order
        raise CheckpointError(f"cannot write {path}: input_shape is {input_shape!r:.40}; pass one such as (3, 32, 32)")
    try:
        state_dict = _state_dict(network)
        settings = Settings.of(network, transform, classes, input_shape)
        text = replace(settings, rebuilt_from_keys=_is_rebuilt(network, state_dict, settings)).to_json()
    except CheckpointError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
    write: Callable[[Path], object]
    if _suffix(path) == ".safetensors":
        # A single key: the order of several would vary.
        write = partial(safetensors.torch.save_file, state_dict, metadata={HEADER_KEY: text})
    else:
        state_dict._metadata.setdefault("", {})[METADATA_KEY] = text  # type: ignore[attr-defined]
        write = partial(_save_by_torch, state_dict)
    return stage_file(real_path(path), write, folder, overwrite=overwrite)


def _warn_of_other_classes(network: nn.Module, classes: Sequence[str]) -> None:
    """Warn about names that do not match the outputs; an error would lose a trained network.

    If there are several layers, it is unknown here which one computes the logits.
    """
    layers = possible_output_layers(network)
    if classes and layers and len(classes) not in map(outputs_of, layers.values()):
        output = output_layer(network)
        warnings.warn(
            f"{counted(len(classes), 'class name')} for the {output.outputs} outputs of {output.name}: the network "
            "cannot be evaluated under these names; save it again with one name for each output",
            stacklevel=3,
        )


def check_output(path: StrPath, *, overwrite: bool = False, inputs: Iterable[StrPath] = ()) -> None:
    """Raise CheckpointError if `save_checkpoint` could not write to a path: checked before the work, not after.

    Args:
        path: As for `save_checkpoint`.
        overwrite: As for `save_checkpoint`.
        inputs: Files that the work reads. If the path leads to one of them, directly or through a link, it is refused
            even with `overwrite`.
    """
    check_flags(CheckpointError, overwrite=overwrite)
    if not isinstance(path, str | PathLike):
        raise CheckpointError(f"the path is {path!r:.40}; pass the name of a file that ends in {_ENDING}")
    if _suffix(path) not in _SUFFIXES:
        raise CheckpointError(f"cannot write {path}: the file name must end in {_ENDING}")
    check_writable(path, overwrite=overwrite, inputs=inputs)


def _suffix(path: StrPath) -> str:
    return Path(path).suffix.lower()


def _state_dict(network: nn.Module) -> OrderedDict[str, Tensor]:
    """Return a state dict of contiguous tensors on the CPU that share no memory, with the metadata of PyTorch."""
    state = network.state_dict()
    for key, value in state.items():
        if type(value) not in (Tensor, nn.Parameter) or not is_plain(value):
            raise CheckpointError(f"{key} is not an ordinary dense tensor with values; only those can be stored")
    result = OrderedDict(independent(state))
    # Versions of modules, by which PyTorch recognizes how a state dict was written. Other values might not load again.
    versions = {
        name: {key: value for key, value in entry.items() if isinstance(value, int | str | None)}
        for name, entry in getattr(state, "_metadata", {}).items()
    }
    result._metadata = versions  # type: ignore[attr-defined]
    return result


def _is_rebuilt(network: nn.Module, state_dict: Mapping[str, Tensor], settings: Settings) -> bool:
    """Return whether a network is the VGG that `load_checkpoint` rebuilds from its keys, so that nothing is assumed."""
    if type(network).__module__ != "torchvision.models.vgg":
        return False
    from .vgg import vgg_from_state_dict  # noqa: PLC0415 - imports torchvision, as the network has already

    try:
        rebuilt = vgg_from_state_dict(state_dict, settings)
    except CheckpointError:
        return False
    return _described(rebuilt) == _described(network) and not any(map(_is_altered, network.modules()))


def _described(network: nn.Module) -> list[tuple[str, type, str]]:
    """Return name, class and settings of each module; the mode and the settings of a BatchNorm are stored elsewhere."""
    described = []
    for name, module in network.named_modules():
        norm = isinstance(module, _BatchNorm)
        cls: type = PLAIN_BATCHNORMS.get(type(module), type(module)) if norm else type(module)
        described.append((name, cls, "" if norm else module.extra_repr()))
    return described


def _is_altered(module: nn.Module) -> bool:
    """Return whether a module computes something other than its class says."""
    return "forward" in vars(module) or bool(module._forward_hooks) or has_own_pre_hooks(module)


def _save_by_torch(state_dict: Mapping[str, Tensor], path: Path) -> None:
    # Through a file object: given a path, torch.save would store the name of the staged file.
    with path.open("wb") as file:
        torch.save(state_dict, file)
