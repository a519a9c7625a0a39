"""The preprocessing of images: from the options, the checkpoint or torchvision, or else that of ImageNet."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bn_insert.support.text import figures

from .console import print_note, print_warning
from .named_checkpoints import is_torchvision_name
from .option_values import ImageOptions, numbers

if TYPE_CHECKING:
    from bn_insert import Checkpoint, Settings
    from bn_insert.images import Transform

IMAGENET_DEFAULT = "ImageNet's, the default: the checkpoint stores none"
_REST_BY_DEFAULT = "the rest by default"


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


def usable_transform(settings: Settings | None) -> Transform | None:
    """Return the preprocessing that a checkpoint stores; None if it stores none, or one that cannot be used."""
    from bn_insert import ImageError  # noqa: PLC0415
    from bn_insert.images import Transform  # noqa: PLC0415

    if settings is None:
        return None
    try:
        return Transform.from_dict(settings.transform)
    except ImageError:
        return None


def _replaced_text(checkpoint: Checkpoint, transform: Transform) -> str:
    """Return what a checkpoint stores of a preprocessing that options changed, as a clause; empty if they did not."""
    from bn_insert.report import preprocessing_text  # noqa: PLC0415

    stored = usable_transform(checkpoint.settings)
    if stored is None or stored == transform:
        return ""
    return f"; the checkpoint stores {preprocessing_text(stored.to_dict())}"


def transform_to_store(transform: Transform, origin: str, images: Path | None) -> dict[str, Any] | None:
    """Return the preprocessing for a new checkpoint; None if it is a default that no images were read with."""
    unused = images is None or is_tensor_file(images)
    return None if unused and origin == IMAGENET_DEFAULT else transform.to_dict()


def side_of(transform: Transform) -> int | None:
    """Return the side of images after a preprocessing; None if they keep their own."""
    return transform.crop or transform.resize


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


def is_tensor_file(images: Path) -> bool:
    """Return whether images come from a tensor file, whose values are used unchanged."""
    from bn_insert.images import TENSOR_SUFFIXES  # noqa: PLC0415

    return images.suffix.lower() in TENSOR_SUFFIXES and images.is_file()
