"""A folder of images, or a tensor file, as batches for calibration and comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import ImageError
from ..support.near_names import did_you_mean
from .batches import Batch, Batches, Unreadable, check_at_least, dealt, pinned, sample
from .files import IMAGE_SUFFIXES, check_has_images, find_images
from .reader import ImageReader
from .tensor_batches import TENSOR_SUFFIXES, tensor_batches
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
        strict: Raise an error for the first unreadable image file instead of skipping it.
        pin_memory: Put batches into page-locked memory where there is a GPU.
        shuffle: Random order; otherwise files are sorted, and the rows of a tensor file stay in their order.

    Raises:
        ImageError: For a source of any other kind, and for the reasons of `find_images`, `image_batches` and
            `tensor_batches`.
    """
    source = Path(source)
    check_at_least(1, images=images)
    _check_kind(source)
    if source.is_file() and source.suffix.lower() in TENSOR_SUFFIXES:
        tensors = tensor_batches(source, batch_size=batch_size, channels=channels, dims=dims, pin_memory=pin_memory)
        return tensors.sample(images, seed) if shuffle else tensors.head(images or tensors.images)
    if dims != 2:
        raise ImageError(
            f"{source} is no tensor file, and the network takes inputs with {dims} dimensions behind the channels, not "
            f"images; save them as one tensor ({', '.join(TENSOR_SUFFIXES)})"
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


def image_batches(
    source: str | Path | Sequence[Path],
    transform: Transform,
    *,
    batch_size: int = 32,
    workers: int = 0,
    channels: int = 3,
    strict: bool = False,
    pin_memory: bool = False,
) -> ImageBatches:
    """Return the images of a folder (sorted), or the given files (in that order), as batches.

    Args:
        source: A folder that is searched recursively, or image files.
        transform: Preprocessing of each picture.
        batch_size: Images per batch.
        workers: Processes that decode; 0 decodes in this process.
        channels: Channels that the network takes: 3 converts every picture to RGB, 1 to grey; see `files.read_image`.
        strict: Raise an error for the first unreadable file; otherwise such files are skipped and listed in
            `unreadable`.
        pin_memory: Put batches into page-locked memory where there is a GPU.

    Raises:
        ImageError: For a folder without images, a transform that does not fit the channels, and options out of range.
    """
    check_at_least(1, batch_size=batch_size)
    reader = ImageReader(transform, channels, workers, strict)
    paths = find_images(source) if isinstance(source, str | Path) else source
    if not paths:
        raise ImageError("the list of image files is empty; pass at least one")
    return ImageBatches(tuple(paths), reader, batch_size, pin_memory)


@dataclass(frozen=True, eq=False)
class ImageBatches(Batches):
    """Image files as batches; created by `image_batches`.

    Args:
        paths: The files, in the order of the batches.
        reader: How they are decoded.
        batch_size: Files per batch.
        pin_memory: Put batches into page-locked memory where there is a GPU.
        limit: Number of readable images after which a pass ends; None is no limit.
    """

    paths: tuple[Path, ...] = field(repr=False)
    reader: ImageReader
    batch_size: int
    pin_memory: bool
    limit: int | None = None
    _skipped: dict[Path, str] = field(default_factory=dict, init=False, repr=False)

    @property
    def images(self) -> int:
        """Number of images, including those that turn out to be unreadable."""
        return len(self.paths) if self.limit is None else min(len(self.paths), self.limit)

    @property
    def unreadable(self) -> list[Unreadable]:
        """Files that were skipped in the passes so far, each listed once."""
        return [Unreadable(path, reason) for path, reason in self._skipped.items()]

    def head(self, count: int) -> ImageBatches:
        """Return the first `count` readable images (all of them if there are fewer) as a new set."""
        check_at_least(1, images=count)
        return replace(self, limit=min(count, self.images))

    def part(self, rank: int, ranks: int) -> ImageBatches:
        """Return the share of one of several processes, every ranks-th whole batch, as a new set."""
        share = dealt(self.paths[: self.images], self.batch_size, rank, ranks)
        return replace(self, paths=tuple(share), limit=None)

    def with_pinned_memory(self) -> ImageBatches:
        """Return the same images in page-locked memory, which a GPU can copy from while it computes."""
        return replace(self, pin_memory=True)

    def sample(self, count: int | None, seed: int) -> ImageBatches:
        """Return `count` images (None: all) drawn as by the function `sample`, as a new set."""
        return replace(self, paths=tuple(sample(self.paths[: self.images], count, seed)), limit=None)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches.

        Raises:
            ImageError: When pictures in one batch differ in size, when no file can be read, when a worker process is
                killed, and with `strict` for the first unreadable file.
        """
        missing = self.images
        if missing == 0:  # the share of a process may be empty
            return
        decoded = self.reader.read(self.paths, min(self.batch_size, missing), self._skipped, wanted=missing)
        with closing(decoded):
            for images, paths, _ in decoded:
                if images is not None:
                    wanted = images[:missing]
                    yield Batch(pinned(wanted) if self.pin_memory else wanted, paths[:missing])
                    missing -= len(wanted)
                if missing == 0:
                    return
        if missing == self.images:
            path, reason = self.unreadable[0]
            if len(self.paths) == 1:
                raise ImageError(f"the only image file cannot be read: {path}: {reason}")
            raise ImageError(f"none of the {len(self.paths)} image files can be read; the first is {path}: {reason}")
