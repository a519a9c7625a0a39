"""Checkpoints in several files: the parts that a large one is divided into, and the index that lists them.

Read on its own, the first part of a VGG is a shorter VGG. Parts are therefore refused, with a message that contains the
code to merge them. A part is recognized by its name, by an index, or by a file next to it whose name differs only in
the number and which has none of its keys.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..errors import CheckpointError
from ..support.text import listed, printable

_NUMBER = r"(?P<number>\d{1,9})(?P<after>[-_. ]*of[-_. ]*(?P<total>\d{1,9})(?P<rest>(\D.*)?))"
# "model-00001-of-00002", as Hugging Face's libraries write, or "part 1 of 2".
_PART = re.compile(
    rf"(?P<before>.*?(?:(?<![a-z])(?:part|shard)[-_. ]*|(?<!\d)(?=\d{{5}}-of-\d{{5}}(?!\d)))){_NUMBER}", re.IGNORECASE
)
# Whole networks are numbered in any other way: "fold-1-of-5.pth", "epoch_30_of_90.pth", "client_1_of_10.pth". So may
# parts be: "model-1-of-2.pth".
_COUNTED = re.compile(rf"(?P<before>.*?(?<!\d)){_NUMBER}", re.IGNORECASE)
# Hugging Face's libraries may put the precision into the name: model.safetensors.index.fp16.json.
_INDEX = re.compile(r"(?P<whole>.+)\.index(\.[\w-]+)?\.json", re.IGNORECASE)
_MAX_INDEX_BYTES = 1 << 22  # 200 for each tensor of the largest checkpoint that is read
_MAX_INDICES = 16
_MOST_ENTRIES = 10_000  # of a folder, which may have millions
_NAMES_SHOWN = 4


@dataclass(frozen=True)
class _Parts:
    """The parts of a checkpoint.

    Attributes:
        paths: Code that returns the paths of the parts.
        module: The module that this code needs.
        merged: Where to write the checkpoint in one file.
        missing: Which parts are missing, in words; empty if none is.
    """

    paths: str
    module: str
    merged: Path
    missing: str

    def advice(self, *, is_safetensors: bool) -> str:
        """Return, in words and code, how to merge the parts into one file."""
        module, load, save = "torch", "torch.load(part, map_location='cpu')", "torch.save"
        if is_safetensors:
            module = "safetensors.torch"
            load, save = f"{module}.load_file(part)", f"{module}.save_file"
        first = f"put {self.missing} beside it, and " * bool(self.missing)
        # Whole networks that only look like parts have keys in common.
        code = (
            f"import {self.module}, {module}; parts = [{load} for part in {self.paths}]; "
            "tensors = {key: value for part in parts for key, value in part.items()}; "
            "assert len(tensors) == sum(map(len, parts)), 'the files have keys in common, so they are not parts'; "
            f"{save}(tensors, {_quoted(self.merged)})"
        )
        return f"{first}merge the parts into one file, in Python: {code}"


def check_is_no_index(path: Path) -> None:
    """Raise CheckpointError for a file that lists the parts of a checkpoint; the message says how to merge them."""
    if (found := _INDEX.fullmatch(path.name)) is None or not (names := _names_in(path)):
        return
    if len(names) == 1:
        only = printable(path.parent / names[0])
        raise CheckpointError(f"{path} is the index of a checkpoint; name the file in it: {only}")
    is_safetensors = found["whole"].lower().endswith("safetensors")
    advice = _listed_parts(path, names).advice(is_safetensors=is_safetensors)
    raise CheckpointError(f"{path} is the index of a checkpoint in parts; {advice}")


def check_is_whole(
    path: Path, keys: Collection[str], keys_of: Callable[[Path], Collection[str]], *, is_safetensors: bool
) -> None:
    """Raise CheckpointError for a part of a checkpoint, which its name or the files beside it show.

    Args:
        path: An existing file.
        keys: Those of its tensors.
        keys_of: Returns those of another file, or raises CheckpointError.
        is_safetensors: Whether the file is in this format, not in that of torch.save.
    """
    for index in _indices_in(path.parent):
        if path.name in (names := _names_in(index, path.name)) and len(names) > 1:
            advice = _listed_parts(index, names).advice(is_safetensors=is_safetensors)
            raise CheckpointError(f"{path} is one of {len(names)} parts of a checkpoint, listed in {index}; {advice}")
    if (found := _PART.fullmatch(path.name) or _COUNTED.fullmatch(path.name)) is None:
        return
    number, total = int(found["number"]), int(found["total"])
    if not number <= total > 1:
        return
    shown_by = "its name"
    if found.re is _COUNTED:
        if (other := _other_part(path, found, keys, keys_of)) is None:
            return
        shown_by = f"its name and {printable(other.name)} beside it, which has other keys"
    raise CheckpointError(
        f"{path} is part {number} of {total} of a checkpoint, by {shown_by} (if it is a whole one, rename it); "
        f"{_numbered_parts(path, found).advice(is_safetensors=is_safetensors)}"
    )


def _other_part(
    path: Path, found: re.Match[str], keys: Collection[str], keys_of: Callable[[Path], Collection[str]]
) -> Path | None:
    """Return the first file whose name differs from that of a part only in the number, if it has none of its keys."""
    others = (Path(name) for name in sorted(glob.glob(str(_pattern(path, found)))))  # noqa: PTH207 - as in the message
    other = next((other for other in others if other.name != path.name), None)
    with suppress(CheckpointError):
        if other and not _without_wrapper(keys) & _without_wrapper(keys_of(other)):
            return other
    return None


def _without_wrapper(keys: Collection[str]) -> set[str]:
    """Return keys without the prefix of DistributedDataParallel, which one of two whole networks may have."""
    return {key.removeprefix("module.") for key in keys}


def _indices_in(folder: Path) -> list[Path]:
    with suppress(OSError), os.scandir(folder) as entries:
        names = sorted(entry.name for entry in islice(entries, _MOST_ENTRIES) if _INDEX.fullmatch(entry.name))
        return [folder / name for name in names[:_MAX_INDICES]]
    return []


def _names_in(index: Path, name: str | None = None) -> list[str]:
    """Return the names of the files that an index lists; none if it does not have a name, or is something else."""
    with suppress(OSError, ValueError, RecursionError):
        if index.is_file() and index.stat().st_size <= _MAX_INDEX_BYTES:
            text = index.read_bytes()
            # Indices of other checkpoints in the folder are not worth parsing.
            if name and not any(json.dumps(name, ensure_ascii=each).encode() in text for each in (True, False)):
                return []
            document = json.loads(text)
            files = document.get("weight_map") if isinstance(document, dict) else None
            if isinstance(files, dict):
                return sorted({each for each in files.values() if isinstance(each, str)})
    return []


def _listed_parts(index: Path, names: Sequence[str]) -> _Parts:
    """Return the parts that an index lists."""
    listing = f"set(json.load(open({_quoted(index)}))['weight_map'].values())"
    missing = [name for name in names if not os.path.exists(index.parent / name)]  # noqa: PTH110 - it takes any name
    whole = Path(_INDEX.sub(r"\g<whole>", index.name))
    return _Parts(
        f"[{_quoted(index.parent)} + '/' + name for name in {listing}]",
        "json",
        index.with_name(f"{whole.stem}-merged{whole.suffix}"),
        printable(listed(missing, _NAMES_SHOWN)),
    )


def _numbered_parts(path: Path, found: re.Match[str]) -> _Parts:
    """Return the parts whose names differ from that of a part only in the number."""
    pattern = _pattern(path, found)
    missing = int(found["total"]) - len(glob.glob(str(pattern)))  # noqa: PTH207 - as in the code of the message
    return _Parts(
        f"glob.glob({_quoted(pattern)})",
        "glob",
        path.with_name(f"{found['before'].rstrip('-_. ') or 'checkpoint'}-merged{found['rest']}"),
        "" if missing <= 0 else "the other part" if missing == 1 else f"the other {missing} parts",
    )


def _pattern(path: Path, found: re.Match[str]) -> Path:
    """Return the pattern with which `glob.glob` finds all parts, from the name of one."""
    name = f"{glob.escape(found['before'])}[0-9]*{glob.escape(found['after'])}"
    return Path(glob.escape(str(path.parent))) / name


def _quoted(path: Path) -> str:
    """Return a path as code."""
    return repr(str(path))
