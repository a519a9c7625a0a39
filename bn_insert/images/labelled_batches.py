"""Images with the labels of the class folders that they are in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import ImageError
from ..support.near_names import missing_folder
from ..support.text import listed
from .batch_interface import Batch, Unreadable
from .class_folders import NAMES_SHOWN, LabelledBatch, class_names
from .image_batches import ImageBatches, image_batches
from .image_files import find_images
from .transform import Transform

_LAYOUT = "the layout is CLASS/IMAGE, or val/CLASS/IMAGE"


@dataclass(frozen=True, eq=False)
class LabelledBatches:
    """The images of class folders in batches; created by `open_labelled_batches`.

    Args:
        folder: The folder that contains the class folders.
        classes: Names of all classes; the position of a name is the label of its images.
        files: The image files.
    """

    folder: Path
    classes: tuple[str, ...]
    files: ImageBatches

    @property
    def images(self) -> int:
        """Number of images, including those that turn out to be unreadable."""
        return self.files.images

    @property
    def unreadable(self) -> list[Unreadable]:
        """Files that were skipped in the passes so far, each listed once."""
        return self.files.unreadable

    def __iter__(self) -> Iterator[LabelledBatch]:
        """Return an iterator over the batches; it raises ImageError as `ImageBatches` does."""
        return with_labels(self.files, self.folder, self.classes)


def open_labelled_batches(
    folder: str | Path,
    transform: Transform,
    *,
    classes: Sequence[str] = (),
    images: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
    channels: int = 3,
    workers: int = 0,
    strict: bool = False,
) -> LabelledBatches:
    """Return the labeled images of a folder with one folder per class, or of `val/` in it, as batches.

    `val/` is used if it is a folder and not the name of a class. Hidden folders are ignored.

    Args:
        folder: The folder that contains the class folders, or contains `val/`, which contains them.
        transform: Preprocessing of each image.
        classes: Names of the classes of a network, in the order of its outputs: folders are matched by name, and some
            classes may have none. By default, the names of the folders, sorted.
        images: Maximum number of images, sampled at random; None uses all of them.
        seed: Seed for the sample.
        batch_size: Images per batch.
        channels: Channels that the network takes, 1 or 3.
        workers: Processes that decode; 0 decodes in this process.
        strict: Raise an error for the first unreadable file instead of skipping it.

    Raises:
        ImageError: When there is no such folder, when there are no class folders, when one of them is not in `classes`,
            when a class folder contains no image, and for options out of range.
    """
    folder, folders = _class_folders(Path(folder), classes)
    if unknown := [name for name in folders if classes and name not in classes]:
        raise ImageError(
            f"{folder} has folders that are not classes of the network: {listed(unknown, NAMES_SHOWN)}; its classes "
            f"are {listed(classes, NAMES_SHOWN)}: rename the folders, or remove those of other classes"
        )
    paths = [path for name in folders for path in find_images(folder / name)]
    files = image_batches(paths, transform, batch_size=batch_size, workers=workers, channels=channels, strict=strict)
    return LabelledBatches(folder, tuple(classes or folders), files if images is None else files.sample(images, seed))


def check_labelled_folder(folder: str | Path) -> None:
    """Check before other work that a folder has class folders, or `val/` with class folders.

    Raises:
        ImageError: When there is no such folder, and when there are no class folders.
    """
    _class_folders(Path(folder), ())


def _class_folders(folder: Path, classes: Sequence[str]) -> tuple[Path, list[str]]:
    """Return the folder that contains the class folders, and their names."""
    if not folder.is_dir():
        raise ImageError(f"{missing_folder(folder)}; {_LAYOUT}")
    if "val" not in classes and (folder / "val").is_dir():
        folder /= "val"
    folders = class_names(folder)
    if not folders:
        raise ImageError(f"{folder} has no class folders; {_LAYOUT}")
    return folder, folders


def folder_classes(source: str | Path) -> list[str]:
    """Return the names of the class folders of a folder, sorted; an empty list if there are fewer than two.

    Args:
        source: What the images come from; a file has no class folders.
    """
    source = Path(source)
    if not source.is_dir():
        return []
    try:
        names = class_names(source)
    except ImageError:  # names that could not be printed: images need no labels
        return []
    return names if len(names) > 1 else []


def with_labels(batches: Iterable[Batch], source: Path, classes: Sequence[str]) -> Iterator[LabelledBatch]:
    """Yield images with the number of their class folder; images that are in none of them are left out.

    Args:
        batches: Of images in `source`.
        source: The folder.
        classes: The names of its class folders, in the order of their numbers.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    for batch in batches:
        found = [numbers.get(path.relative_to(source).parts[0], -1) for path in batch.paths]
        labels = torch.tensor(found)
        if (labels >= 0).any():
            yield LabelledBatch(batch.images[labels >= 0], labels[labels >= 0])
