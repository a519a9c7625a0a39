"""Read a checkpoint file: tensors and settings, from one opening of the file, without running code from it."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open
from torch import Tensor

from ..errors import CheckpointError, out_of_memory
from ..support.arguments import check_flags
from ..support.file_limits import RefusedError, check_expansion
from ..support.files import StrPath, real_path
from ..support.near_names import did_you_mean
from ..support.safe_torch_load import check_same_file, load_torch_file
from ..support.text import printable
from .damaged_files import START, file_in, guess, unreadable
from .legacy_sidecar import read_sidecar, sidecar_path
from .parts import check_is_no_index, check_is_whole
from .settings import HEADER_KEY, METADATA_KEY, Settings, stored_metadata
from .state_dict import checked_tensors, unwrapped_state_dict

FileKind = Literal["torch", "safetensors"]

# Where settings are, for messages.
_HEADER, _METADATA = "the file's header", "the file's metadata"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a checkpoint file contains.

    Attributes:
        path: The file, for messages.
        kind: Its format.
        tensors: Tensors on the CPU by key, as in the file. They may share memory with each other or with the file.
        settings: Settings that `save_checkpoint` stored, or None.
        settings_place: Where the settings were found, for messages: "the file's metadata", "the file's header", or the
            sidecar of an older bn-insert.
        mapped: Whether the tensors stay in the file until they are used.
        key: Key of the tensors in the file, as passed to `read_checkpoint`; empty if the file itself is their state
            dict.
    """

    path: Path
    kind: FileKind
    tensors: Mapping[str, Tensor] = field(repr=False)
    settings: Settings | None = None
    settings_place: str = ""
    mapped: bool = False
    key: str = ""


def read_checkpoint(path: StrPath, *, mmap: bool = False, key: str | None = None) -> Checkpoint:
    """Read a .pth, .pt, .bin or .safetensors file; its content determines the format, not its name.

    Settings are read from the file itself. If it contains none, they are read from a sidecar `NAME.json`, which older
    versions of bn-insert wrote next to a .pth.

    Args:
        path: A file with a state dict, or with a dict that contains one under a common key such as "state_dict" or
            "model".
        mmap: Map the file into memory instead of reading it, if its format allows. Safetensors files are always mapped.
        key: The key of the state dict in the file; for nested dicts, the keys joined by dots. If a state dict contains
            several networks, the prefix of the keys of one of them.

    Raises:
        UnneededKeyError: The file is a state dict itself, and a key is passed.
        CheckpointError: The file is not a checkpoint, is damaged, contains anything but tensors, requests more memory
            than its size can justify, or has damaged settings.
    """
    check_flags(CheckpointError, mmap=mmap)
    if not isinstance(path, str | os.PathLike):
        what = "None" if path is None else f"of the type {type(path).__name__}"
        raise CheckpointError(
            f"the path is {what}; pass that of a file (a state dict is loaded by model.load_state_dict(state_dict))"
        )
    if key is not None and not isinstance(key, str):
        raise CheckpointError(f"key is {key!r:.40}, not a str; pass the key of a dict in the file")
    if not os.fspath(path):  # as Path, the current folder
        raise CheckpointError("the path of the checkpoint is empty; pass a file")
    path = Path(path)
    checkpoint = _read(path, mmap=mmap, key=key)

    def keys_of(other: Path) -> Collection[str]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they do not concern the file that is read
            return _read(other, mmap=True, key=key).tensors.keys()

    if checkpoint.settings is None:  # save_checkpoint writes whole networks
        check_is_whole(path, checkpoint.tensors.keys(), keys_of, is_safetensors=checkpoint.kind == "safetensors")
    return checkpoint


def _read(path: Path, *, mmap: bool, key: str | None) -> Checkpoint:
    """Return what `read_checkpoint` returns, but also for a part of a checkpoint."""
    with _open(path) as file:
        check_is_no_index(path)
        kind = _file_kind(path, file)
        try:
            if kind == "safetensors":
                content, text = _read_safetensors(file)
                found = unwrapped_state_dict(path, content, key)
            else:
                found = unwrapped_state_dict(path, _read_torch(file, mapped=mmap), key)
                text = stored_metadata(found.state_dict).get(METADATA_KEY)
        except CheckpointError:
            raise
        except Exception as error:  # parsers raise anything for a damaged file
            if out_of_memory(error):
                raise
            raise unreadable(path, error) from error
        tensors = checked_tensors(path, found)
        try:
            check_expansion(file, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
        except RefusedError as error:
            raise unreadable(path, error) from error
        place = _HEADER if kind == "safetensors" else _METADATA
        settings = None if text is None else _parsed(path, text, place)
        if settings is None and kind == "torch" and (settings := read_sidecar(file)) is not None:
            place = str(sidecar_path(real_path(path)))
    if prefix := found.prefix:
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        settings = settings and settings.of_part(prefix)
    return Checkpoint(path, kind, tensors, settings, place if settings else "", mmap, found.key)


def _open(path: Path) -> BufferedReader:
    """Open a regular file; a named pipe must not block."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    try:
        # Before the opening: Python refuses to open a folder, with a message of its own.
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder, not a checkpoint file; {file_in(path)}")
        file = open(path, "rb", opener=opener)  # noqa: SIM115 - Path.open has no opener; the caller closes it
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}{did_you_mean(path)}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise CheckpointError(f"{path} is not a regular file; copy its content to one")
    return file


def _file_kind(path: Path, file: BufferedReader) -> FileKind:
    """Return the format that the first bytes of a file show."""
    try:
        start = file.read(START)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    # The first eight bytes are the length of the header and can look like anything, so this comes first: a zip archive
    # and the older format of torch.save have other bytes after them.
    if start[8:9] == b"{" and 0 in start[:8]:  # text has no zeros, and no header is that long
        return "safetensors"
    if start.startswith(b"PK\x03\x04") and _first_member(start).endswith(b".npy"):
        raise CheckpointError(
            f"{path} is an .npz file of NumPy arrays; convert it: torch.save({{key: torch.from_numpy(value) for key, "
            "value in numpy.load(path).items()}, other_path)"
        )
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return "torch"
    raise CheckpointError(f"{path} is not a checkpoint: {guess(start)}")


def _first_member(archive: bytes) -> bytes:
    """Return the name of the first member of a zip archive, from its first bytes."""
    return archive[30 : 30 + int.from_bytes(archive[26:28], "little")]


def _read_safetensors(file: BufferedReader) -> tuple[dict[Any, Any], object]:
    """Return the tensors and the text of the settings."""
    with safe_open(file.name, framework="pt", device="cpu") as opened:
        check_same_file(file)
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - it is not a dict
        return tensors, (opened.metadata() or {}).get(HEADER_KEY)


def _read_torch(file: BufferedReader, *, mapped: bool) -> object:
    with warnings.catch_warnings():
        # How the file was written (old pickle protocols, typed storages) does not concern its reader.
        warnings.simplefilter("ignore")
        return load_torch_file(file, mapped=mapped)


def _parsed(path: Path, text: object, place: str) -> Settings:
    try:
        if not isinstance(text, str):
            raise CheckpointError(f"they are of type {type(text).__name__}, not str")
        return Settings.from_json(text)
    except CheckpointError as error:
        advice = "save it again"
        if place == _METADATA:
            advice += ", or drop the settings: torch.save(dict(torch.load(path)), other_path)"
        raise CheckpointError(f"{path}: the settings in {place} are damaged: {printable(error)}; {advice}") from error
