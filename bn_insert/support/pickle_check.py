"""Check what a pickle by torch.save would do, before it is executed, in bounded time and memory.

A few bytes of pickle can request a terabyte, or build a key whose hash visits 2**200 values. Only the functions that
torch.save writes for tensors and plain containers may be called, fewer than `torch.load(weights_only=True)` allows:
each of them is known to take memory in proportion to its arguments.
"""

from __future__ import annotations

import pickle
import pickletools
import re
from dataclasses import dataclass
from math import prod
from typing import IO, Protocol, cast, runtime_checkable

from .file_limits import MAX_EXPANSION, MAX_TENSORS, RefusedError

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
# What training scripts save besides the weights: arguments, paths, dates, ranges, NumPy scalars and arrays. Each is
# replaced by an empty object, so that no code of these types runs.
_HARMLESS = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|decimal\.Decimal|uuid\.UUID|fractions\.Fraction"
    r"|(__builtin__|builtins)\.(x?range|slice|frozenset|Ellipsis)"
    r"|torchvision\.transforms\.functional\.InterpolationMode"
    r"|pathlib\.(_local\.)?(Pure)?(Posix|Windows)?Path|datetime\.(datetime|date|time|timedelta|timezone)"
    r"|numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|dtype|ndarray|dtypes\.\w+|(bool|u?int|float)\w*)"
)
# Positions in the description of a storage: ("storage", class, key, device, number of elements).
_KEY, _NUMEL = 2, 4


def check_pickle(file: _Readable, length: int, file_size: int) -> set[str]:
    """Check a pickle, and return the names of the types in it whose objects are to be ignored.

    Args:
        file: At the start of the pickle.
        length: How many bytes there are to read, at most.
        file_size: Size of the file that the pickle is in.

    Raises:
        RefusedError: The pickle requests more memory or time than the size of the file can justify.
        Exception: Whatever the parser raises for a damaged pickle.
    """
    machine = _Machine(file_size)
    for opcode, argument, _ in pickletools.genops(cast(IO[bytes], _Bounded(file, length))):
        machine.step(opcode, argument)
    return machine.harmless


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
