"""What is wrong with a file that cannot be read as a checkpoint: truncated, damaged, refused, or of another format."""

from __future__ import annotations

import codecs
import pickletools
import re
import zipfile
from contextlib import suppress
from pathlib import Path

from ..errors import CheckpointError
from ..support.file_limits import RefusedError
from ..support.text import printable

# Files that bn-insert finetune writes into a folder, and save_pretrained of Hugging Face's libraries, timm, accelerate.
_USUAL_NAMES = (
    "best.pth",
    "last.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
_TAR_MAGIC = slice(257, 262)
START = _TAR_MAGIC.stop
_PICKLE_START = 512
_AGAIN = "download or write it again"
_SAVE_STATE_DICT = "save the weights as a state dict: torch.save(model.state_dict(), path)"
_NO_NETWORK = re.compile(r"(builtins|collections|numpy|torch\._utils)\.")
_MARKUP = re.compile(r"\s*<(!doctype html|html|\?xml)", re.IGNORECASE)
_WEB_PAGE = (
    "a web page, which servers send instead of a file to report an error or to ask for a login; open the address it "
    "came from in a browser, and download the file there"
)
_TEXT = f"a text file, perhaps with the error of a download; look into it, and {_AGAIN}"
_OTHER_FORMATS = {
    b"\x89HDF\r\n": f"an HDF5 file, as Keras writes; {_SAVE_STATE_DICT}",
    b"GGUF": f"a GGUF file; {_SAVE_STATE_DICT}",
    b"\x1f\x8b": "compressed with gzip: unpack it first",
    b"\x93NUMPY": f"a NumPy file; {_SAVE_STATE_DICT}",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with git lfs pull",
    b"\x08": f"perhaps an ONNX model; {_SAVE_STATE_DICT}",
}


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """Return the error for a file that is truncated, damaged or refused, or that torch.save did not write."""
    if isinstance(error, RefusedError):
        kind = _kind_of_archive(path) if "torch.save does not write" in str(error) else None
        refused = f"was refused: {printable(error)}; {_AGAIN}"
        return CheckpointError(f"{path} {f'is not a checkpoint: it is {kind}' if kind else refused}")
    text = str(error)
    if wanted := re.search(r"(?:Unsupported (?:global: GLOBAL|class)|unsupported GLOBAL) ([\w.]+)", text):
        return CheckpointError(
            f"{path} contains code or objects other than tensors ({wanted[1]}), which could run anything, so it is not "
            "read; where it was made, save only the weights: torch.save(model.state_dict(), path); or, if you trust "
            "it, read it with torch.load(path, weights_only=False), and save the state dict in it"
        )
    if "TorchScript" in text:
        return CheckpointError(
            f"{path} is a TorchScript program, not a state dict; "
            "save one with torch.save(torch.jit.load(path).state_dict(), other_path)"
        )
    if "Unsupported operand" in text and zipfile.is_zipfile(path):
        return CheckpointError(
            f"{path} has a newer pickle protocol than PyTorch reads without running code; where it was made, save it "
            "with the default: torch.save(model.state_dict(), path); or, if you trust it, convert it: "
            "torch.save(torch.load(path, weights_only=False), other_path)"
        )
    if "Unsupported operand" in text or "Invalid magic number" in text:
        loaded, pickled = "pickle.load(open(path, 'rb'))", _pickled_class(path)
        of = f" of a whole {printable(pickled)}" if pickled else ""
        items = f"{{key: torch.as_tensor(value) for key, value in {loaded}.items()}}"
        return CheckpointError(
            f"{path} is a pickle{of} that torch.save did not write, and reading it could run code; if you trust it, "
            f"convert the state dict in it: torch.save({f'{loaded}.state_dict()' if of else items}, other_path)"
        )
    reason = printable(re.split(r"\. |\n", text.rpartition("WeightsUnpickler error:")[2].strip())[0][:200])
    fault = f"is damaged, or was not written by torch.save or safetensors ({reason or type(error).__name__})"
    if _is_truncated_zip(path):
        fault = "is incomplete: it ends before its zip directory, as after an interrupted download or copy"
    return CheckpointError(f"{path} {fault}; {_AGAIN}")


def _pickled_class(path: Path) -> str | None:
    """Return the class of a pickled object if it is a complete object, such as a network, not a container or tensor."""
    with path.open("rb") as file:
        start = file.read(_PICKLE_START)
    names: list[str] = []
    with suppress(ValueError):  # the pickle is cut off
        for opcode, argument, _ in pickletools.genops(start):
            if opcode.name in {"GLOBAL", "SHORT_BINUNICODE", "BINUNICODE"}:
                names += str(argument).split(" ")
            if opcode.name in {"GLOBAL", "STACK_GLOBAL"}:
                return None if _NO_NETWORK.match(name := ".".join(names)) else name
            if opcode.name not in {"PROTO", "FRAME", "MEMOIZE", "SHORT_BINUNICODE", "BINUNICODE"}:
                return None
    return None


def _is_truncated_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04" and not zipfile.is_zipfile(file)


def _kind_of_archive(path: Path) -> str | None:
    """Say what an archive is that torch.save did not write, and what to do; None if torch.save may have written it."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.rpartition("/")[2].lower() == "data.pkl" for name in names):
        return None
    if any("/data/weights/" in name for name in names):
        return "a torch.export program; save its weights: torch.save(torch.export.load(path).state_dict, other_path)"
    if "model.weights.h5" in names:
        return f"a Keras model; {_SAVE_STATE_DICT}"
    if any(name.endswith((".pth", ".pt", ".bin", ".safetensors")) for name in names):
        return "a zip archive with a checkpoint in it: unpack it first"
    return "a zip archive without one in it; pass the file of a checkpoint"


def file_in(folder: Path) -> str:
    """Suggest which file in a folder to pass."""
    try:
        names = {file.name for file in folder.iterdir()}
    except OSError:
        names = set()
    if ".metadata" in names and any(name.endswith(".distcp") for name in names):
        return (
            "it has the parts of a distributed checkpoint, which PyTorch can merge into one file: "
            "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"
        )
    found = next((name for name in _USUAL_NAMES if name in names), None)
    return f"name the file in it: {folder / found}" if found else "name a file in it"


def guess(start: bytes) -> str:
    """Say, from its first `START` bytes, what a file is that is not a checkpoint, and what to do."""
    if not start:
        return f"it is empty; {_AGAIN}"
    if not any(start):
        return f"it begins with zeros, as after an interrupted download; {_AGAIN}"
    if start[_TAR_MAGIC] == b"ustar":
        return "it is a tar archive: unpack it first"
    for beginning, what in _OTHER_FORMATS.items():
        if start.startswith(beginning):
            return f"it is {what}"
    if (text := _text(start)) is None:
        return f"neither torch.save nor safetensors wrote it; {_SAVE_STATE_DICT}"
    return f"it is {_WEB_PAGE if _MARKUP.match(text) else _TEXT}"


def _text(start: bytes) -> str | None:
    """Return the beginning of a text file; None for another file."""
    encoding = "utf-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(start)  # the last character may be cut off
    except UnicodeDecodeError:
        return None
    return text if all(character >= " " or character in "\t\n\r" for character in text) else None
