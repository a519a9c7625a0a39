"""From a checkpoint file to its state dict: tensors only, no code, whatever the file holds."""

from __future__ import annotations

import re
import stat
import warnings
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import CheckpointError
from ..support.text import printable
from ..support.torch_file import RefusedError, check_expansion, load_torch_file

FileKind = Literal["zip", "pickle", "safetensors"]

PREFIXES = ("module.", "model.", "_orig_mod.")
WRAPPERS = ("state_dict", "model", "model_state_dict", "model_ema")


def read_state_dict(path: Path, *, mmap: bool = False) -> dict[str, Tensor]:
    """Return the tensors of a .pth, .pt, .bin or .safetensors file, by key, on the CPU.

    mmap: map the file into memory instead of reading it, where its format allows; safetensors are always mapped.

    The format is told by the content.  A dict under one of WRAPPERS is taken out of its wrapper; keys stay as they are.
    Tensors may share memory with each other or with the file: copy what is kept.
    Raises CheckpointError for everything else, and no code from the file is ever run.
    """
    kind = file_kind(path)
    try:
        with warnings.catch_warnings():
            # How a stranger's file was written (old pickle protocols, typed storages) is not the reader's concern.
            warnings.simplefilter("ignore")
            content: object = _read_safetensors(path) if kind == "safetensors" else load_torch_file(path, mapped=mmap)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a parser raises on a damaged file is one fact to us
        raise _unreadable(path, error) from error
    return _checked(path, _unwrapped(path, content))


def file_kind(path: Path) -> FileKind:
    """Return the format that a file's first bytes show; raises CheckpointError if it is none that we read."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise CheckpointError(f"{path} is a folder, not a checkpoint file; name a file in it")
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is no regular file; copy its content to one")
        with path.open("rb") as file:
            start = file.read(64)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from error
    # Behind the eight bytes of the header's length, which may look like anything, so this comes first: a zip archive
    # and torch.save's older format have other bytes there.
    if start[8:9] == b"{":
        return "safetensors"
    if start.startswith(b"PK\x03\x04"):
        return "zip"
    if start.startswith(b"\x80"):
        return "pickle"
    raise CheckpointError(f"{path} is no checkpoint: {_guess(start)}")


def read_metadata(path: Path) -> dict[str, str]:
    """Return the text metadata in a safetensors file's header."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except Exception as error:  # as in read_state_dict
        raise _unreadable(path, error) from error


def is_plain(tensor: Tensor) -> bool:
    """Say whether a tensor is dense, with values of its own: not sparse, quantized or on the meta device."""
    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta


def independent(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors on the CPU, contiguous, none of which shares memory with another or with more than its values.

    Those that are so already are taken as they are: copying a VGG's weights takes a second.
    """
    found: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, value in tensors.items():
        tensor = value.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage()
        # A view would drag its whole storage along.
        if storage.nbytes() != tensor.numel() * tensor.element_size() or storage.data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        found[key] = tensor
    return found


def without_prefix(tensors: Mapping[str, Tensor], wanted: Set[str] = frozenset()) -> tuple[str, dict[str, Tensor]]:
    """Return the prefix, maybe stacked, that wrappers such as torch.compile put before all keys, and tensors without.

    wanted: keys of the architecture that the tensors are for, whose own names may begin like that: nothing is taken
    from keys that fit it already.

    >>> tensors = {"module._orig_mod.0.weight": torch.ones(2, 2), "module._orig_mod.0.bias": torch.ones(2)}
    >>> prefix, stripped = without_prefix(tensors)
    >>> prefix, list(stripped)
    ('module._orig_mod.', ['0.weight', '0.bias'])
    """
    # torch's AveragedModel, which keeps moving averages of weights, has one key of its own beside "module.*".
    keys = [key for key in tensors if key != "n_averaged"]
    common = ""
    while keys and not any(key.removeprefix(common) in wanted for key in tensors):
        prefix = next((one for one in PREFIXES if all(key.startswith(common + one) for key in keys)), None)
        if prefix is None:
            break
        common += prefix
    if not common:
        return "", dict(tensors)
    return common, {key.removeprefix(common): tensors[key] for key in keys}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt", device="cpu") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict


def _unwrapped(path: Path, content: object) -> Mapping[object, object]:
    # A pickle can hold a dict that holds itself: more than two layers of wrapping are nobody's checkpoint.
    for _ in range(3):
        if not isinstance(content, Mapping):
            break
        wrapper = next((name for name in WRAPPERS if _holds_tensors(content.get(name))), None)
        if wrapper is None:
            break
        content = content[wrapper]
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds {_described(content)}, not a state dict; write one with torch.save(model.state_dict(), path)"
        )
    return content


def _holds_tensors(value: object) -> bool:
    """Say whether it is a dict with tensors, or with dicts that may have them; a configuration dict has neither."""
    return isinstance(value, Mapping) and any(isinstance(inner, Tensor | Mapping) for inner in value.values())


def _checked(path: Path, content: Mapping[object, object]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for key, value in content.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{path} has a key that is no string, {key!r:.60}: this is no state dict")
        if not isinstance(value, Tensor):
            wrappers = ", ".join(WRAPPERS)
            raise CheckpointError(
                f"{path} has {_described(value)} under {key!r:.60}, where a state dict has a tensor; a state dict in a "
                f"larger dict is looked for under {wrappers}"
            )
        if type(value) not in (Tensor, nn.Parameter) or not is_plain(value) or value.device.type != "cpu":
            raise CheckpointError(
                f"{path} has a tensor under {key!r:.60} that is not plain (sparse, quantized, without values, or of a "
                "class of its own); write it again as an ordinary dense tensor"
            )
        tensors[key] = value.detach()
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors")
    try:
        check_expansion(path, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    except RefusedError as error:
        raise _unreadable(path, error) from error
    return tensors


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    if isinstance(error, RefusedError):
        return CheckpointError(f"{path} is not read: {printable(error)}; fetch or write it again")
    text = str(error)
    if wanted := re.search(r"(?:Unsupported (?:global: GLOBAL|class)|unsupported GLOBAL) ([\w.]+)", text):
        return CheckpointError(
            f"{path} holds code or objects other than tensors ({wanted[1]}), which could run anything, so it is not "
            "read; where it came from, write the weights alone: torch.save(model.state_dict(), path)"
        )
    if "TorchScript" in text:
        return CheckpointError(
            f"{path} is a TorchScript program, not a state dict; "
            "write one with torch.save(torch.jit.load(path).state_dict(), other_path)"
        )
    reason = printable(re.split(r"\. |\n", text.rpartition("WeightsUnpickler error:")[2].strip())[0][:200])
    return CheckpointError(
        f"{path} is damaged, or was not written by torch.save or safetensors ({reason or type(error).__name__}); "
        "fetch or write it again"
    )


def _guess(start: bytes) -> str:
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the file itself with git lfs pull"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start):
        return "it is a text file"
    return "it is neither what torch.save writes nor safetensors"


def _described(value: object) -> str:
    kind = type(value)
    return f"{'an' if kind.__name__[0] in 'aeiou' else 'a'} {kind.__name__}"
