"""Read a checkpoint file: tensors and settings, from one opening of the file, without running code from it."""

from __future__ import annotations

import os
import re
import stat
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open
from torch import Tensor

from ..errors import CheckpointError, out_of_memory
from ..support.files import StrPath, real_path
from ..support.near_names import did_you_mean
from ..support.safe_torch_load import RefusedError, check_expansion, check_same_file, load_torch_file
from ..support.text import printable
from .legacy_sidecar import read_sidecar, sidecar_path
from .settings import HEADER_KEY, METADATA_KEY, Settings, stored_metadata
from .state_dict import checked_tensors, unwrapped_state_dict

FileKind = Literal["torch", "safetensors"]

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.(safetensors|bin|pth|pt)$")

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
    """

    path: Path
    kind: FileKind
    tensors: Mapping[str, Tensor] = field(repr=False)
    settings: Settings | None = None
    settings_place: str = ""
    mapped: bool = False


def read_checkpoint(path: StrPath, *, mmap: bool = False, key: str | None = None) -> Checkpoint:
    """Read a .pth, .pt, .bin or .safetensors file; its content determines the format, not its name.

    Settings are read from the file itself. Only if it contains none is a sidecar `NAME.json`, as older versions of
    bn-insert wrote beside a .pth, used instead.

    Args:
        path: A file with a state dict, or with a dict that contains one under a common key such as "state_dict" or
            "model".
        mmap: Map the file into memory instead of reading it, if its format allows. Safetensors files are always mapped.
        key: The key of the dict that contains the state dict.

    Raises:
        CheckpointError: The file is not a checkpoint, is damaged, contains anything but tensors, requests more memory
            than its size can justify, or has damaged settings.
    """
    path = Path(path)
    _check_whole(path)
    with _open(path) as file:
        kind = _file_kind(path, file)
        try:
            with warnings.catch_warnings():
                # How the file was written (old pickle protocols, typed storages) does not concern its reader.
                warnings.simplefilter("ignore")
                if kind == "safetensors":
                    content, text = _read_safetensors(file)
                else:
                    content, text = _read_torch(path, file, mapped=mmap, key=key)
        except CheckpointError:
            raise
        except Exception as error:  # parsers raise anything for a damaged file
            if out_of_memory(error):
                raise
            raise _unreadable(path, error) from error
        tensors = checked_tensors(path, content)
        try:
            check_expansion(file, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
        except RefusedError as error:
            raise _unreadable(path, error) from error
        place = _HEADER if kind == "safetensors" else _METADATA
        settings = None if text is None else _parsed(path, text, place)
        if settings is None and kind == "torch" and (settings := read_sidecar(file)) is not None:
            place = str(sidecar_path(real_path(path)))
    return Checkpoint(path, kind, tensors, settings, place if settings else "", mmap)


def read_settings(path: StrPath) -> Settings | None:
    """Return the settings stored in a checkpoint, or None if there are none; raises as `read_checkpoint` does."""
    return read_checkpoint(path, mmap=True).settings


def _check_whole(path: Path) -> None:
    """Raise CheckpointError for one of several files that a large checkpoint was divided into, and for their index.

    Read alone, the first file of a VGG is a shorter VGG.
    """
    name = path.name.removesuffix(".index.json")
    part = _PART.search(name)
    if name == path.name and (part is None or int(part[2]) < 2):
        return
    stem, suffix = (name[: part.start()], part[3]) if part else name.rsplit(".", 1) if "." in name else (name, "bin")
    load = "safetensors.torch.load_file(part)" if suffix == "safetensors" else "torch.load(part)"
    save = f"safetensors.torch.save_file(tensors, '{stem}.safetensors')"
    save = save if suffix == "safetensors" else f"torch.save(tensors, '{stem}.{suffix}')"
    what = f"part {int(part[1])} of {int(part[2])} of a checkpoint" if part else "the index of a checkpoint in parts"
    raise CheckpointError(
        f"{path} is {what}; merge the parts into one file first: "
        f"tensors = {{key: value for part in sorted(glob.glob('{printable(stem)}-*-of-*')) for key, value in "
        f"{load}.items()}}; {printable(save)}"
    )


def _open(path: Path) -> BufferedReader:
    """Open a regular file; a named pipe must not block."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    try:
        # Before the opening: Python refuses to open a folder, with a message of its own.
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder, not a checkpoint file; {_file_in(path)}")
        file = open(path, "rb", opener=opener)  # noqa: SIM115 - Path.open has no opener; the caller closes it
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}{did_you_mean(path)}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise CheckpointError(f"{path} is not a regular file; copy its content to one")
    return file


def _file_in(folder: Path) -> str:
    """Return the way from a folder to a file that can be read."""
    try:
        names = {file.name for file in folder.iterdir()}
    except OSError:
        names = set()
    if ".metadata" in names and any(name.endswith(".distcp") for name in names):
        return (
            "it has the parts of a distributed checkpoint, which PyTorch makes one file of: "
            "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"
        )
    found = next((name for name in _USUAL_NAMES if name in names), None)
    return f"name the file in it: {folder / found}" if found else "name a file in it"


def _file_kind(path: Path, file: BufferedReader) -> FileKind:
    """Return the format that the first bytes of a file show."""
    try:
        start = file.read(_TAR_MAGIC.stop)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    # The first eight bytes are the length of the header and can look like anything, so this comes first: a zip archive
    # and the older format of torch.save have other bytes after them.
    if start[8:9] == b"{":
        return "safetensors"
    if start.startswith(b"PK\x03\x04") and b".npy" in start[:64]:
        raise CheckpointError(
            f"{path} is an .npz file of NumPy arrays; convert it: torch.save({{key: torch.from_numpy(value) for key, "
            "value in numpy.load(path).items()}, other_path)"
        )
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return "torch"
    raise CheckpointError(f"{path} is not a checkpoint: {_guess(start)}")


def _read_safetensors(file: BufferedReader) -> tuple[dict[Any, Any], object]:
    """Return the tensors and the text of the settings."""
    with safe_open(file.name, framework="pt", device="cpu") as opened:
        check_same_file(file)
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - it is not a dict
        return tensors, (opened.metadata() or {}).get(HEADER_KEY)


def _read_torch(path: Path, file: BufferedReader, *, mapped: bool, key: str | None) -> tuple[dict[Any, Any], object]:
    """Return the state dict, with unchecked keys and values, and what it has in place of the text of the settings."""
    state_dict = unwrapped_state_dict(path, load_torch_file(file, mapped=mapped), key)
    return state_dict, stored_metadata(state_dict).get(METADATA_KEY)


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


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    if isinstance(error, RefusedError):
        kind = _kind_of_archive(path) if "torch.save does not write" in str(error) else None
        refused = f"was refused: {printable(error)}; download or write it again"
        return CheckpointError(f"{path} {f'is not a checkpoint: it is {kind}' if kind else refused}")
    text = str(error)
    if wanted := re.search(r"(?:Unsupported (?:global: GLOBAL|class)|unsupported GLOBAL) ([\w.]+)", text):
        return CheckpointError(
            f"{path} contains code or objects other than tensors ({wanted[1]}), which could run anything, so it is not "
            "read; where it was made, save only the weights: torch.save(model.state_dict(), path)"
        )
    if "TorchScript" in text:
        return CheckpointError(
            f"{path} is a TorchScript program, not a state dict; "
            "save one with torch.save(torch.jit.load(path).state_dict(), other_path)"
        )
    if "Unsupported operand" in text and zipfile.is_zipfile(path):
        return CheckpointError(
            f"{path} has a newer pickle protocol than PyTorch reads without running code; where it was made, save it "
            "with the default: torch.save(model.state_dict(), path)"
        )
    if "Unsupported operand" in text or "Invalid magic number" in text:
        return CheckpointError(
            f"{path} is a pickle that torch.save did not write, and reading it could run code; where you trust it, "
            "convert it: torch.save(pickle.load(open(path, 'rb')), other_path), with tensors as values"
        )
    reason = printable(re.split(r"\. |\n", text.rpartition("WeightsUnpickler error:")[2].strip())[0][:200])
    fault = f"is damaged, or was not written by torch.save or safetensors ({reason or type(error).__name__})"
    if _is_truncated_zip(path):
        fault = "is incomplete: it ends before its zip directory, as after an interrupted download or copy"
    return CheckpointError(f"{path} {fault}; download or write it again")


def _is_truncated_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04" and not zipfile.is_zipfile(file)


def _kind_of_archive(path: Path) -> str | None:
    """Return what a zip archive is that torch.save did not write, and the way out; None if it may be its own."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        return None
    if any("/data/weights/" in name for name in names):
        return "a torch.export program; save its weights: torch.save(torch.export.load(path).state_dict, other_path)"
    if "model.weights.h5" in names:
        return f"a Keras model; {_SAVE_STATE_DICT}"
    if any(name.endswith((".pth", ".pt", ".bin", ".safetensors")) for name in names):
        return "a zip archive with a checkpoint in it: unpack it first"
    return None


# Files that save_pretrained of Hugging Face's libraries, timm, and accelerate write into a folder.
_USUAL_NAMES = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
_TAR_MAGIC = slice(257, 262)
_SAVE_STATE_DICT = "save the weights as a state dict: torch.save(model.state_dict(), path)"
_OTHER_FORMATS = {
    b"\x89HDF\r\n": f"an HDF5 file, as Keras writes; {_SAVE_STATE_DICT}",
    b"GGUF": f"a GGUF file; {_SAVE_STATE_DICT}",
    b"\x1f\x8b": "compressed with gzip: unpack it first",
    b"\x93NUMPY": f"one NumPy array; {_SAVE_STATE_DICT}",
    b"\x08": f"perhaps an ONNX model; {_SAVE_STATE_DICT}",
}


def _guess(start: bytes) -> str:
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the file itself with git lfs pull"
    if start[_TAR_MAGIC] == b"ustar":
        return "it is a tar archive: unpack it first"
    for beginning, what in _OTHER_FORMATS.items():
        if start.startswith(beginning):
            return f"it is {what}"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start):
        return "it is a text file"
    return "neither torch.save nor safetensors wrote it"
