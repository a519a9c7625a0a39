"""Open what the command line names: a network, its images, a device."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import typer

from bn_insert.errors import CheckpointError, UnneededKeyError
from bn_insert.support.text import counted, figures, first_line, listed, usable_devices

from .console import print_note, print_warning
from .input_shapes import image_shape, input_shape, runs_on

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bn_insert import Checkpoint, Ranks, Settings
    from bn_insert.images import Batches, ClassFolders, Transform, Unreadable

LayerKind = Literal["conv", "dense"]
TORCHVISION_NAMES = ("vgg11", "vgg13", "vgg16", "vgg19")
IMAGENET_DEFAULT = "ImageNet's, the default: the checkpoint stores none"
_REST_BY_DEFAULT = "the rest by default"
_CHECKPOINT_SUFFIXES = {".bin", ".ckpt", ".pt", ".pth", ".safetensors"}
_FILES_SHOWN = 5
_NAMES_SHOWN = 5
_FILES_LOOKED_AT = 1000  # in a folder that was passed as a checkpoint: a listing of all may take long


@dataclass(frozen=True)
class ImageOptions:
    """Options about images; None means the setting in the checkpoint, or else ImageNet's; of `images`, all."""

    images: int | None
    seed: int
    batch_size: int
    workers: int
    resize: int | None
    crop: int | None
    mean: str | None
    std: str | None
    strict: bool

    def __post_init__(self) -> None:
        """Check what would otherwise be parsed only after large files have been read."""
        for option in ("mean", "std"):
            if (text := getattr(self, option)) is not None:
                numbers(text, f"--{option}")


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


def check_checkpoint(checkpoint: str) -> None:
    """Raise CheckpointError unless the argument is an existing path or the name of a torchvision network."""
    try:
        named = is_torchvision_name(checkpoint) or Path(checkpoint).exists()
    except OSError:  # no permission to look, or too long a name: reading it tells
        return
    if not named:
        _check_run_has_epoch(Path(checkpoint))
        read_named_checkpoint(checkpoint)  # which says what may be meant
    if checkpoint and _has_only_images(Path(checkpoint)):  # the empty path would be the current folder
        raise CheckpointError(
            f"{checkpoint} is a folder of images, not a checkpoint file; pass the checkpoint first, and the images "
            "after it"
        )


def _has_only_images(path: Path) -> bool:
    """Return whether a path is a folder of images, perhaps in subfolders, without a checkpoint file among them."""
    from bn_insert import ImageError  # noqa: PLC0415
    from bn_insert.images import check_source  # noqa: PLC0415

    with suppress(ImageError, OSError):
        if path.is_dir():
            check_source(path)
            names = islice(_visible_names(path), _FILES_LOOKED_AT)
            return not any(_CHECKPOINT_SUFFIXES.intersection(Path(name.lower()).suffixes) for name in names)
    return False


def _visible_names(folder: Path) -> Iterator[str]:
    """Yield the names of the files in a folder and its subfolders, except for hidden ones."""
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]  # os.walk enters those that are left
        yield from (name for name in names if name[0] != ".")


def _check_run_has_epoch(path: Path) -> None:
    """Raise CheckpointError if a path that does not exist is a checkpoint of a run without a complete epoch."""
    begun, trained = (path.with_name(name).exists() for name in ("state.pth", "metrics.csv"))
    if path.name in {"best.pth", "last.pth"} and begun and not trained:
        raise CheckpointError(
            f"{path} does not exist: the run in {path.parent} has no complete epoch yet; continue it with `bn-insert "
            "finetune ... --resume`"
        )


def read_named_checkpoint(
    checkpoint: str, function: str | None = None, *, mmap: bool = False, key: str | None = None
) -> Checkpoint:
    """Read a checkpoint file or the weights of a network in torchvision.

    Args:
        checkpoint: Path of the file, or a name in TORCHVISION_NAMES.
        function: --model; the current folder is added to the places from which it can be imported.
        mmap: Leave the values in the file until they are used.
        key: --key.
    """
    from bn_insert import read_checkpoint, torchvision_checkpoint  # noqa: PLC0415

    if is_torchvision_name(checkpoint):
        if key is not None:
            raise UnneededKeyError(f"{checkpoint} is a network of torchvision; leave out --key")
        if function is not None:
            raise typer.BadParameter(
                f"{checkpoint} is a network of torchvision, whose architecture is known; --model is for checkpoint "
                "files",
                param_hint="--model",
            )
        return torchvision_checkpoint(checkpoint)
    if function is not None and (folder := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, folder)  # as python -m does; the function may import more when it is called
    try:
        return read_checkpoint(checkpoint, mmap=mmap, key=key)
    except CheckpointError as error:
        if not _is_name(checkpoint):
            raise
        try:
            return torchvision_checkpoint(checkpoint)
        except CheckpointError as unknown:
            raise CheckpointError(f"{error}, and {unknown}") from error


def print_assumptions(network: nn.Module, settings: Settings | None, checkpoint: str, function: str | None) -> None:
    """Print what was assumed of a network that was built from the keys of its checkpoint file alone."""
    from bn_insert import vgg_assumptions  # noqa: PLC0415

    if function is None and not is_torchvision_name(checkpoint) and (assumed := vgg_assumptions(network, settings)):
        print_note(assumed)


def is_torchvision_name(checkpoint: str) -> bool:
    """Return whether an argument is the name of a network with weights in torchvision, and not a file."""
    return checkpoint in TORCHVISION_NAMES and not Path(checkpoint).exists()


def _is_name(checkpoint: str) -> bool:
    """Return whether an argument looks like the name of a network, and is not a file."""
    path = Path(checkpoint)
    return not path.suffix and len(path.parts) == 1 and not path.exists()


def print_preprocessing(transform: Transform, origin: str, images: Path) -> None:
    """Print the preprocessing and its origin; warn about an implausible mean or crop."""
    from bn_insert.report import preprocessing_text  # noqa: PLC0415

    if is_tensor_file(images):
        print_note("Preprocessing: none (the values of a tensor file are used unchanged).")
        return
    print_note(f"Preprocessing: {preprocessing_text(transform.to_dict())} ({origin}).")
    if transform.resize and transform.crop and transform.crop > transform.resize:
        print_warning(
            f"the crop of {transform.crop} is larger than images resized to {transform.resize}, which are padded with "
            f"black. To avoid this, use --crop {transform.resize}."
        )
    elif transform.crop and not transform.resize:
        _warn_of_smaller_images(images, transform.crop)
    if origin == IMAGENET_DEFAULT or origin.endswith(_REST_BY_DEFAULT):
        print_note(
            "If the network was trained with other preprocessing, pass --resize, --crop, --mean and --std: bn-insert "
            "cannot detect a mismatch."
        )
    if max(*transform.mean, *transform.std) > 1:
        mean = [value / 255 for value in transform.mean] if max(transform.mean) > 1 else transform.mean
        std = [value / 255 for value in transform.std] if max(transform.std) > 1 else (1 / 255,)
        options = [figures(values).replace(" ", "") for values in (mean, std)]
        print_warning(
            f"mean {figures(transform.mean)} and std {figures(transform.std)} are applied to pixels in 0..1. For a "
            f"network trained on pixels in 0..255, use --mean {options[0]} --std {options[1]}."
        )


def _warn_of_smaller_images(images: Path, crop: int) -> None:
    """Warn if the crop is larger than the first image that can be read, where images keep their size."""
    from bn_insert import ImageError  # noqa: PLC0415
    from bn_insert.images import Transform, open_batches  # noqa: PLC0415

    unchanged = Transform(resize=None, crop=None)
    with suppress(ImageError):  # if none can be read, the command itself says so
        (batch,) = open_batches(images, unchanged, images=1, shuffle=False)
        height, width = batch.images.shape[2:]
        if min(width, height) < crop:
            print_warning(
                f"the crop of {crop} is larger than images such as {batch.paths[0]} ({width} x {height}), which are "
                f"padded with black. Unless the network was trained on such images, use --resize {crop}, or --crop "
                f"{min(width, height)}."
            )


def transform_to_store(transform: Transform, origin: str, images: Path | None) -> dict[str, Any] | None:
    """Return the preprocessing for a new checkpoint; None if it is a default that no images were read with."""
    unused = images is None or is_tensor_file(images)
    return None if unused and origin == IMAGENET_DEFAULT else transform.to_dict()


def is_tensor_file(images: Path) -> bool:
    """Return whether images come from a tensor file, whose values are used unchanged."""
    from bn_insert.images import TENSOR_SUFFIXES  # noqa: PLC0415

    return images.suffix.lower() in TENSOR_SUFFIXES and images.is_file()


def preprocessing(checkpoint: Checkpoint, options: ImageOptions) -> tuple[Transform, str]:
    """Return the preprocessing, and where it comes from."""
    from bn_insert.images import Transform  # noqa: PLC0415

    settings = checkpoint.settings
    in_file = settings is not None and bool(settings.transform)
    stored = _stored_transform(checkpoint, options)
    given = [name for name in ("resize", "crop", "mean", "std") if getattr(options, name) is not None]
    origin = "from the checkpoint" if in_file else IMAGENET_DEFAULT
    if is_torchvision_name(str(checkpoint.path)):
        origin = "torchvision's for these weights"
    if len(given) == 4:
        origin = "from the options"
    elif given:
        options_named = ", ".join(f"--{name}" for name in given)
        origin = f"{options_named} from the options, {'the rest from the checkpoint' if in_file else _REST_BY_DEFAULT}"
    transform = Transform(
        resize=stored.resize if options.resize is None else options.resize or None,
        crop=stored.crop if options.crop is None else options.crop or None,
        mean=stored.mean if options.mean is None else numbers(options.mean, "--mean"),
        std=stored.std if options.std is None else numbers(options.std, "--std"),
    )
    return transform, origin + _replaced_text(checkpoint, transform)


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"  # torchrun's, before there is a process group


def _replaced_text(checkpoint: Checkpoint, transform: Transform) -> str:
    """Return what a checkpoint stores of a preprocessing that options changed, as a clause; empty if they did not."""
    from bn_insert.report import preprocessing_text  # noqa: PLC0415

    stored = _usable_transform(checkpoint.settings)
    if stored is None or stored == transform:
        return ""
    return f"; the checkpoint stores {preprocessing_text(stored.to_dict())}"


def _usable_transform(settings: Settings | None) -> Transform | None:
    """Return the preprocessing that a checkpoint stores; None if it stores none, or one that cannot be used."""
    from bn_insert import ImageError  # noqa: PLC0415
    from bn_insert.images import Transform  # noqa: PLC0415

    if settings is None:
        return None
    try:
        return Transform.from_dict(settings.transform)
    except ImageError:
        return None


def warn_of_other_normalization(opened: Opened, checkpoint: str) -> None:
    """Warn if the BatchNorm of a checkpoint belongs to images with another mean and std than those of the options."""
    from torch.nn.modules.batchnorm import _BatchNorm  # noqa: PLC0415

    from bn_insert.report import preprocessing_text  # noqa: PLC0415

    stored, now = _usable_transform(opened.settings), opened.transform
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


def _stored_transform(checkpoint: Checkpoint, options: ImageOptions) -> Transform:
    """Return the preprocessing that a checkpoint stores, or ImageNet's; what an option replaces need not be usable."""
    from bn_insert import ImageError  # noqa: PLC0415
    from bn_insert.images import Transform  # noqa: PLC0415

    values = checkpoint.settings.transform if checkpoint.settings else None
    if not values:
        return Transform()
    defaults = Transform().to_dict()
    replaced = {name: value for name, value in defaults.items() if getattr(options, name) is not None}
    if replaced == defaults:  # nothing of what is stored is used, so it may be of any kind
        return Transform()
    try:
        return Transform.from_dict({**values, **{name: value for name, value in replaced.items() if name in values}})
    except ImageError as error:
        raise ImageError(
            f"{checkpoint.path}: the preprocessing in {checkpoint.settings_place}: {error}; to use another, pass all "
            "of --resize, --crop, --mean and --std"
        ) from error


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

    inputs = several_inputs(model)
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


def side_of(transform: Transform) -> int | None:
    """Return the side of images after a preprocessing; None if they keep their own."""
    return transform.crop or transform.resize


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


def several_inputs(model: nn.Module) -> tuple[str, ...] | Literal["all"]:
    """Return the names of the inputs that a network's forward takes if there are several; "all" if it takes a dict."""
    from bn_insert import forward_inputs  # noqa: PLC0415

    inputs = forward_inputs(model)
    if inputs.takes_dict:
        return "all"
    return inputs.names if inputs.several else ()


def check_one_input(model: nn.Module, way_out: str) -> None:
    """Raise GraphError for a network with several inputs, where only one can be provided.

    Args:
        model: The network.
        way_out: What to do instead.
    """
    from bn_insert import GraphError  # noqa: PLC0415

    if names := several_inputs(model):
        taken = "a dict of inputs" if names == "all" else f"several inputs ({', '.join(names)})"
        raise GraphError(f"{type(model).__name__} takes {taken}: {way_out}")


def open_device(name: str | None) -> torch.device:
    """Return a device by name; by default cuda if available, else cpu."""
    import torch  # noqa: PLC0415

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:  # its message lists all kinds of devices that PyTorch was ever built for
        raise typer.BadParameter(f"{name!r} is not a device; use {usable_devices()}", param_hint="--device") from None
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        # Of a kind that is not part of this build of PyTorch, the message names an operator.
        said = "" if isinstance(error, NotImplementedError) else f" ({first_line(error).split('. ')[0]})"
        raise typer.BadParameter(
            f"the device {name!r} cannot be used on this machine{said}; use {usable_devices()}", param_hint="--device"
        ) from None
    return device


def layer_kinds(text: str) -> tuple[LayerKind, ...]:
    """Parse kinds of layers, such as "conv,dense"."""
    kinds = tuple(kind.strip() for kind in text.split(","))
    if not set(kinds) <= {"conv", "dense"}:
        raise typer.BadParameter(f"{text!r} is not one of: conv, dense, or conv,dense", param_hint="--layers")
    return cast("tuple[LayerKind, ...]", kinds)


def batch_sizes(text: str) -> tuple[int, ...]:
    """Parse batch sizes, such as "4,8"."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not an integer or several separated by commas", param_hint="--batch-sizes"
        ) from None


def numbers(text: str, option: str) -> tuple[float, ...]:
    """Parse numbers, such as "0.5" or "0.5,0.4,0.3"."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a number or several separated by commas", param_hint=option
        ) from None
