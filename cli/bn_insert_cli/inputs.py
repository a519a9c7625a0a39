"""Open what the command line names: a network, and images that it takes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from bn_insert.support.text import counted, listed

from .console import print_note, print_warning
from .input_shapes import image_shape, input_shape, runs_on
from .named_checkpoints import print_assumptions, read_named_checkpoint
from .option_values import ImageOptions
from .preprocessing import is_tensor_file, preprocessing, print_preprocessing, side_of, usable_transform

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bn_insert import Ranks, Settings
    from bn_insert.images import Batches, ClassFolders, Transform, Unreadable

_FILES_SHOWN = 5
_NAMES_SHOWN = 5


class Opened(NamedTuple):
    """A checkpoint.

    Attributes:
        network: Its network.
        transform: Its preprocessing.
        classes: The names of its classes; empty if it stores none.
        origin: Where the preprocessing comes from, in words.
        settings: What the checkpoint stores besides its tensors.
    """

    network: nn.Module
    transform: Transform
    classes: tuple[str, ...]
    origin: str
    settings: Settings | None


def open_checkpoint(
    checkpoint: str,
    options: ImageOptions,
    function: str | None = None,
    *,
    images: Path | None = None,
    key: str | None = None,
    ignore_unexpected: bool = False,
) -> Opened:
    """Return what a checkpoint file contains, or the weights of a network in torchvision.

    Args:
        checkpoint: Path of the file, or a name in TORCHVISION_NAMES.
        options: Preprocessing that replaces what the checkpoint stores; ImageNet's is used where neither has any.
        function: "package.module:function" that builds the architecture, from --model; it is imported and called.
        images: What the preprocessing will be used on. If it is not None, the preprocessing and its origin are printed.
        key: --key.
        ignore_unexpected: --ignore-unexpected.
    """
    from bn_insert import build_network  # noqa: PLC0415 - torch only when work begins

    content = read_named_checkpoint(checkpoint, function, key=key)
    transform, origin = preprocessing(content, options)
    network = build_network(content, function, ignore_unexpected=ignore_unexpected)
    if images is not None and _is_first_rank():
        print_preprocessing(transform, origin, images)
        print_assumptions(network, content.settings, checkpoint, function)
    classes = content.settings.classes if content.settings else ()
    return Opened(network, transform, classes, origin, content.settings)


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"  # torchrun's, before there is a process group


def warn_of_other_normalization(opened: Opened, checkpoint: str) -> None:
    """Warn if the BatchNorm of a checkpoint belongs to images with another mean and std than those of the options."""
    from torch.nn.modules.batchnorm import _BatchNorm  # noqa: PLC0415

    from bn_insert.report import preprocessing_text  # noqa: PLC0415

    stored, now = usable_transform(opened.settings), opened.transform
    if stored is None or (stored.mean, stored.std) == (now.mean, now.std) or not _is_first_rank():
        return
    if not any(isinstance(module, _BatchNorm) for module in opened.network.modules()):
        return
    mean_and_std = ", ".join(preprocessing_text(stored.to_dict()).split("; ")[2:])
    print_warning(
        f"the BatchNorm statistics in {checkpoint} were measured with {mean_and_std}; with other values, the network "
        "no longer computes its original function. If the original network was trained with the new values, insert "
        "BatchNorm into it again, with these options."
    )


def in_order_of_outputs(images: ClassFolders, stored: Sequence[str]) -> ClassFolders:
    """Return class folders in the order of a checkpoint's outputs if it stores names of them; else say how they match.

    Folders with other names get the outputs that are left, both sorted by name.
    """
    renamed, left = sorted({*images.classes} - {*stored}), sorted({*stored} - {*images.classes})
    if len(stored) != len(images.classes):
        return images
    if len(renamed) == len(left) < len(stored):
        folder_of = dict(zip(left, renamed, strict=True))
        if folder_of and _is_first_rank():
            pairs = [f"{folder} that for {name}" for name, folder in folder_of.items()]
            print_note(
                "The folders are matched with the checkpoint's outputs by name. Those without an output of their name "
                f"get one that is left: {listed(pairs, _NAMES_SHOWN)}."
            )
        return images.in_order([folder_of.get(name, name) for name in stored])
    if _is_first_rank():
        print_note(
            f"The checkpoint stores other class names ({listed(stored, _NAMES_SHOWN)}) than those of the folders "
            f"({listed(images.classes, _NAMES_SHOWN)}): its outputs are taken for the folders, sorted by name, in that "
            "order."
        )
    return images


def open_calibration(
    source: Path, model: nn.Module, transform: Transform, options: ImageOptions, *, shuffle: bool = True
) -> Batches:
    """Return the batches of a folder of images or a tensor file, with as many channels as the model takes.

    Args:
        source: The folder, or the file.
        model: The network.
        transform: Preprocessing of images.
        options: How many images, and how they are read.
        shuffle: As for `bn_insert.images.open_batches`.
    """
    from bn_insert.images import TensorBatches  # noqa: PLC0415

    batches = _opened(source, model, transform, options, shuffle=shuffle)
    if isinstance(batches, TensorBatches) and not batches.values.is_floating_point():
        print_warning(
            f"{source} contains {batches.values.dtype}, whose values are used without scaling. If the network was "
            "trained on scaled or normalized images, save those, as floating-point numbers."
        )
    return batches


def has_more_images(source: Path, model: nn.Module, transform: Transform, options: ImageOptions) -> bool:
    """Return whether `options.images` leaves any images of a source out."""
    if options.images is None:
        return False
    more = replace(options, images=options.images + 1)
    return _opened(source, model, transform, more, shuffle=True).images > options.images


def _opened(source: Path, model: nn.Module, transform: Transform, options: ImageOptions, *, shuffle: bool) -> Batches:
    from bn_insert.images import open_batches  # noqa: PLC0415

    inputs = _several_inputs(model)
    channels, *size = input_shape(model) if is_tensor_file(source) else image_shape(model, side_of(transform))
    return open_batches(
        source,
        transform,
        images=options.images,
        seed=options.seed,
        batch_size=options.batch_size,
        workers=options.workers,
        channels=channels,
        dims=len(size),
        inputs=inputs,
        takes=runs_on(model),
        strict=options.strict,
        shuffle=shuffle,
    )


def shape_to_store(batches: Batches) -> tuple[int, ...]:
    """Return the shape of the inputs in a tensor file, for a new checkpoint; empty for images and several inputs."""
    from bn_insert.images import TensorBatches  # noqa: PLC0415

    return batches.image_shape if isinstance(batches, TensorBatches) else ()


def note_unreadable(unreadable: Sequence[Unreadable]) -> None:
    """Warn of how many files were skipped, and why; at most `_FILES_SHOWN` are named."""
    if unreadable:
        files = [f"{path}: {reason}" for path, reason in unreadable[:_FILES_SHOWN]]
        if (more := len(unreadable) - len(files)) > 0:
            files.append(f"and {more} more")
        print_warning(f"Skipped {counted(len(unreadable), 'unreadable file')}: {'; '.join(files)}")


def share_of(batches: Batches, ranks: Ranks, device: torch.device) -> Batches:
    """Return the batches of a rank, in page-locked memory where there is a GPU."""
    share = batches.part(ranks.rank, ranks.count)
    return share.with_pinned_memory() if device.type == "cuda" else share


def _several_inputs(model: nn.Module) -> tuple[str, ...] | Literal["all"]:
    """Return the names of the inputs that a network's forward takes if there are several; "all" if it takes a dict."""
    from bn_insert import forward_inputs  # noqa: PLC0415

    inputs = forward_inputs(model)
    if inputs.takes_dict:
        return "all"
    return inputs.names if inputs.several else ()


def check_one_input(model: nn.Module, advice: str) -> None:
    """Raise GraphError for a network with several inputs, where only one can be provided.

    Args:
        model: The network.
        advice: What to do instead.
    """
    from bn_insert import GraphError  # noqa: PLC0415

    if names := _several_inputs(model):
        taken = "a dict of inputs" if names == "all" else f"several inputs ({', '.join(names)})"
        raise GraphError(f"{type(model).__name__} takes {taken}: {advice}")
