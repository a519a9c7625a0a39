"""Check that a zip archive is laid out as torch.save lays it out, so that all readers find the same bytes in it.

In an ambiguous archive, Python's zipfile and torch's miniz may read different parts: miniz ignores case when it looks
up a member by name, takes the position of the directory from the record at the end where zipfile takes what lies before
that record, and so on. These checks do not imitate miniz: they refuse ambiguous archives. In an archive by torch.save
each of these holds: the record of the directory is the very end of the file, the directory and its record are adjacent,
all members are in one folder, their names are those that torch.save uses, and no name occurs twice. The two then
necessarily find the same bytes.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from io import BufferedReader

from .file_limits import MAX_TENSORS, RefusedError, size_of

_END, _END64, _LOCATOR64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_END_SIZE, _END64_SIZE, _LOCATOR64_SIZE = 22, 56, 20
_MEMBER = re.compile(
    r"data\.pkl|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id|data/[0-9]+"
)
_OTHER_MEMBERS = 16
_ALL = 0xFFFFFFFF


def check_end(file: BufferedReader) -> None:
    """Raise RefusedError unless an archive ends with its directory and one record of it, with nothing in between."""
    size = size_of(file)
    tail_size = min(size, _END_SIZE + _LOCATOR64_SIZE + _END64_SIZE)
    file.seek(size - tail_size)
    tail = file.read(tail_size)
    file.seek(0)
    end = tail[-_END_SIZE:]
    if len(end) < _END_SIZE or not end.startswith(_END) or end[-2:] != b"\0\0":
        if tail.rfind(_END) < 0:
            return  # cut off: zipfile reports it
        raise RefusedError("its zip archive does not end where the file ends")
    disk, start_disk, here, entries, length, offset = struct.unpack("<4xHHHHII2x", end)
    directory_end = size - _END_SIZE
    locator = tail[-_END_SIZE - _LOCATOR64_SIZE : -_END_SIZE]
    if locator.startswith(_LOCATOR64):
        directory_end -= _LOCATOR64_SIZE + _END64_SIZE
        record = tail[: -_END_SIZE - _LOCATOR64_SIZE]
        if len(record) < _END64_SIZE or not record.startswith(_END64):
            raise RefusedError("its zip archive has a damaged directory")
        place = struct.unpack("<4xIQI", locator)
        size64, disk64, start64, here64, entries64, length64, offset64 = struct.unpack("<4xQ4xIIQQQQ", record)
        short = (here, 0xFFFF, here64), (entries, 0xFFFF, entries64), (length, _ALL, length64), (offset, _ALL, offset64)
        if (
            place != (0, directory_end, 1)
            or (size64, disk64, start64) != (_END64_SIZE - 12, 0, 0)
            or any(value not in (unknown, wide) for value, unknown, wide in short)
        ):
            raise RefusedError("its zip archive has two directories that contradict each other")
        here, entries, length, offset = here64, entries64, length64, offset64
    if (disk, start_disk) != (0, 0) or here != entries or offset + length != directory_end:
        raise RefusedError("its zip archive has a directory in a different place than its last record says")
    if entries > MAX_TENSORS + _OTHER_MEMBERS:
        raise RefusedError(f"it has {entries:,} members, more than the limit of {MAX_TENSORS:,} for tensors")


def check_members(folder: str, names: Sequence[str]) -> None:
    """Raise RefusedError for a name that torch.save does not write, or that comes twice."""
    for name in names:
        if not (name.startswith(f"{folder}/") and _MEMBER.fullmatch(name[len(folder) + 1 :])):
            raise RefusedError(f"it has a member {name[:60]!a}, which torch.save does not write")
    if len(set(names)) != len(names):
        raise RefusedError("two of its members have the same name")
