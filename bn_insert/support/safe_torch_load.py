"""Read files written by torch.save from untrusted sources, without running code and in bounded time and memory.

`torch.load(weights_only=True)` calls only the functions that rebuild tensors and containers. But a few bytes of pickle
can still request a terabyte, or build a key whose hash visits 2**200 values. So the opcodes of the pickle are checked
before they are executed, and the claims of the archive before it is unpacked.

The checks must see the same bytes that torch reads. In an ambiguous archive, Python's zipfile and torch's miniz may
read different parts: miniz ignores case when it looks up a member by name, takes the position of the directory from the
record at the end where zipfile takes what lies before that record, and so on. Instead of imitating miniz, the reader
refuses ambiguous archives. In an archive by torch.save each of these holds: the record of the directory is the very end
of the file, the directory and its record are adjacent, all members are in one folder, their names are those that
torch.save uses, and no name occurs twice. The two then necessarily find the same bytes. For the same reason only the
functions that torch.save writes for tensors and plain containers may be called, fewer than `weights_only` allows: each
of them is known to take memory in proportion to its arguments.

Errors raised here, and by torch.load, say only what is wrong. `checkpoints/damaged_files.py` turns them into messages
that name the file and say what to do.

Alternatives were considered. fickling decides whether a pickle would run code, not what it would allocate, and does not
read the archive as torch does. A reader of tensors without torch.load would have to follow every format that torch.save
has had. A process with limits on memory and time would need a second of imports for each file, and would copy each
tensor.
"""

from __future__ import annotations

import os
import pickle
import pickletools
import re
import struct
import zipfile
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import IO, Protocol, cast, runtime_checkable

import torch

# torch.save compresses nothing, so the tensors (counting shared ones twice) are about as large as their file.
MAX_EXPANSION = 10

# Each tensor takes time, however small it is; networks of a thousand layers have fewer.
MAX_TENSORS = 1 << 14

# Values fetched from the memo, each with all that it contains: allowed beyond what the size of the file allows.
_MAX_SHARED_VALUES = 1_000_000
_MAX_DEPTH = 500
# Called with a number, these allocate that much memory.
_ALLOCATING = re.compile(r"(__builtin__|builtins)\.bytearray|torch\.(\w+\.)*\w*(Tensor|Storage)")
# What torch.save writes for tensors, parameters, containers and the values of optimizers and schedulers.
_GLOBALS = re.compile(
    r"torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state|qtensor|sparse_tensor"
    r"|meta_tensor_no_storage|nested_tensor)"
    r"|torch\._tensor\._rebuild_from_type_v2|torch\.nn\.parameter\.(Parameter|Buffer)"
    r"|torch\.serialization\._get_layout"
    r"|torch\.((cuda\.)?\w*Storage|\w*Tensor|Size|device|per_\w+)"
    r"|torch\.storage\.(UntypedStorage|TypedStorage|_LoadStorage)"
    r"|torch\.(bool|u?int\d+|q?u?int\d+|q?u?int\d+x\d+|bfloat16|float\w+|complex\d+|bits\w+)"
    r"|torch\.torch_version\.TorchVersion"
    r"|collections\.(OrderedDict|Counter|defaultdict)"
    r"|(__builtin__|builtins)\.(set|complex|bytearray|dict|list|tuple|int|float|bool|str|bytes)"
    r"|_codecs\.encode"
)
# What training scripts save beside the weights: arguments, paths, dates, ranges, numbers of numpy. An object without
# content takes the place of each, so that no code of these types runs.
_HARMLESS = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|decimal\.Decimal|uuid\.UUID|fractions\.Fraction"
    r"|(__builtin__|builtins)\.(x?range|slice|frozenset|Ellipsis)"
    r"|torchvision\.transforms\.functional\.InterpolationMode"
    r"|pathlib\.(_local\.)?(Pure)?(Posix|Windows)?Path|datetime\.(datetime|date|time|timedelta|timezone)"
    r"|numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|dtype|ndarray|dtypes\.\w+|(bool|u?int|float)\w*)"
)
# Positions in the description of a storage: ("storage", class, key, device, number of elements).
_KEY, _NUMEL = 2, 4

_ARCHIVE = b"PK\x03\x04"
_END, _END64, _LOCATOR64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_END_SIZE, _END64_SIZE, _LOCATOR64_SIZE = 22, 56, 20
_MEMBER = re.compile(
    r"data\.pkl|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id|data/[0-9]+"
)
# What torch.jit.save writes in addition; torch.load refuses such an archive with a message that names the way out.
_PROGRAM = "constants.pkl"
_OTHER_MEMBERS = 16
_ALL = 0xFFFFFFFF


class Ignored:
    """Takes the place of an object that is not needed, whatever it is made from and whatever it would contain."""

    def __init__(self, *_: object) -> None:
        """Keep nothing."""

    def __setstate__(self, _: object) -> None:
        """Keep nothing."""


class IgnoredArray(Ignored):
    """Takes the place of an array of NumPy."""


class RefusedError(ValueError):
    """The file requests more memory or time than its size can justify."""


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
    harmless: set[str] = set()
    if archived:
        mapped &= _check_archive(file, harmless)
    else:
        _check_pickles(file, harmless)
    with torch.serialization.safe_globals([(_stand_in(name), _python3_name(name)) for name in sorted(harmless)]):
        if mapped and archived:
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


def check_expansion(file: BufferedReader, claimed: int) -> None:
    """Raise RefusedError if a file claims to contain far more bytes than its size."""
    size = _size(file)
    if claimed > MAX_EXPANSION * size:
        raise RefusedError(
            f"it claims to contain {claimed:,} bytes of tensors in a file of {size:,} bytes; it is damaged or made to "
            "exhaust memory"
        )


def _size(file: BufferedReader) -> int:
    return os.fstat(file.fileno()).st_size


def _check_archive(file: BufferedReader, harmless: set[str]) -> bool:
    """Check the layout, claims and pickle of an archive; return whether it can be mapped, with nothing compressed."""
    _check_end(file)
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        folder = records[0].filename.partition("/")[0] if records else ""
        check_expansion(file, sum(record.file_size for record in records))
        if any(record.filename == f"{folder}/{_PROGRAM}" for record in records):
            return False
        _check_members(folder, [record.filename for record in records])
        for record in records:
            if record.filename == f"{folder}/data.pkl":
                with archive.open(record) as pickled:
                    _check_pickle(_Bounded(pickled, record.file_size), _size(file), harmless)
    return all(record.compress_type == zipfile.ZIP_STORED for record in records)


def _check_end(file: BufferedReader) -> None:
    """Raise RefusedError unless an archive ends with its directory and one record of it, with nothing in between."""
    size = _size(file)
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


def _check_members(folder: str, names: list[str]) -> None:
    """Raise RefusedError for a name that torch.save does not write, or that comes twice."""
    for name in names:
        if not (name.startswith(f"{folder}/") and _MEMBER.fullmatch(name[len(folder) + 1 :])):
            raise RefusedError(f"it has a member {name[:60]!a}, which torch.save does not write")
    if len(set(names)) != len(names):
        raise RefusedError("two of its members have the same name")


def _check_pickles(file: BufferedReader, harmless: set[str]) -> None:
    """Check the five pickles that torch.save wrote before PyTorch 1.6; the values of the tensors follow them."""
    size = _size(file)
    for _ in range(5):
        if not file.peek(1):  # torch.load reports what is missing
            return
        _check_pickle(_Bounded(file, size), size, harmless)


def _check_pickle(file: _Bounded, size: int, harmless: set[str]) -> None:
    """Check a pickle, and add the names of the types in it that are to be ignored."""
    machine = _Machine(size)
    for opcode, argument, _ in pickletools.genops(cast(IO[bytes], file)):
        machine.step(opcode, argument)
    harmless |= machine.harmless


@runtime_checkable
class _Readable(Protocol):
    def read(self, count: int, /) -> bytes: ...

    def readline(self) -> bytes: ...


class _Bounded:
    """A file that refuses to read more than its size, for which Python would first allocate memory."""

    def __init__(self, file: _Readable, size: int) -> None:
        self._file = file
        self._size = size

    def read(self, count: int) -> bytes:
        if count > self._size:
            raise RefusedError(f"it announces {count:,} bytes and has {self._size:,}")
        return self._file.read(count)

    def readline(self) -> bytes:
        return self._file.readline()


@dataclass(eq=False)
class _Value:
    """What is known about a value on the stack.

    Attributes:
        weight: Number of values in it, counting a shared value every time.
        depth: How deeply its values are nested.
        content: The value of a whole number, text or global, the items of a tuple.
    """

    weight: int = 1
    depth: int = 0
    content: int | str | tuple[_Value, ...] | None = None

    def hold(self, values: list[_Value]) -> None:
        self.weight += sum(value.weight for value in values)
        self.depth = max([self.depth, *(value.depth + 1 for value in values)])
        if self.depth > _MAX_DEPTH:
            raise RefusedError(f"values are nested more than {_MAX_DEPTH} deep")


class _Machine:
    """Executes the opcodes of a pickle on descriptions of values instead of values."""

    def __init__(self, size: int) -> None:
        self.harmless: set[str] = set()
        self._size = size
        self._stack: list[_Value] = []
        self._below: list[list[_Value]] = []  # the stacks below each mark
        self._memo: dict[int, _Value] = {}
        self._fetched = 0
        self._storages: set[object] = set()
        self._claimed = 0

    def step(self, opcode: pickletools.OpcodeInfo, argument: object) -> None:
        name = opcode.name
        if name == "MARK":
            self._below.append(self._stack)
            self._stack = []
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if name == "MEMOIZE" else int(str(argument))] = self._stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self._fetch(self._memo[int(str(argument))])
        elif name == "DUP":
            self._fetch(self._stack[-1])
        elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"):
            container, *held = self._taken(opcode)
            container.hold(held)
            self._stack.append(container)
        else:
            taken = self._taken(opcode)
            if opcode.stack_after:
                self._stack.append(self._made(name, argument, taken))

    def _fetch(self, value: _Value) -> None:
        self._fetched += value.weight
        self._check_fetched()
        self._stack.append(value)

    def _check_fetched(self) -> None:
        if self._fetched > _MAX_SHARED_VALUES + MAX_EXPANSION * self._size:
            raise RefusedError("it refers to shared values so often that expanding them would take unbounded time")

    def _taken(self, opcode: pickletools.OpcodeInfo) -> list[_Value]:
        """Pop the operands of an opcode, in the order of the stack, without the mark."""
        wanted = opcode.stack_before
        above: list[_Value] = []
        if pickletools.markobject in wanted:
            above, self._stack = self._stack, self._below.pop()
            wanted = wanted[: wanted.index(pickletools.markobject)]
        if len(wanted) > len(self._stack):
            raise ValueError(f"{opcode.name} pops from an empty stack")
        start = len(self._stack) - len(wanted)
        taken = self._stack[start:] + above
        del self._stack[start:]
        return taken

    def _made(self, name: str, argument: object, values: list[_Value]) -> _Value:
        if name in ("REDUCE", "NEWOBJ"):
            self._check_call(*values)
        elif name in ("PERSID", "BINPERSID"):
            self._check_storages(values)
        made = _Value()
        if name == "GLOBAL":
            made.content = str(argument).replace(" ", ".")
            if _HARMLESS.fullmatch(made.content):
                self.harmless.add(made.content)
            elif not _GLOBALS.fullmatch(made.content):  # in the words of torch.load
                raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {made.content} is not allowed")
        elif isinstance(argument, int | str):
            made.content = argument
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            made.content = tuple(values)
        made.hold(values)
        return made

    def _check_call(self, function: _Value, arguments: _Value) -> None:
        if isinstance(function.content, str) and _ALLOCATING.fullmatch(function.content) and arguments.weight > 1:
            raise RefusedError(f"it calls {function.content}, which could request any amount of memory")
        if function.content == "_codecs.encode":
            self._check_encoding(arguments)
        elif function.content == "torch._utils._rebuild_qtensor":
            self._check_size(arguments)
        elif function.content == "torch._tensor._rebuild_from_type_v2":  # calls its first argument with its third
            if not isinstance(arguments.content, tuple) or len(arguments.content) < 3:
                raise RefusedError(f"it calls {function.content}, but not as torch.save does")
            self._check_call(arguments.content[0], arguments.content[2])

    def _check_encoding(self, arguments: _Value) -> None:
        """Check a call by which pickle protocol 2 stores bytes: of the text of the file itself, in Latin-1."""
        items = arguments.content if isinstance(arguments.content, tuple) else ()
        text, encoding = items if len(items) == 2 else (_Value(), _Value())
        if not isinstance(text.content, str) or encoding.content != "latin1":
            raise RefusedError("it calls _codecs.encode, as torch.save never does")
        self._fetched += len(text.content)
        self._check_fetched()

    def _check_size(self, arguments: _Value) -> None:
        """Check the size of a quantized tensor, the only one that is allocated before its storage is assigned."""
        items = arguments.content if isinstance(arguments.content, tuple) else ()
        size = items[2].content if len(items) > 2 else None
        sides = [side.content for side in size] if isinstance(size, tuple) else [None]
        if not all(isinstance(side, int) for side in sides):
            raise RefusedError("it has a quantized tensor of unknown size")
        if prod(cast("list[int]", sides)) > MAX_EXPANSION * self._size:
            raise RefusedError(f"it claims a quantized tensor of shape {sides} in a file of {self._size:,} bytes")

    def _check_storages(self, identity: list[_Value]) -> None:
        """Check that the storages of the tensors need no more memory than the size of the file allows."""
        described = identity[0].content if identity else None
        if not isinstance(described, tuple) or len(described) <= _NUMEL:
            return
        key, numel = described[_KEY].content, described[_NUMEL].content
        if key not in self._storages and isinstance(numel, int):
            self._storages.add(key)
            self._claimed += numel
            if len(self._storages) > MAX_TENSORS:
                raise RefusedError(f"it has more than {MAX_TENSORS:,} tensors")
        if self._claimed > MAX_EXPANSION * self._size:
            raise RefusedError(
                f"it claims to contain {self._claimed:,} values in a file of {self._size:,} bytes; it is damaged or "
                "made to exhaust memory"
            )
