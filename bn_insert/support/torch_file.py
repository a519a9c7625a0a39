"""Read what torch.save wrote, from anywhere: no code is run, and neither memory nor time without bound is taken.

`torch.load(weights_only=True)` calls nothing but what rebuilds tensors and containers. But a few bytes of pickle can
still ask for a terabyte, or for a key whose hash visits 2**200 values. So the opcodes are looked over before they are
carried out, and the archive's claims before it is unpacked.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, Protocol, cast, runtime_checkable

import torch

# torch.save compresses nothing, so tensors (shared ones counted twice) stay near the size of their file.
LARGEST_EXPANSION = 10

# Beside what the file's size allows: values met again through the memo, each with all that it holds.
_SHARED_VALUES = 1_000_000
_DEEPEST = 500
# Called with a number, these allocate so much; torch.save writes no such call.
_ALLOCATES = re.compile(r"(__builtin__|builtins)\.bytearray|torch\.(\w+\.)*\w*(Tensor|Storage)")
# Places in the description of a storage: ("storage", class, key, device, number of elements).
_KEY, _NUMEL = 2, 4


_ARCHIVE = b"PK\x03\x04"


class RefusedError(ValueError):
    """The file asks for more memory or time than its size can justify."""


def load_torch_file(path: Path, *, mapped: bool = False) -> object:
    """Return what a file of torch.save holds, on the CPU.

    mapped: map it into memory instead of reading it, where its format allows.
    Raises RefusedError, and whatever the readers raise on a damaged file.
    """
    with path.open("rb") as file:  # as torch.load decides: an archive may also stand at the end of another file
        archived = file.read(len(_ARCHIVE)) == _ARCHIVE
    if archived:
        mapped &= _check_archive(path)
    else:
        with path.open("rb") as file:
            _check_pickles(file, path.stat().st_size)
    if mapped and archived:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    with path.open("rb") as file:  # given a path, torch.load would let the suffix decide what it is
        return torch.load(file, map_location="cpu", weights_only=True, mmap=False)


def check_expansion(path: Path, claimed: int) -> None:
    """Raise RefusedError when a file claims to hold far more bytes than it has."""
    size = path.stat().st_size
    if claimed > LARGEST_EXPANSION * size:
        raise RefusedError(
            f"it claims to hold {claimed:,} bytes of tensors in a file of {size:,} bytes, and is damaged or made to "
            "exhaust memory"
        )


def _check_archive(path: Path) -> bool:
    """Check an archive's claims and its pickles; say whether nothing in it is compressed, so that it can be mapped."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        check_expansion(path, sum(record.file_size for record in records))
        program = f"{records[0].filename.partition('/')[0]}/constants.pkl" if records else ""
        if any(record.filename == program for record in records):
            return False  # TorchScript, which torch.load names in refusing it
        for record in records:
            if record.filename.endswith("data.pkl"):
                with archive.open(record) as file:
                    _check_pickle(_Bounded(file, record.file_size), path.stat().st_size)
    return all(record.compress_type == zipfile.ZIP_STORED for record in records)


def _check_pickles(file: BufferedReader, size: int) -> None:
    """Check the five pickles that torch.save wrote before PyTorch 1.6: the tensors' values stand behind them."""
    for _ in range(5):
        if not file.peek(1):  # torch.load says what is missing
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
    """A file that refuses to read more than it can hold: Python would make room for it first."""

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
    """What is known of a value on the stack: how many values it holds (shared ones each time), how deeply nested.

    content: of a whole number or a global the value, of a tuple its items.
    """

    weight: int = 1
    depth: int = 0
    content: int | str | tuple[_Value, ...] | None = None

    def hold(self, values: list[_Value]) -> None:
        self.weight += sum(value.weight for value in values)
        self.depth = max([self.depth, *(value.depth + 1 for value in values)])
        if self.depth > _DEEPEST:
            raise RefusedError(f"values are nested more than {_DEEPEST} deep")


class _Machine:
    """Goes through the opcodes of a pickle with descriptions in the place of values."""

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
        if self._fetched > _SHARED_VALUES + LARGEST_EXPANSION * self._size:
            raise RefusedError("a value in it holds another so often that looking at all would take for ever")
        self._stack.append(value)

    def _taken(self, opcode: pickletools.OpcodeInfo) -> list[_Value]:
        """Take off the stack what an opcode takes, in the stack's order, without the mark."""
        wanted = opcode.stack_before
        above: list[_Value] = []
        if pickletools.markobject in wanted:
            above, self._stack = self._stack, self._below.pop()
            wanted = wanted[: wanted.index(pickletools.markobject)]
        if len(wanted) > len(self._stack):
            raise ValueError(f"{opcode.name} takes more than there is")
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
        if isinstance(function.content, str) and _ALLOCATES.fullmatch(function.content) and arguments.weight > 1:
            raise RefusedError(f"it calls {function.content}, as torch.save never does")

    def _check_storages(self, identity: list[_Value]) -> None:
        """Check that the tensors' memory is no more than the file's size allows."""
        described = identity[0].content if identity else None
        if not isinstance(described, tuple) or len(described) <= _NUMEL:
            return
        key, numel = described[_KEY].content, described[_NUMEL].content
        if key not in self._storages and isinstance(numel, int):
            self._storages.add(key)
            self._claimed += numel
        if self._claimed > LARGEST_EXPANSION * self._size:
            raise RefusedError(
                f"it claims to hold {self._claimed:,} values in a file of {self._size:,} bytes, and is damaged or made "
                "to exhaust memory"
            )
