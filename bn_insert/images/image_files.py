"""Image files: find those in a folder, and read the pixels of one, or say why it cannot be read."""

from __future__ import annotations

import ctypes
import io
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError, _imaging

from ..errors import ImageError
from ..support.near_names import missing_folder
from .batch_interface import Unreadable
from .transform import Transform

# The formats that Pillow may recognize. It looks at the content of a file, not at its suffix, and without this list
# would pass PostScript in a file named .jpg to Ghostscript.
_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k"),
    "AVIF": (".avif",),
}
IMAGE_SUFFIXES = tuple(sorted(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes))

# The largest picture of 8 bits per channel that Pillow's limit against decompression bombs admits, not compressed.
_MAX_BYTES = 3 * (1024**3 // 4 // 3) + (1 << 16)

# Pillow's name for the mode that a picture is converted to, by the number of channels that the network takes.
MODES = {1: "L", 3: "RGB"}

# libtiff has one error handler in a process: threads decode TIFFs one after another.
_LIBTIFF = threading.Lock()

# Without a handler Python prints what Pillow logs about damaged files; a program's own handlers still receive it.
logging.getLogger("PIL").addHandler(logging.NullHandler())


def find_images(folder: str | Path) -> list[Path]:
    """Return the image files in a folder and its subfolders, sorted; subfolders may be classes or anything else.

    Files are recognized by their suffix, in upper or lower case; hidden files and folders are ignored. Links are
    followed, and a folder that can be reached in several ways is searched once.

    Raises:
        ImageError: When there is no such folder, when it or a subfolder cannot be read, and when it contains no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ImageError(f"{missing_folder(folder)}; pass a folder of images ({', '.join(IMAGE_SUFFIXES)})")
    files = list(_visible_files(folder))
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        found = "no file in it ends"
        if files:
            none = "the only file" if len(files) == 1 else f"none of the {len(files)} files"
            found = f"{none} in it, subfolders included, {'does not end' if len(files) == 1 else 'ends'}"
        raise ImageError(f"{folder} contains no image: {found} in {', '.join(IMAGE_SUFFIXES)}")
    return sorted(images, key=lambda path: path.parts)


def check_has_images(folder: str | Path) -> None:
    """Raise ImageError as `find_images` does, without listing the folder beyond its first image."""
    folder = Path(folder)
    if not folder.is_dir() or all(path.suffix.lower() not in IMAGE_SUFFIXES for path in _visible_files(folder)):
        find_images(folder)


def _visible_files(folder: Path) -> Iterator[Path]:
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        try:
            status = current.stat()
            with os.scandir(current) as listing:
                entries = sorted((entry for entry in listing if entry.name[0] != "."), key=lambda entry: entry.name)
        except OSError as error:
            raise ImageError(
                f"cannot read the folder {current}: {error.strerror}; fix its permissions or remove it"
            ) from error
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in reversed(entries):
            path = Path(entry.path)
            if _is_folder(entry):
                waiting.append(path)
            # A dangling link is listed, so that it is reported; a pipe is not, because reading it would block.
            elif path.is_file() or not path.exists():
                yield path


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def read_pixels(
    path: Path, transform: Transform, channels: int
) -> UInt8[np.ndarray, "channels height width"] | Unreadable:
    """Return the pixels of an image file, resized and cropped; if that fails in any way, the reason.

    Nothing is printed and no warning is emitted; a warning of a decompression bomb makes the file unreadable.

    Raises:
        MemoryError: When there is less memory than the largest picture needs; no picture is left out for that.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return transform.pixels(read_image(path, channels))
    except MemoryError:
        _check_memory()
        return Unreadable(path, "decoding it takes more memory than any picture within the limits")
    except Exception as error:  # noqa: BLE001 - on a damaged file the codecs may raise anything
        return Unreadable(path, _reason(error))


def _check_memory() -> None:
    """Raise MemoryError unless the largest picture could be read, decoded and converted."""
    try:
        np.empty(3 * _MAX_BYTES, np.uint8)
    except MemoryError:  # NumPy's own error cannot be sent to another process
        raise MemoryError("a picture cannot be decoded") from None


def read_image(path: Path, channels: int) -> Image.Image:
    """Return the first frame of an image file as RGB (3 channels) or gray (1 channel), rotated as its EXIF data says.

    Modes are converted as by Pillow's `convert`: palettes are looked up, CMYK is converted without its color profile,
    and transparency is dropped, which reveals the color under it. Of 16-bit values the high byte is used, as Pillow
    itself does for 16-bit color.

    Raises:
        ImageError: For an empty file, and for values whose range is not known.
        Exception: Whatever Pillow raises.
    """
    # Read at once: Pillow then decodes a JPEG of 80 kB in 0.8 of the time, and no file stays open.
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > _MAX_BYTES:
            raise ImageError(f"the file has more than {_MAX_BYTES:,} bytes")
        content = file.read(size)  # Python takes memory for as much as it may read
    if not content:
        raise ImageError("the file is empty")
    Image.init()
    with Image.open(io.BytesIO(content), formats=[name for name in _SUFFIXES if name in Image.OPEN]) as image:
        if image.format == "TIFF":
            with _silent_libtiff():
                image.load()
        ImageOps.exif_transpose(image, in_place=True)
        eight_bit = _eight_bit(image) if image.mode[0] in "IF" else image
        return eight_bit if eight_bit.mode == MODES[channels] else eight_bit.convert(MODES[channels])


@contextmanager
def _silent_libtiff() -> Iterator[None]:
    """Switch off libtiff's error handler, which prints what is wrong with a file; Pillow raises an error anyway."""
    set_handler = _libtiff_error_handler()
    if set_handler is None:
        yield
        return
    with _LIBTIFF:
        handler = set_handler(None)
        try:
            yield
        finally:
            set_handler(handler)


@cache
def _libtiff_error_handler() -> Any:
    """Return TIFFSetErrorHandler of the libtiff that Pillow uses; None where it is linked statically or left out."""
    try:
        set_handler = ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler
    except (AttributeError, OSError):
        return None
    set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
    return set_handler


def _eight_bit(image: Image.Image) -> Image.Image:
    """Return a picture of mode I;16, I or F as gray; `convert` would turn everything above 255 white."""
    if image.mode == "F":
        raise ImageError("its pixels are floating-point numbers, whose range is not known")
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ImageError("its pixels are 32-bit numbers, whose range is not known")
    return Image.fromarray((values >> 8).astype(np.uint8))


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a supported format"  # Pillow's text has the address of the buffer
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
