"""Labels of images from the class folders that they are in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from ..errors import ImageError
from .batches import Batch
from .class_folders import class_names


def folder_classes(source: Path) -> list[str]:
    """Return the names of the class folders of a folder, sorted; an empty list if there are fewer than two.

    Args:
        source: What the images come from; a file has no class folders.
    """
    if not source.is_dir():
        return []
    try:
        names = class_names(source)
    except ImageError:  # names that could not be printed: images need no labels
        return []
    return names if len(names) > 1 else []


def with_labels(
    batches: Iterable[Batch], source: Path, classes: Sequence[str]
) -> Iterator[tuple[Float32[Tensor, "images channels height width"], Int64[Tensor, " images"]]]:
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
            yield batch.images[labels >= 0], labels[labels >= 0]
