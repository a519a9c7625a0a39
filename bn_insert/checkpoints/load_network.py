"""Rebuild the network of a checkpoint: a VGG from its keys and shapes, any other with the caller's architecture."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import CheckpointError, as_passed
from ..graph.copies import deep_copy, tied_parameters, unwrapped
from ..graph.inputs import reference_tensor
from ..support.arguments import check_flags
from ..support.files import StrPath
from ..support.text import counted, listed, printable, with_article
from ..surgery.history import Change, History
from .model_option import make_network
from .read_file import Checkpoint, read_checkpoint
from .settings import Settings
from .state_dict import AVERAGED, independent, without_prefix

_MISMATCHES_SHOWN = 8
_IGNORED_SHOWN = 8

Architecture = str | nn.Module | Callable[[], nn.Module]


def load_checkpoint(
    path: StrPath,
    *,
    model: Architecture | None = None,
    mmap: bool = False,
    key: str | None = None,
    ignore_unexpected: bool = False,
) -> nn.Module:
    """Return the network of a checkpoint file, in eval mode, on the CPU, without running code from the file.

    A VGG is rebuilt from keys and shapes alone, with the dtypes of the file (see `vgg.vgg_from_state_dict`). Settings
    that `save_checkpoint` stored are applied. Without them, BatchNorm in a VGG has eps 1e-5 and momentum 0.1, and
    dropout has p 0.5.

    Args:
        path: A .pth, .pt, .bin or .safetensors file; its content determines the format. It contains a state dict, or a
            dict with one under a common key such as "state_dict" or "model". A prefix that all of its keys have, such
            as "module." or "backbone.", is removed. Objects of harmless types other than tensors, such as
            argparse.Namespace, are ignored; a file with objects of any other type is refused.
        model: The architecture, required unless the network is a VGG: a module (a copy of it is returned), a
            zero-argument function that builds the module, or the name of such a function as "package.module:function",
            which is imported. The checkpoint is loaded strictly; the module keeps its dtype and device. Changes that
            bn-insert made (inserting or folding BatchNorm, replacing the output layer or the head) are recorded in the
            checkpoint and replayed, so pass the original architecture.
        mmap: Leave the values of a VGG in the file until they are used, as `torch.load` does: fast, for inspecting
            layers. The file must not change in the meantime, damage that changes only values goes unnoticed, and
            tensors that share memory in the file share it in the network.
        key: The key of the state dict in the file, if it is not a common one; for nested dicts, the keys joined by
            dots, such as "trainer.best". If a state dict contains several networks, the prefix of the keys of one of
            them, such as "teacher". With any other key, a file that is a state dict itself is refused.
        ignore_unexpected: Ignore tensors that the network does not have, such as the counts of a profiler, with a
            warning that names them.

    Raises:
        CheckpointError: The file cannot be read or does not fit the architecture, or its settings name the function
            that builds its network and `model` is not given: only the caller decides which code is imported. The
            message states the path, the reason and what to do.

    Examples:
        >>> from bn_insert.demo import network_path
        >>> model = load_checkpoint(network_path())
        >>> type(model).__name__, len(model.features), model.training
        ('VGG', 16, False)
    """
    return build_network(read_checkpoint(path, mmap=mmap, key=key), model, ignore_unexpected=ignore_unexpected)


def build_network(
    checkpoint: Checkpoint, model: Architecture | None = None, *, ignore_unexpected: bool = False
) -> nn.Module:
    """Return the network of a checkpoint that has been read; see `load_checkpoint`.

    A VGG uses the tensors of the checkpoint without copying them where it can, so build only one network from it.

    Args:
        checkpoint: What the file contains.
        model: The architecture, as for `load_checkpoint`.
        ignore_unexpected: As for `load_checkpoint`.

    Raises:
        CheckpointError: As for `load_checkpoint`.
    """
    check_flags(CheckpointError, ignore_unexpected=ignore_unexpected)
    if not isinstance(checkpoint, Checkpoint):
        raise CheckpointError(f"checkpoint is {with_article(checkpoint)}; pass what read_checkpoint(path) returns")
    path, settings = checkpoint.path, checkpoint.settings or Settings()
    given = None if model is None else _built(model)
    try:
        if given is None:
            # Importing torchvision takes as long as everything else here, and only this case needs it.
            from .vgg import layer_tensors, vgg_from_state_dict  # noqa: PLC0415

            _check_needs_no_function(settings.history)
            prefix, tensors = without_prefix(_unshared(checkpoint), others=ignore_unexpected, key=checkpoint.key)
            known = layer_tensors(tensors) if ignore_unexpected else tensors
            network: nn.Module = vgg_from_state_dict(known)
            unexpected = [key for key in tensors if key not in known]
            history = History() if prefix else settings.history
            history.mark_inserted(network)
        else:
            network, changes, prefix, unexpected = _filled(given, checkpoint, ignore_unexpected=ignore_unexpected)
            history = History(model if isinstance(model, str) else None, changes)
    except CheckpointError as error:
        advice = ""
        if given is not None and _needs_no_model(checkpoint, ignore_unexpected=ignore_unexpected):
            advice = f"; without {as_passed('model')}, the architecture is read from the checkpoint"
        if given is None and not ignore_unexpected and _needs_no_model(checkpoint, ignore_unexpected=True):
            advice = f", or ignore tensors that do not belong to the network ({as_passed('ignore_unexpected', True)})"
        raise CheckpointError(f"{path}: {printable(error)}{advice}") from error
    if ignore_unexpected:
        _warn_of_ignored(checkpoint, prefix, unexpected)
    if history != History():
        history.keep_with(network)
    try:
        settings.without_prefix(prefix).apply_to(network)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path}: the settings in {checkpoint.settings_place} belong to another checkpoint: {printable(error)}; "
            "remove them, or save the network again with save_checkpoint"
        ) from error
    network.eval()  # not what it returns: a class may have a `train` that returns nothing
    return network


def _warn_of_ignored(checkpoint: Checkpoint, prefix: str, unexpected: Sequence[str]) -> None:
    """Name the tensors that were left out: one of them may belong to a layer whose key has a typo."""
    ignored = [*unexpected, *(key for key in checkpoint.tensors if not key.startswith(prefix) and key != AVERAGED)]
    if ignored:
        text = f"ignoring {counted(len(ignored), 'tensor')} of {checkpoint.path}: "
        warnings.warn(text + printable(listed(ignored, _IGNORED_SHOWN)), stacklevel=4)


def _needs_no_model(checkpoint: Checkpoint, *, ignore_unexpected: bool) -> bool:
    """Return whether the network of a checkpoint can be built from the file alone."""
    try:
        with warnings.catch_warnings(action="ignore"):
            build_network(replace(checkpoint, mapped=True), ignore_unexpected=ignore_unexpected)  # mapped: no copies
    except CheckpointError:
        return False
    return True


def _unshared(checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    """Return tensors that share memory neither with each other nor with the file, unless the file is to be mapped."""
    if checkpoint.mapped:
        return checkpoint.tensors
    if checkpoint.kind == "safetensors":  # mapped in any case
        return {key: tensor.clone() for key, tensor in checkpoint.tensors.items()}
    return independent(checkpoint.tensors)


def _built(model: Architecture) -> nn.Module:
    """Return a network of the architecture that the caller passed; its values do not matter."""
    if isinstance(model, str):
        model = make_network(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise CheckpointError("the model passed is a TorchScript program; pass the nn.Module that it was made from")
    if not isinstance(model, nn.Module) and not callable(model):
        raise CheckpointError(
            f"model is {with_article(model)}; pass a module with the architecture of the checkpoint, or a function "
            "that builds one"
        )
    built = model if isinstance(model, nn.Module) else model()
    if not isinstance(built, nn.Module):
        raise CheckpointError(
            f"model must be a module or a function that returns one, and returned {with_article(built)}"
        )
    if any(isinstance(value, Tensor) and value.is_meta for value in built.state_dict().values()):
        raise CheckpointError("the model passed is on the meta device, which has no memory; build it on the CPU")
    if any(is_lazy(value) for value in (*built.parameters(), *built.buffers())):
        raise CheckpointError("the model passed has lazy layers, whose shapes are not known; call it once on an input")
    return deep_copy(built) if built is model else unwrapped(built)


def _check_needs_no_function(history: History) -> None:
    if name := history.function:
        raise CheckpointError(
            f"its settings name the function that builds its network, {name}, and code is imported only on request: "
            f"if you trust that code, pass {as_passed('model', name)}"
        )


def _filled(
    network: nn.Module, checkpoint: Checkpoint, *, ignore_unexpected: bool
) -> tuple[nn.Module, tuple[Change, ...], str, list[str]]:
    """Load the tensors of a checkpoint into the network, in place and strictly.

    The changes in the checkpoint's history are replayed first, unless the network already has its keys and shapes.
    Returns the network, the changes made (or only its adaptations, if none had to be), the prefix removed from the
    keys, and the keys that are not in the network.
    """
    device, described = reference_tensor(network).device, type(network).__name__
    history = checkpoint.settings.history if checkpoint.settings else History()
    changes: tuple[Change, ...] = history.adaptations
    stripped = partial(without_prefix, checkpoint.tensors, others=ignore_unexpected, key=checkpoint.key)
    prefix, named = stripped(network.state_dict())
    if history.changes and (not _has_all_of(network, named) or (history.unties and _differing(network, named))):
        changes = history.changes
        own = History.of(network).changes  # made by the function itself, which may fold, for example
        remaining = changes[len(own) :] if changes[: len(own)] == own else changes
        try:
            network = History(changes=remaining).replay(network)
        except CheckpointError as error:
            raise CheckpointError(
                f"the changes recorded in its settings cannot be made to {described}: {error}; pass the architecture "
                "that they were made to"
            ) from error
        described += " with the changes recorded in its settings"
        prefix, named = stripped(network.state_dict())
    without_memory = [
        key for key, value in network.state_dict().items() if isinstance(value, Tensor) and value.is_meta and value.ndim
    ]
    absent = [f"{key} is not in the file" for key in without_memory if key not in named]
    _check_fit(described, absent + _misfits(network, named))  # before memory is allocated: the file may claim any size
    _give_memory(network, device)
    if pair := _differing(network, named):
        raise CheckpointError(
            f"{' and '.join(pair)} are one parameter of {described}, and differ in the file; pass an architecture "
            "whose layers do not share it"
        )
    missing, unexpected = _load(network, named, described)
    if not network.state_dict():
        raise CheckpointError(
            f"{described} has no parameters or buffers to load; pass the architecture that the checkpoint was saved "
            "from, with its layers as attributes or in an nn.ModuleList: those in a plain list are not part of a module"
        )
    _separate(network, named)
    mismatches = [f"{key} is not in the file" for key in missing]
    if not ignore_unexpected:
        mismatches += [f"{key} is not in the model" for key in unexpected]
    unexpected_alone = bool(unexpected) and not missing
    ignoring = as_passed("ignore_unexpected", True)
    _check_fit(described, mismatches, f"or leave these tensors out ({ignoring})" if unexpected_alone else "")
    return network, changes, prefix, unexpected


def _differing(network: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Return two keys of one parameter of a network whose tensors differ: only one of them could be loaded."""
    for pair in tied_parameters(network):
        if tensors.keys() >= set(pair):
            first, second = (tensors[key].to(network.get_parameter(key).dtype) for key in pair)
            if not _equal(first, second):
                return pair
    return None


def _equal(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors of one shape have the same values, NaN included."""
    return torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)


def _separate(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give tensors that share memory, and differ in the file, memory of their own: loading one overwrote another.

    These are parameters such as `nn.Parameter(encoder.weight.t())`, which are not one parameter with two names, and
    such buffers.
    """
    in_memory: dict[int, list[tuple[str, Tensor]]] = {}
    for name, own in chain(network.named_parameters(), network.named_buffers()):
        if own.layout == torch.strided and not is_traceable_wrapper_subclass(own):  # others have no plain storage
            in_memory.setdefault(own.untyped_storage().data_ptr(), []).append((name, own))
    for sharing in in_memory.values():
        for name, own in sharing if len(sharing) > 1 else ():
            if name in tensors and tensors[name].shape == own.shape:
                value = tensors[name].to(own)
                if not _equal(value, own):
                    own.data = value.clone()


def _load(network: nn.Module, tensors: Mapping[str, Tensor], described: str) -> tuple[list[str], list[str]]:
    """Load tensors in place, and return the keys that are missing and those that are unexpected."""
    try:
        found = network.load_state_dict(tensors, strict=False)
        if isinstance(found, tuple) and len(found) == 2:
            return found
    except Exception as error:
        if type(network).load_state_dict is nn.Module.load_state_dict:
            raise CheckpointError(f"the checkpoint does not fit {described}: {error}") from error
    # Its own load_state_dict has other parameters, or returns nothing.
    try:
        return nn.Module.load_state_dict(network, tensors, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint does not fit {described}: {error}") from error


def _has_all_of(network: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a network has exactly the keys and shapes of these tensors."""
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
        f"{key} is {stored.dtype} in the file and {value.dtype} in the model"
        for key, (stored, value) in both.items()
        if stored.is_complex() and not value.is_complex()
    ]


def _give_memory(network: nn.Module, device: torch.device) -> None:
    """Move modules from the meta device to a device, in place, with zeros as values."""
    for module in network.modules():
        if any(tensor.is_meta for tensor in _own_tensors(module)):
            module.to_empty(device=device, recurse=False)
            for tensor in _own_tensors(module):
                tensor.detach().zero_()


def _own_tensors(module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of a module, whose class may have a method `parameters` of its own."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in tensors if tensor is not None]


def _check_fit(described: str, mismatches: Sequence[str], advice: str = "") -> None:
    if mismatches:
        shown = "; ".join(mismatches[:_MISMATCHES_SHOWN])
        more = f"; and {len(mismatches) - _MISMATCHES_SHOWN} more" if len(mismatches) > _MISMATCHES_SHOWN else ""
        raise CheckpointError(
            f"the checkpoint does not fit {described}: {shown}{more}; pass the architecture that it was saved from"
            f"{', ' * bool(advice)}{advice}"
        )
