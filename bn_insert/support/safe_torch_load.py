"""Read files written by torch.save from untrusted sources, without running code and in bounded time and memory.

`torch.load(weights_only=True)` calls only the functions that rebuild tensors and containers. But a few bytes of pickle
can still request any amount of memory or time. So the opcodes of the pickle are checked before they are executed
(`pickle_check.py`), and the claims of the archive before it is unpacked. The checks must see the same bytes that torch
reads: `zip_layout.py` refuses archives in which they might not.

Errors raised here, and by torch.load, say only what is wrong. `checkpoints/damaged_files.py` turns them into messages
that name the file and say what to do.

Alternatives were considered. fickling decides whether a pickle would run code, not what it would allocate, and does not
read the archive as torch does. A reader of tensors without torch.load would have to follow every format that torch.save
has had. A process with limits on memory and time would need a second of imports for each file, and would copy each
tensor.
"""

from __future__ import annotations

import os
import zipfile
from io import BufferedReader
from pathlib import Path

import torch

from .file_limits import RefusedError, check_expansion, size_of
from .pickle_check import check_pickle
from .zip_layout import check_end, check_members

_ARCHIVE = b"PK\x03\x04"
# What torch.jit.save writes in addition; torch.load refuses such an archive with a message that says what to do.
_PROGRAM = "constants.pkl"


class Ignored:
    """Takes the place of an object that is not needed, whatever it is made from and whatever it would contain."""

    def __init__(self, *_: object) -> None:
        """Keep nothing."""

    def __setstate__(self, _: object) -> None:
        """Keep nothing."""


class IgnoredArray(Ignored):
    """Takes the place of an array of NumPy."""


def load_torch_file(file: BufferedReader, *, mapped: bool = False) -> object:
    """Return the content of a file that torch.save wrote, on the CPU.

    The file is checked and read through the same handle, so the file that was checked is the one that is read.

    Args:
        file: The open file; its position does not matter.
        mapped: Map the file into memory instead of reading it, if its format allows. PyTorch maps by path, so the file
            at the path of `file` is then required to be the open one.

    Raises:
        RefusedError: The file requests more memory or time than its size can justify.
        Exception: Whatever the parsers raise for a damaged file.
    """
    file.seek(0)
    # As torch.load decides: another file may have an archive at its end.
    archived = file.read(len(_ARCHIVE)) == _ARCHIVE
    file.seek(0)
    harmless, can_be_mapped = _check_archive(file) if archived else (_check_pickles(file), False)
    with torch.serialization.safe_globals([(_stand_in(name), _python3_name(name)) for name in sorted(harmless)]):
        if mapped and can_be_mapped:
            content: object = torch.load(file.name, map_location="cpu", weights_only=True, mmap=True)
            check_same_file(file)
            return content
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=False)


def _stand_in(name: str) -> type[Ignored]:
    """Return the class of what takes the place of objects of a type, named as messages call such an object."""
    if name.endswith("multiarray._reconstruct"):
        return type("NumPy array", (IgnoredArray,), {})
    return type("NumPy scalar" if name.endswith("multiarray.scalar") else name.rpartition(".")[2], (Ignored,), {})


def _python3_name(name: str) -> str:
    """Return the name by which torch.load looks up a type: pickle protocol 2 stores that of Python 2."""
    return name.replace("__builtin__.xrange", "builtins.range").replace("__builtin__.", "builtins.")


def check_same_file(file: BufferedReader) -> None:
    """Raise RefusedError unless the path of an open file still leads to that file."""
    if not os.path.samestat(os.fstat(file.fileno()), Path(file.name).stat()):
        raise RefusedError("it was replaced while it was being read")


def _check_archive(file: BufferedReader) -> tuple[set[str], bool]:
    """Check the layout, claims and pickle of an archive.

    Returns:
        The names of the types in it whose objects are to be ignored, and whether it can be mapped: nothing in it is
        compressed.
    """
    check_end(file)
    harmless: set[str] = set()
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        folder = records[0].filename.partition("/")[0] if records else ""
        check_expansion(file, sum(record.file_size for record in records))
        if any(record.filename == f"{folder}/{_PROGRAM}" for record in records):
            return harmless, False
        check_members(folder, [record.filename for record in records])
        for record in records:
            if record.filename == f"{folder}/data.pkl":
                with archive.open(record) as pickled:
                    harmless = check_pickle(pickled, record.file_size, size_of(file))
    return harmless, all(record.compress_type == zipfile.ZIP_STORED for record in records)


def _check_pickles(file: BufferedReader) -> set[str]:
    """Check the five pickles that torch.save wrote before PyTorch 1.6; the values of the tensors follow them.

    Returns:
        The names of the types in them whose objects are to be ignored.
    """
    size, harmless = size_of(file), set[str]()
    for _ in range(5):
        if not file.peek(1):  # torch.load reports what is missing
            break
        harmless |= check_pickle(file, size, size)
    return harmless
