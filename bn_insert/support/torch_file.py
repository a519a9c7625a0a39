"""Read files written by torch.save from untrusted sources, without running code and in bounded time and memory.

`torch.load(weights_only=True)` calls only the functions that rebuild tensors and containers. But a few bytes of pickle
can still request a terabyte, or build a key whose hash visits 2**200 values. So the opcodes of the pickle are checked
before they are executed, and the claims of the archive before it is unpacked.
"""

from __future__ import annotations

import os
import pickletools
import re
import zipfile
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, Protocol, cast, runtime_checkable

import torch

# torch.save compresses nothing, so the tensors (counting shared ones twice) are about as large as their file.
MAX_EXPANSION = 10

# Values fetched from the memo, each with all that it contains: allowed beyond what the size of the file allows.
_MAX_SHARED_VALUES = 1_000_000
_MAX_DEPTH = 500
# Called with a number, these allocate that much memory; torch.save never writes such a call.
_ALLOCATING = re.compile(r"(__builtin__|builtins)\.bytearray|torch\.(\w+\.)*\w*(Tensor|Storage)")
# Positions in the description of a storage: ("storage", class, key, device, number of elements).
_KEY, _NUMEL = 2, 4

_ARCHIVE = b"PK\x03\x04"


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
    archived = (
        file.read(len(_ARCHIVE)) == _ARCHIVE
    )  # as torch.load decides: another file may have an archive at its end
    file.seek(0)
    if archived:
        mapped &= _check_archive(file)
    else:
        _check_pickles(file)
    if mapped and archived:
        content: object = torch.load(file.name, map_location="cpu", weights_only=True, mmap=True)
        check_same_file(file)
        return content
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True, mmap=False)


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


def _check_archive(file: BufferedReader) -> bool:
    """Check the claims and pickles of an archive; return whether it can be mapped, with nothing compressed."""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        check_expansion(file, sum(record.file_size for record in records))
        program = f"{records[0].filename.partition('/')[0]}/constants.pkl" if records else ""
        if any(record.filename == program for record in records):
            return False  # TorchScript, which torch.load refuses by name
        for record in records:
            if record.filename.endswith("data.pkl"):
                with archive.open(record) as pickled:
                    _check_pickle(_Bounded(pickled, record.file_size), _size(file))
    return all(record.compress_type == zipfile.ZIP_STORED for record in records)


def _check_pickles(file: BufferedReader) -> None:
    """Check the five pickles that torch.save wrote before PyTorch 1.6; the values of the tensors follow them."""
    size = _size(file)
    for _ in range(5):
        if not file.peek(1):  # torch.load reports what is missing
            return
        _check_pickle(_Bounded(file, size), size)


def _check_pickle(file: _Bounded, size: int) -> None:
    machine = _Machine(size)
    for opcode, argument, _ in pickletools.genops(cast(IO[bytes], file)):
        machine.step(opcode, argument)


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
        if self._fetched > _MAX_SHARED_VALUES + MAX_EXPANSION * self._size:
            raise RefusedError("it refers to shared values so often that expanding them would take unbounded time")
        self._stack.append(value)

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
        elif isinstance(argument, int | str):
            made.content = argument
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            made.content = tuple(values)
        made.hold(values)
        return made

    def _check_call(self, function: _Value, arguments: _Value) -> None:
        if isinstance(function.content, str) and _ALLOCATING.fullmatch(function.content) and arguments.weight > 1:
            raise RefusedError(f"it calls {function.content}, as torch.save never does")

    def _check_storages(self, identity: list[_Value]) -> None:
        """Check that the storages of the tensors need no more memory than the size of the file allows."""
        described = identity[0].content if identity else None
        if not isinstance(described, tuple) or len(described) <= _NUMEL:
            return
        key, numel = described[_KEY].content, described[_NUMEL].content
        if key not in self._storages and isinstance(numel, int):
            self._storages.add(key)
            self._claimed += numel
        if self._claimed > MAX_EXPANSION * self._size:
            raise RefusedError(
                f"it claims to contain {self._claimed:,} values in a file of {self._size:,} bytes; it is damaged or "
                "made to exhaust memory"
            )
