"""Where images come from: a folder of images, a tensor file or an image file, opened as batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from ..errors import ImageError
from ..support.arguments import check_flags
from ..support.near_names import did_you_mean
from .batch_interface import Batches, check_at_least
from .image_batches import image_batches
from .image_files import IMAGE_SUFFIXES, check_has_images
from .named_inputs import NamedInputBatches, named_input_batches
from .tensor_batches import TENSOR_SUFFIXES, TensorBatches, tensor_batches
from .transform import Transform


def open_batches(
    source: str | Path,
    transform: Transform,
    *,
    images: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
    workers: int = 0,
    channels: int = 3,
    dims: int = 2,
    inputs: Sequence[str] | Literal["all"] = (),
    takes: Callable[[tuple[int, ...]], bool] | None = None,
    strict: bool = False,
    pin_memory: bool = False,
    shuffle: bool = True,
) -> Batches:
    """Return the images of a folder, of a tensor file, or of one image file, as batches, by default in random order.

    Args:
        source: A folder that is searched recursively, a tensor file, or an image file.
        transform: Preprocessing of image files; the values of a tensor file are used unchanged.
        images: Maximum number of images, sampled at random, or without `shuffle` the first ones; None uses all of them.
        seed: Seed for the sample and for the order.
        batch_size: Images per batch.
        workers: Processes that decode image files; 0 decodes in this process.
        channels: Channels that the network takes.
        dims: Dimensions of an image; other than 2, the source must be a tensor file, as for `tensor_batches`.
        inputs: Names of the inputs that the network's forward takes, if it takes several: the source must be a tensor
            file with a dict of tensors of these names, and each batch has such a dict in place of images. "all" takes
            all tensors of the dict.
        takes: For tensor files, as for `tensor_batches`.
        strict: Raise an error for the first unreadable image file instead of skipping it.
        pin_memory: Put batches into page-locked memory where there is a GPU.
        shuffle: Random order; otherwise files are sorted, and the rows of a tensor file stay in their order.

    Raises:
        ImageError: For a source of any other kind, and for the reasons of `find_images`, `image_batches` and
            `tensor_batches`.
    """
    source = Path(source)
    check_at_least(1, images=images)
    check_flags(ImageError, strict=strict, shuffle=shuffle)
    _check_kind(source)
    if source.is_file() and source.suffix.lower() in TENSOR_SUFFIXES:
        tensors: TensorBatches | NamedInputBatches
        if inputs:
            tensors = named_input_batches(source, inputs, batch_size=batch_size, pin_memory=pin_memory)
        else:
            tensors = tensor_batches(
                source, batch_size=batch_size, channels=channels, dims=dims, takes=takes, pin_memory=pin_memory
            )
        return tensors.sample(images, seed) if shuffle else tensors.head(images or tensors.images)
    if inputs:
        taken = "a dict of inputs" if inputs == "all" else f"several inputs ({', '.join(inputs)})"
        raise ImageError(
            f"{source} is not a tensor file, but the network takes {taken}; save a dict of tensors with their names "
            "(.pt, .safetensors)"
        )
    if dims != 2:
        raise ImageError(
            f"{source} is not a tensor file, but the network takes inputs with {dims} dimensions after the channels, "
            f"not images; save them as one tensor ({', '.join(TENSOR_SUFFIXES)})"
        )
    files = image_batches(
        source if source.is_dir() else [source],
        transform,
        batch_size=batch_size,
        workers=workers,
        channels=channels,
        strict=strict,
        pin_memory=pin_memory,
    )
    return files.sample(images, seed) if shuffle else files.head(images or files.images)


def check_source(source: str | Path) -> None:
    """Check before other work that images can be read from a path, as far as names tell.

    Raises:
        ImageError: `open_batches` could not open it: it does not exist, is of another kind, or contains no image.
    """
    source = Path(source)
    _check_kind(source)
    if source.is_dir():
        check_has_images(source)


def _check_kind(source: Path) -> None:
    known = f"tensor files ({', '.join(TENSOR_SUFFIXES)}) and images ({', '.join(IMAGE_SUFFIXES)})"
    try:
        missing = not source.exists()
    except OSError as error:
        raise ImageError(
            f"cannot read {source}: {error.strerror}; pass a folder of images, or a file: {known}"
        ) from error
    if missing:
        raise ImageError(f"{source} does not exist{did_you_mean(source)}; pass a folder of images, or a file: {known}")
    if not source.is_dir() and not (source.is_file() and source.suffix.lower() in (*TENSOR_SUFFIXES, *IMAGE_SUFFIXES)):
        raise ImageError(f"{source} is neither a folder of images nor a file of a supported kind: {known}")
