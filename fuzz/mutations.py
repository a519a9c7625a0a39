"""Whole files of every kind that is read, and seeded ways to damage them or to make them hostile."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import pickletools
import random
import struct
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models.vgg import VGG, make_layers

from bn_insert import save_checkpoint
from bn_insert.images.transform import Transform

SIZE = 16
IMAGES = 3
DTYPES = (
    *(torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool),
    *(torch.complex64, torch.float8_e4m3fn, torch.uint16),
)
IMAGE_FORMATS = ("png", "jpg", "webp", "bmp", "gif", "tif", "ppm", "jp2", "avif")
CHECKPOINTS = ("zip", "old", "safetensors")
TENSORS = ("npy", "zip", "old", "safetensors")


@dataclass(frozen=True)
class Kind:
    """A kind of input: `reader` names the check in robustness.py, `form` the format that mutations are made for."""

    reader: str
    form: str

    def __str__(self) -> str:
        """Return what the table calls it."""
        return f"{self.reader}, {self.form}"


KINDS = (
    *(Kind("checkpoint", form) for form in CHECKPOINTS),
    Kind("settings", "json"),
    *(Kind("tensor file", form) for form in TENSORS),
    *(Kind("image folder", form) for form in IMAGE_FORMATS),
    *(Kind("class folders", form) for form in ("png", "jpg")),
)


def network() -> VGG:
    """Return the small VGG with BatchNorm whose checkpoint is damaged; the same at each call."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        with torch.device("meta"):  # its own dense layers, replaced at once, would take 400 MB
            vgg = VGG(nn.Identity(), num_classes=1, init_weights=False)
        vgg.features = make_layers([4, "M", 6, "M"], batch_norm=True)
        vgg.avgpool = nn.AdaptiveAvgPool2d(2)
        vgg.classifier = nn.Sequential(
            nn.Linear(24, 8), nn.BatchNorm1d(8), nn.ReLU(True), nn.Dropout(0.3), nn.Linear(8, 3)
        )
        for module in vgg.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.eps = 1e-3
    return vgg.eval()


def tensor() -> Tensor:
    """Return the images of the tensor files."""
    return torch.randn(IMAGES, 3, 4, 5, generator=torch.Generator().manual_seed(0))


@cache
def whole(kind: Kind) -> Mapping[str, bytes]:
    """Return the undamaged files of a kind, by name; the first of them is the one to damage."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        if kind.reader in ("checkpoint", "settings"):
            suffix = "safetensors" if kind.form == "safetensors" else "pth"
            save_checkpoint(network(), folder / f"x.{suffix}", transform=Transform(resize=None, crop=SIZE).to_dict())
            if kind.form == "old":
                torch.save(torch.load(folder / "x.pth"), folder / "x.pth", _use_new_zipfile_serialization=False)
            elif kind.reader == "settings":  # in a file of their own, as older versions wrote them
                state = torch.load(folder / "x.pth")
                torch.save(dict(state), folder / "x.pth")
                (folder / "x.json").write_text(state._metadata[""]["bn_insert"])
        elif kind.reader == "tensor file":
            _save_tensor(tensor(), kind.form, folder / f"x.{_suffix(kind.form)}")
        else:
            generator = np.random.default_rng(0)
            pixels = np.kron(generator.integers(0, 256, (3, 8, 8), np.uint8), np.ones((1, 3, 3), np.uint8))
            Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"x.{kind.form}")
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def mutated(kind: Kind, generator: random.Random, trap: Path) -> tuple[str, bytes]:
    """Return the name of a mutation and the first file of this kind after it; trap: what a payload would create."""
    warnings.filterwarnings("ignore", message=".*quantize")  # PyTorch's, in making them
    content = next(iter(whole(kind).values()))
    own = [*_structural(kind, trap)]
    if own and generator.random() < 0.6:
        name, mutate = generator.choice(own)
        return name, mutate(content, generator)
    name, mutate = generator.choice(BYTES)
    result = mutate(content, generator)
    return (name, result) if result != content else ("nothing", result)


def _save_tensor(values: object, form: str, path: Path) -> None:
    if form == "npy":
        np.save(path, values.numpy() if isinstance(values, Tensor) else values)
    elif form == "safetensors":
        safetensors.torch.save_file(values if isinstance(values, dict) else {"images": values}, path)
    else:
        torch.save(values, path, _use_new_zipfile_serialization=form == "zip")


def _suffix(form: str) -> str:
    return form if form in ("npy", "safetensors") else "pt"


Mutation = Callable[[bytes, random.Random], bytes]


# Bytes, whatever they mean


def _truncated(content: bytes, generator: random.Random) -> bytes:
    return content[: generator.randrange(len(content))]


def _bits_flipped(content: bytes, generator: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(generator.choice((1, 1, 2, 8, 64))):
        changed[_place(content, generator)] ^= 1 << generator.randrange(8)
    return bytes(changed)


def _overwritten(content: bytes, generator: random.Random) -> bytes:
    start = _place(content, generator)
    value = generator.choice(
        (b"\0", b"\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80", generator.randbytes(4))
    )
    value *= generator.choice((1, 1, 2, 8))
    return (content[:start] + value + content[start + len(value) :])[: len(content)]


def _cut_out(content: bytes, generator: random.Random) -> bytes:
    start = _place(content, generator)
    return content[:start] + content[start + generator.randint(1, 40) :]


def _repeated(content: bytes, generator: random.Random) -> bytes:
    start = _place(content, generator)
    return (
        content[:start] + content[start : start + generator.randint(1, 400)] * generator.randint(2, 9) + content[start:]
    )


def _inserted(content: bytes, generator: random.Random) -> bytes:
    start = _place(content, generator)
    return content[:start] + generator.randbytes(generator.randint(1, 40)) + content[start:]


def _moved(content: bytes, generator: random.Random) -> bytes:
    a, b, c = sorted(_place(content, generator) for _ in range(3))
    return content[:a] + content[b:c] + content[a:b] + content[c:]


def _place(content: bytes, generator: random.Random) -> int:
    """Return a position, more often near an end, where headers and directories stand."""
    near = min(len(content), 200)
    return generator.choice(
        (generator.randrange(len(content)), generator.randrange(near), len(content) - 1 - generator.randrange(near))
    )


BYTES: tuple[tuple[str, Mutation], ...] = (
    ("truncated", _truncated),
    ("bits flipped", _bits_flipped),
    ("bits flipped", _bits_flipped),
    ("bytes overwritten", _overwritten),
    ("bytes cut out", _cut_out),
    ("bytes repeated", _repeated),
    ("bytes inserted", _inserted),
    ("parts moved", _moved),
    ("garbage appended", lambda content, generator: content + generator.randbytes(generator.randint(1, 300))),
    ("garbage in front", lambda content, generator: generator.randbytes(generator.randint(1, 300)) + content),
    ("all garbage", lambda content, generator: content[: generator.randrange(16)] + generator.randbytes(300)),
)


# Structures


def _structural(kind: Kind, trap: Path) -> list[tuple[str, Mutation]]:  # noqa: PLR0911 - a return for each format
    if kind.form == "zip":
        return [
            ("zip: entries altered", _zip_entries),
            ("zip: directory altered", _zip_directory),
            ("zip: ambiguous", _zip_ambiguous),
            ("zip: ambiguous", _zip_ambiguous),
            ("zip: compressed", _zip_compressed),
            ("zip: bomb", _zip_bomb),
            ("pickle: opcodes altered", lambda content, generator: _in_zip(content, _pickle_opcodes, generator)),
            ("pickle: payload", lambda content, generator: _in_zip(content, partial_payload(trap), generator)),
            ("pickle: memory or time", lambda content, generator: _in_zip(content, _pickle_bomb, generator)),
            ("contents altered", lambda _, generator: _contents(kind, generator)),
            ("contents altered", lambda _, generator: _contents(kind, generator)),
            *([("settings altered", _stored_settings)] * (kind.reader == "checkpoint")),
        ]
    if kind.form == "old":
        return [
            ("pickle: opcodes altered", _pickle_opcodes),
            ("pickle: payload", partial_payload(trap)),
            ("pickle: memory or time", _pickle_bomb),
            ("contents altered", lambda _, generator: _contents(kind, generator)),
            *([("settings altered", _stored_settings)] * (kind.reader == "checkpoint")),
        ]
    if kind.form == "safetensors":
        return [
            ("safetensors: header altered", _safetensors_header),
            ("safetensors: length altered", _safetensors_length),
            ("contents altered", lambda _, generator: _contents(kind, generator)),
        ]
    if kind.form == "npy":
        return [
            ("npy: header altered", _npy_header),
            ("npy: header altered", _npy_header),
            ("payload", _npy_payload(trap)),
        ]
    if kind.form == "json":
        return [("json: values altered", _json_values), ("json: text altered", _json_text)]
    if kind.form == "png":
        return [("png: chunks altered", _png_chunks)]
    return []


def _stored_settings(content: bytes, generator: random.Random) -> bytes:
    """Change the settings that a state dict carries, or the metadata that they are in."""
    state = torch.load(io.BytesIO(content))
    text = state._metadata[""]["bn_insert"].encode()
    mutate = generator.choice((_json_values, _json_values, _json_text))
    values: tuple[Any, ...] = (3, None, b"{}", [], {}, {"format": "bn-insert"}, torch.ones(2), "x" * (1 << 24))
    if generator.random() < 0.7:
        state._metadata[""]["bn_insert"] = mutate(text, generator).decode("utf-8", "surrogateescape")
    elif generator.random() < 0.5:
        state._metadata[""]["bn_insert"] = generator.choice(values)
    else:
        state._metadata = generator.choice((*values, {"": generator.choice(values)}, OrderedDict({"": state})))
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=content.startswith(b"PK"))
    return buffer.getvalue()


def _contents(kind: Kind, generator: random.Random) -> bytes:
    """Write another content in the same format: what a well-formed file can hold that is not what is wanted."""
    values: Any = tensor() if kind.reader == "tensor file" else dict(network().state_dict())
    simple = kind.form == "safetensors"
    change = _tensor_contents if kind.reader == "tensor file" else _state_contents
    with TemporaryDirectory() as folder:
        path = Path(folder, "x")
        _save_tensor(change(values, generator, simple), kind.form, path)
        return path.read_bytes()


def _state_contents(state: dict[str, Any], generator: random.Random, simple: bool) -> object:
    keys = list(state)
    key = generator.choice(keys)
    value = state[key]

    def without() -> object:
        return {other: state[other] for other in keys if other != key}

    def renamed() -> object:
        other = generator.choice(
            (
                *("", "features", "features.99.weight", "features.-1.weight", f"features.{10**30}.weight"),
                *("\x1b[31mred\x07", key.upper(), key + ".", "." + key, "módulo", "x" if simple else "\ud800"),
                generator.choice(keys),
            )
        )
        return without() | {other: value}

    changes: list[Callable[[], object]] = [
        without,
        renamed,
        renamed,
        lambda: state | {key: value.to(generator.choice(DTYPES))},
        lambda: {other: tensor.to(torch.float64) for other, tensor in state.items()},
        lambda: state | {key: torch.zeros(_shape(generator))},
        lambda: state | {key: value.reshape(-1)},
        lambda: state | {key: value.flatten()[:0]},
        lambda: state | {key: value.float() * generator.choice((torch.nan, torch.inf, 1e38, -1.0, 0.0))},
        lambda: {f"{generator.choice(('module.', 'model.', '_orig_mod.'))}{other}": state[other] for other in keys},
        lambda: {other: state[other] for other in generator.sample(keys, len(keys))},
        lambda: {other: state[other] for other in generator.sample(keys, generator.randrange(1, len(keys)))},
    ]
    if not simple:
        itself: dict[str, object] = {}
        itself["state_dict"] = itself
        changes += [
            lambda: state | {key: torch.zeros(1).expand(10**6, 10**6)},
            lambda: state | {key: value.flatten()[:1].expand(value.shape or (1,))},
            lambda: state | {key: value.to_sparse() if value.dim() else value},
            lambda: state | {key: value.to("meta")},
            lambda: state | {key: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8)},
            lambda: state | {key: generator.choice((None, 1, 1.5, "text", [1], (value,), {1: 2}, {"a": value}))},
            lambda: without() | {generator.choice((None, 1, 1.5, (1, 2), True)): value},  # type: ignore[operator]
            lambda: {generator.choice(("state_dict", "model", "model_ema", "net")): state, "epoch": 3},
            lambda: itself,
            lambda: list(state.items()),
            lambda: OrderedDict(state),
            lambda: network() if generator.random() < 0.5 else {key: nn.Parameter(value, False)},
        ]
    return generator.choice(changes)()


def _tensor_contents(values: Tensor, generator: random.Random, simple: bool) -> object:
    changes: list[Callable[[], object]] = [
        lambda: values.to(generator.choice(DTYPES)),
        lambda: torch.zeros(_shape(generator)),
        lambda: values * generator.choice((torch.nan, torch.inf, 1e38)),
        lambda: {"a": values, "b": values.clone()},
        lambda: {"images": values.transpose(1, 3).contiguous()},
    ]
    if not simple:
        changes += [
            lambda: values[:1, :, :1, :1].expand(10**5, 3, 300, 300),
            values.to_sparse,
            lambda: values.to("meta"),
            lambda: values[:, :, :, ::2],
            values.requires_grad_,
            lambda: generator.choice((None, 1, [values], {"a": 1}, {1: values}, "text")),
            lambda: torch.quantize_per_tensor(values, 0.1, 0, torch.qint8),
        ]
    return generator.choice(changes)()


def _shape(generator: random.Random) -> tuple[int, ...]:
    return tuple(generator.choice((0, 1, 2, 3, 4, 8)) for _ in range(generator.randrange(6)))


# Zip archives


def _entries(content: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(record.filename, archive.read(record)) for record in archive.infolist()]


def _archive(entries: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in entries:
            record = zipfile.ZipInfo(name)
            record.compress_type = compression
            archive.writestr(record, data)
    return buffer.getvalue()


def _in_zip(content: bytes, mutate: Mutation, generator: random.Random) -> bytes:
    """Change the pickle, and write the archive anew with right check sums."""
    entries = _entries(content)
    return _archive([(name, mutate(data, generator) if name.endswith("data.pkl") else data) for name, data in entries])


def _zip_entries(content: bytes, generator: random.Random) -> bytes:
    entries = _entries(content)
    place = generator.randrange(len(entries))
    name, data = entries[place]
    order = generator.choice((b"big", b"little", b"middle", b""))
    names = ("../../" + name, "/" + name, name + "\0", "", name.upper(), name.replace("/", "\\"), "x" * 60_000)
    changes: list[Callable[[], list[tuple[str, bytes]]]] = [
        lambda: [entry for entry in entries if entry is not entries[place]],
        lambda: [*entries[:place], (generator.choice(names), data), *entries[place + 1 :]],
        lambda: [*entries, ("archive/more/" + generator.choice(names), data)],
        lambda: [*entries[:place], (name, generator.choice(BYTES)[1](data or b"x", generator)), *entries[place + 1 :]],
        lambda: [*entries[:place], (name, data * 3), *entries[place + 1 :]],
        lambda: [*entries[:place], (name, b""), *entries[place + 1 :]],
        lambda: [(other if other == name else other.replace("archive", "other"), each) for other, each in entries],
        lambda: [(other, order if "byteorder" in other else each) for other, each in entries],
        lambda: [("archive/" + other, each) for other, each in entries],
        lambda: generator.sample(entries, len(entries)),
    ]  # fmt: skip
    return _archive(generator.choice(changes)())


def _zip_directory(content: bytes, generator: random.Random) -> bytes:
    """Change a field of one record of the directory, or of the record at the end."""
    changed = bytearray(content)
    numbers = (0, 1, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, len(content), generator.randrange(1 << 32))
    if generator.random() < 0.3:
        start, fields = content.rfind(b"PK\5\6"), ((8, "H"), (10, "H"), (12, "I"), (16, "I"), (20, "H"))
    else:
        starts = _all_positions(content, b"PK\1\2") + _all_positions(content, b"PK\3\4")
        start = generator.choice(starts)
        fields = ((6, "H"), (8, "H"), (10, "H"), (16, "I"), (20, "I"), (24, "I"), (28, "H"), (30, "H"), (42, "I"))
    offset, form = generator.choice(fields)
    value = generator.choice(numbers) & (0xFFFF if form == "H" else 0xFFFFFFFF)
    if start + offset + struct.calcsize(form) <= len(changed):
        struct.pack_into("<" + form, changed, start + offset, value)
    return bytes(changed)


def _zip_ambiguous(content: bytes, generator: random.Random) -> bytes:
    """Put a pickle that takes memory or time where one reader may find it and another may not."""
    entries = _entries(content)
    name, pickled = next(entry for entry in entries if entry[0].endswith("data.pkl"))
    hostile = _pickle_bomb(pickled, generator)
    folder, _, member = name.partition("/")
    cased = "".join(generator.choice((letter.upper(), letter)) for letter in member)
    folder_cased = "".join(generator.choice((letter.upper(), letter)) for letter in folder)
    names = (name, f"{folder}/{cased}", f"{folder_cased}/{member}", f"{name}\0more", f"{folder}//{member}")
    rest = [entry for entry in entries if entry[0] != name]
    other = _archive([(name, hostile), *rest])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's, of names that come twice
        added = _archive(generator.sample([*entries, (generator.choice(names), hostile)], len(entries) + 1))
        cased_only = _archive([(f"{folder}/{cased}", hostile), *rest])
    return generator.choice((added, cased_only, _two_directories(content, other), _two_directories(other, content)))


def _two_directories(first: bytes, second: bytes) -> bytes:
    """Join two archives so that the record at the end names the first's directory, after which is the second's."""
    if not second.endswith(b"\0\0") or second[-22:-18] != b"PK\5\6":
        return first + second
    (length, offset) = struct.unpack("<II", second[-10:-2])
    (first_length, first_offset) = struct.unpack("<II", first[-10:-2])
    directory = bytearray(second[offset : offset + length])
    for place in _all_positions(bytes(directory), b"PK\1\2"):
        (start,) = struct.unpack_from("<I", directory, place + 42)
        struct.pack_into("<I", directory, place + 42, start + len(first))
    record = second[-22:-10] + struct.pack("<II", first_length, first_offset) + b"\0\0"
    return first + second[:offset] + bytes(directory) + record


def _all_positions(content: bytes, mark: bytes) -> list[int]:
    return [place for place in range(len(content)) if content.startswith(mark, place)]


def _zip_compressed(content: bytes, generator: random.Random) -> bytes:
    return _archive(_entries(content), generator.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)))


def _zip_bomb(content: bytes, generator: random.Random) -> bytes:
    entries = _entries(content)
    place = generator.randrange(len(entries))
    entries[place] = (entries[place][0], entries[place][1] + bytes(1 << generator.randint(22, 25)))
    return _archive(entries, zipfile.ZIP_DEFLATED)


# Pickles


class Payload:
    """Unpickled, it calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        """Take the call to make."""
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        """Return the call."""
        return self.call


def partial_payload(trap: Path) -> Mutation:
    """Return a mutation that puts a call which makes a file into a pickle, in one of the ways that pickle knows."""

    def mutate(content: bytes, generator: random.Random) -> bytes:
        target = str(trap / "executed")
        code = f"open({target!r}, 'w').close()"
        calls = (
            Payload(os.system, f"touch {target}"),
            Payload(exec, code),
            Payload(eval, code),
            Payload(open, target, "w"),
            Payload(Path.touch, Path(target)),
            Payload(os.mkdir, target),
            Payload(torch.save, 1, target),
            Payload(np.save, target, 1),
            Payload(getattr, Payload(__import__, "os"), "system"),
        )
        pushed = pickle.dumps(generator.choice(calls), generator.choice((0, 1, 2, 4, 5)))
        pushed = pushed[2 if pushed[:1] == b"\x80" else 0 : -1].removeprefix(b"\x95" + pushed[3:11])
        command = f"touch {target}".encode()
        by_hand = (
            b"(S'" + command + b"'\nios\nsystem\n",  # INST
            b"(cos\nsystem\nX" + struct.pack("<I", len(command)) + command + b"o",  # OBJ
            b"\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(command)]) + command + b"\x85R",  # STACK_GLOBAL
            b"cos\nsystem\n\x8c" + bytes([len(command)]) + command + b"\x85\x81",  # NEWOBJ
            b"ctorch.hub\nload\n\x8c\x01x\x8c\x01y\x86R",
            b"\x82\x01",  # EXT1
            b"ctorch.serialization\nload\n\x8c" + bytes([len(target)]) + target.encode() + b"\x85R",
            b"ccollections\nOrderedDict\n)R}X\x0c\x00\x00\x00__setstate__cos\nsystem\nsb",
            b"c__builtin__\neval\nX" + struct.pack("<I", len(code)) + code.encode() + b"\x85R",
        )
        call = generator.choice((pushed, generator.choice(by_hand)))
        start = _pickle_start(content, generator) + 2
        if generator.random() < 0.3:  # the whole pickle is the payload
            return content[:start] + call + b"."
        return content[:start] + call + b"0" + content[start:]  # called, and thrown away

    return mutate


def _pickle_start(content: bytes, generator: random.Random) -> int:
    """Return where a pickle begins: torch.save's older format has five, one behind the other."""
    start, starts = 0, []
    while content.startswith(b"\x80\x02", start):
        starts.append(start)
        *_, (_, _, stop) = pickletools.genops(content[start:])
        start += cast(int, stop) + 1
    return generator.choice(starts)


def _pickle_opcodes(content: bytes, generator: random.Random) -> bytes:
    """Put, change or remove opcodes at the boundary of others."""
    start = _pickle_start(content, generator)
    positions = [position for _, _, position in pickletools.genops(content[start:]) if position is not None]
    changed = content
    for _ in range(generator.choice((1, 1, 2, 5))):
        place = start + generator.choice(positions)
        opcode = generator.choice(pickletools.opcodes).code.encode("latin-1")
        argument = generator.choice((b"", b"", generator.randbytes(1), generator.randbytes(4), b"\xff\xff\xff\x7f"))
        drop = generator.choice((0, 1, 1, 2))
        changed = changed[:place] + opcode + argument + changed[place + drop :]
    return changed


def _pickle_bomb(content: bytes, generator: random.Random) -> bytes:
    """Put a value in front that a few bytes make large, or slow to hash, and throw it away."""
    start = _pickle_start(content, generator) + 2
    many = b"\x8a\x08" + struct.pack("<q", generator.choice((10**9, 10**10, 10**12, 10**15)))
    nested = b"K\x01q\xc8" + b"h\xc8\x86q\xc8" * generator.choice((40, 200))
    storage = generator.choice((b"FloatStorage", b"DoubleStorage", b"ByteStorage"))
    identity = b"((X\x07\x00\x00\x00storagectorch\n" + storage + b"\nX\x01\x00\x00\x00zX\x03\x00\x00\x00cpu" + many
    bombs = (
        b"c__builtin__\nbytearray\n" + many + b"\x85R0",
        b"cbuiltins\nbytearray\n" + many + b"\x85R0",
        b"ctorch\n" + storage + b"\n" + many + b"\x85R0",
        b"ctorch\nFloatTensor\n" + many + b"\x85R0",
        b"ctorch\nTensor\n" + many + b"\x85R0",
        b"ctorch.storage\nUntypedStorage\n" + many + b"\x85R0",
        b"}" + nested + b"K\x01s0",  # as the key of a dict, whose hash visits every path
        nested + b"0",
        b"}" + b")" + b"\x85" * 1_000_000 + b"K\x01s0",  # its hash goes down as deep as it is nested
        b"]" + b"q\xc9" + b"h\xc9a" * 60 + b"0",  # a list in itself
        b"c__builtin__\nset\n](" + nested + b"e\x85R0",
        identity[1:] + b"tQ0",
        identity[1:] + b"NtQ0",
        b"c_codecs\nencode\nX\x04\x00\x00\x00abcdX\x04\x00\x00\x00zlib\x86R0",
        b"]c_codecs\nencode\nq\xc7X"
        + struct.pack("<I", 9000)
        + b"a" * 9000
        + b"X\x06\x00\x00\x00latin1\x86q\xc80"
        + b"h\xc7h\xc8Ra" * 30_000
        + b"0",
        b"c_codecs\nencode\nX\x04\x00\x00\x00abcdX\x06\x00\x00\x00utf-32\x86R0",
        b"ctorch._tensor\n_rebuild_from_type_v2\n(c__builtin__\nbytearray\nctorch\nTensor\n" + many + b"\x85}tR0",
        b"ctorch._utils\n_rebuild_qtensor\n(NK\x00" + many + b"\x85K\x01\x85NNNtR0",
        b"ccollections\nCounter\n" + many + b"\x85R0",
        b"(" * 100_000,
        b"]" * 100_000,
        (b"]a" * 50_000).join((b"]", b"0")),
        b"\x8b" + struct.pack("<i", 0x7FFFFFFF),  # LONG4 of 2 GB
        b"B" + struct.pack("<I", 0xFFFFFFFF),  # BINBYTES of 4 GB
        b"\x8e" + struct.pack("<Q", 1 << 40),  # BINBYTES8
        b"\x96" + struct.pack("<Q", 1 << 40),  # BYTEARRAY8
        b"\x95" + struct.pack("<Q", 1 << 40),  # FRAME
        b"r\xff\xff\xff\x7f",  # LONG_BINPUT
    )
    return content[:start] + generator.choice(bombs) + content[start:]


# Safetensors


def _safetensors_length(content: bytes, generator: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    wrong = generator.choice((0, 1, length - 1, length + 1, len(content), 1 << 27, 1 << 40, (1 << 64) - 1))
    return struct.pack("<Q", wrong) + content[8:]


def _safetensors_header(content: bytes, generator: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    name = generator.choice(names)
    entry = dict(header[name])
    numbers = (0, 1, -1, 2**31, 2**62, 2**63, 2**64, 1.5, None, "1", len(data), len(data) + 1)
    begin, end = entry["data_offsets"]
    changes: list[Callable[[], Any]] = [
        lambda: entry | {"dtype": generator.choice(("F64", "F16", "I8", "BOOL", "F8_E4M3", "U64", "X1", "", 1, None))},
        lambda: entry | {"shape": [generator.choice(numbers) for _ in range(generator.randrange(5))]},
        lambda: entry | {"shape": [*entry["shape"], 1, 1]},
        lambda: entry | {"shape": entry["shape"][::-1]},
        lambda: entry | {"shape": [2**32, 2**32, 0]},
        lambda: entry | {"data_offsets": [generator.choice((begin, *numbers)), generator.choice((end, *numbers))]},
        lambda: entry | {"data_offsets": [end, begin]},
        lambda: entry | {"more": 1},
        lambda: {key: value for key, value in entry.items() if key != generator.choice(list(entry))},
        lambda: generator.choice(([], None, 1, "text", {})),
    ]
    changed = header | {name: generator.choice(changes)()}
    if generator.random() < 0.3:
        metadata = header.get("__metadata__", {})
        settings = metadata.get("bn-insert", "{}").encode()
        text = _json_values(settings, generator).decode(errors="replace")
        changed = header | {
            "__metadata__": generator.choice(
                ({"bn-insert": text}, {"bn-insert": 1}, [], {"x": "y"}, {"bn-insert": "x"})
            )
        }
    text = json.dumps(changed).encode()
    if generator.random() < 0.1:
        text = text.replace(name.encode(), generator.choice(names).encode())
    return struct.pack("<Q", len(text)) + text + data


# NumPy files


def _npy_header(content: bytes, generator: random.Random) -> bytes:
    (length,) = struct.unpack("<H", content[8:10])
    data = content[10 + length :]
    shapes = (
        "(3, 3, 4, 5)",
        "(180,)",
        "()",
        "(0, 3, 4, 5)",
        "(-3, -3, 4, 5)",
        f"({10**15}, 3, 4, 5)",
        "(3, 3, 4, 5.0)",
    )
    descriptions = (
        *("'<f4'", "'>f4'", "'<f8'", "'<f2'", "'|u1'", "'|O'", "'<c8'", "'<U1'", "'|S0'", "'|V0'", "'<M8[s]'", "'x'"),
        *("[('a', '<f4')]", "('<f4', (2,))", "'<f16'", "'|b1'", "'<u2'", "{}", "1", "'<i8'", "None"),
    )
    header = (
        "{'descr': " + generator.choice(("'<f4'", *descriptions)) + ", 'fortran_order': "
        + generator.choice(("False", "True", "1", "None")) + ", 'shape': "
        + generator.choice((shapes[0], *shapes)) + ", }"
    )  # fmt: skip
    header = generator.choice((header, header, header, "(" * 5000, "{" * 200, "[" + "0," * 4000 + "]", "0" * 9000, ""))
    version = generator.choice((b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\x09\0", b"\0\0"))
    form = "<H" if version[:1] == b"\1" else "<I"
    text = header.encode() + b"\n"
    return content[:6] + version + struct.pack(form, generator.choice((len(text), len(text), 0, 65535))) + text + data


def _npy_payload(trap: Path) -> Mutation:
    def mutate(content: bytes, generator: random.Random) -> bytes:
        call = pickle.dumps(Payload(os.system, f"touch {trap / 'executed'}"), generator.choice((0, 2, 4)))
        buffer = io.BytesIO()
        np.save(buffer, np.array([None]), allow_pickle=True)
        whole_header = buffer.getvalue()[:128]
        return generator.choice((whole_header + call, call, content[:128] + call))

    return mutate


# JSON


def _json_values(content: bytes, generator: random.Random) -> bytes:
    document = json.loads(content)
    wrong: tuple[Any, ...] = (
        *(None, True, -1, 0, 1, 2, 1.5, 1e308, 10**400, float("nan"), float("inf"), "", "text", "\ud800", "\x1b[2J"),
        *([], {}, [1], {"a": 1}, [[[[]]]], {"eps": -1}, {"eps": 1e-5, "momentum": "x"}, {"format": "bn-insert"}),
    )
    for _ in range(generator.choice((1, 1, 2, 4))):
        target, key = document, generator.choice(list(document) or ["x"])
        while (
            isinstance(target, dict) and isinstance(target.get(key), dict) and target[key] and generator.random() < 0.8
        ):
            target, key = target[key], generator.choice(list(target[key]))
        action = generator.randrange(4)
        if action == 0:
            target.pop(key, None)
        elif action == 1:
            name = generator.choice(("x", "", "features.99", str(key) + "0", "\ud800"))
            target[name] = copy.deepcopy(target.get(key))
        else:
            target[key] = copy.deepcopy(generator.choice(wrong))
    if generator.random() < 0.1:
        digest = generator.choice(("0" * 64, "", None, 1))
        document["replaces"] = generator.choice(({"sha256": digest, "settings": generator.choice(wrong)}, *wrong))
    return json.dumps(document).encode()


def _json_text(content: bytes, generator: random.Random) -> bytes:
    return generator.choice(
        (
            b"[" * 100_000,
            b'{"format": "bn-insert", "version": 1, "batchnorm": ' + b'{"a":' * 50_000,
            b'{"format": "bn-insert", "version": ' + b"9" * 10_000 + b"}",
            content.replace(b"{", b'{"format": 1, "format": "bn-insert", ', 1),
            content.decode().encode("utf-16"),
            b"\xef\xbb\xbf" + content,
            content + content,
            content.replace(b'"', b"'"),
            b"\xff\xfe\0",
            b"null",
            b'"bn-insert"',
            b"1e999",
            b"",
        )
    )


# PNG

ZEROS = zlib.compress(bytes(1 << 24))


def _png_chunks(content: bytes, generator: random.Random) -> bytes:
    """Change a chunk, with the right check sum: sizes, colour types, bombs in compressed chunks."""
    chunks, place = [], 8
    while place < len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += 12 + length
    sizes = (0, 1, 24, 1000, 10_000, 30_000, 65_535, 1 << 20, 1 << 30, (1 << 31) - 1, (1 << 32) - 1)
    size = struct.pack(">II", generator.choice(sizes), generator.choice(sizes))
    bombs = {b"IDAT": ZEROS, b"zTXt": b"a\0\0" + ZEROS, b"iCCP": b"a\0\0" + ZEROS, b"eXIf": generator.randbytes(60)}
    name = generator.choice(list(bombs))
    kind, data = chunks[generator.randrange(len(chunks))]
    changes: list[Callable[[], list[tuple[bytes, bytes]]]] = [
        lambda: [(b"IHDR", size + chunks[0][1][8:]), *chunks[1:]],
        lambda: [(b"IHDR", chunks[0][1][:8] + generator.randbytes(5)), *chunks[1:]],
        lambda: [(b"IHDR", chunks[0][1][:8] + bytes([16, generator.choice((0, 2, 3, 4, 6)), 0, 0, 0])), *chunks[1:]],
        lambda: [chunks[0], (name, bombs[name]), *chunks[1:]],
        lambda: [chunk for chunk in chunks if chunk[0] != kind],
        lambda: [(other, generator.choice(BYTES)[1](each or b"x", generator)) for other, each in chunks],
        lambda: [chunks[0], (b"acTL", struct.pack(">II", 1 << 30, 0)), (b"fcTL", generator.randbytes(26)), *chunks[1:]],
        lambda: [chunks[0], *generator.sample(chunks[1:], len(chunks) - 1), (kind, data)],
    ]
    result = content[:8]
    for other, each in generator.choice(changes)():
        result += struct.pack(">I", len(each)) + other + each + struct.pack(">I", zlib.crc32(other + each))
    return result
