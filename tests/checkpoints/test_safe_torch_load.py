"""A few bytes of pickle that ask for more than the file can justify, and files that must go on being read."""

import pickle
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bn_insert import CheckpointError, load_checkpoint
from bn_insert.errors import ImageError
from bn_insert.images.tensor_batches import tensor_batches
from bn_insert.support.file_limits import RefusedError
from bn_insert.support.safe_torch_load import load_torch_file

MANY = b"\x8a\x08" + struct.pack("<q", 10**12)  # a number of 8 bytes
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x00zX\x03\x00\x00\x00cpu" + MANY

# By what is asked for: opcodes, and words of the refusal.
BOMBS = {
    "a byte array of a terabyte": (b"c__builtin__\nbytearray\n" + MANY + b"\x85R", "calls __builtin__.bytearray"),
    "a tensor of terabytes": (b"ctorch\nFloatTensor\n" + MANY + b"\x85R", "calls torch.FloatTensor"),
    "a storage of terabytes": (b"ctorch.storage\nUntypedStorage\n" + MANY + b"\x85R", "calls torch.storage.Untyped"),
    "a stored tensor of terabytes": (STORAGE + b"NtQ", "claims to contain 1,000,000,000,000 values"),
    "a key whose hash visits 2**200 values": (
        b"}K\x01q\xc8" + b"h\xc8\x86q\xc8" * 200 + b"K\x01s",
        "refers to shared values so often",
    ),
    "a key nested so deep that its hash overflows the stack": (b"})" + b"\x85" * 100_000 + b"K\x01s", "500 deep"),
    "a text of a terabyte": (b"\x8e" + struct.pack("<Q", 1 << 40), "announces 1,099,511,627,776 bytes"),
}


BOMBS["text that an encoding expands"] = (
    b"c_codecs\nencode\nX\x04\x00\x00\x00abcdX\x05\x00\x00\x00utf32\x86R",
    "calls _codecs.encode, as torch.save never does",
)
BOMBS["a text encoded ever again"] = (
    b"]c_codecs\nencode\nq\xc7X" + struct.pack("<I", 20_000) + b"a" * 20_000 + b"X\x06\x00\x00\x00latin1\x86q\xc8"
    b"0" + b"h\xc7h\xc8Ra" * 30_000,
    "refers to shared values so often",
)
BOMBS["a terabyte through another function"] = (
    b"ctorch._tensor\n_rebuild_from_type_v2\n(c__builtin__\nbytearray\nctorch\nTensor\n" + MANY + b"\x85}tR",
    "calls __builtin__.bytearray",
)
BOMBS["a quantized tensor of terabytes"] = (
    b"ctorch._utils\n_rebuild_qtensor\n(NK\x00" + MANY + b"\x85K\x01\x85NNNtR",
    "claims a quantized tensor",
)


def in_archive(path: Path, opcodes: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + opcodes + b".")
        archive.writestr("x/version", b"3\n")


def in_old_format(path: Path, opcodes: bytes) -> None:
    torch.save({}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(pickle.dumps({}, 2), b"\x80\x02" + opcodes + b".", 1))


def in_front_of_an_archive(path: Path, opcodes: bytes) -> None:
    """A file that zip readers take for an archive, by its end, and torch.load for the old format, by its beginning."""
    in_old_format(path, opcodes)
    archive = path.with_suffix(".zip")
    torch.save({}, archive)
    path.write_bytes(path.read_bytes() + archive.read_bytes())


@pytest.mark.parametrize("write", [in_archive, in_old_format, in_front_of_an_archive])
@pytest.mark.parametrize("wanted", BOMBS)
def test_a_file_that_asks_for_the_impossible_is_refused_with_the_reason(
    wanted: str, write: Callable[[Path, bytes], None], tmp_path: Path
) -> None:
    opcodes, words = BOMBS[wanted]
    write(tmp_path / "x.pt", opcodes)
    with (tmp_path / "x.pt").open("rb") as file, pytest.raises(RefusedError, match=words):
        load_torch_file(file)
    with pytest.raises(CheckpointError, match=rf"x.pt was refused: .*{words}"):
        load_checkpoint(tmp_path / "x.pt")
    with pytest.raises(ImageError, match=rf"x.pt .*{words}"):
        tensor_batches(tmp_path / "x.pt")


BOMB = b"\x80\x02c__builtin__\nbytearray\n" + MANY + b"\x85R."
SOUND = pickle.dumps({}, 2)


def directory_of(whole: bytes) -> tuple[bytes, bytes, bytes]:
    """Split an archive into its members, its directory, and the record at its end."""
    *_, length, offset = struct.unpack("<4xHHHHII", whole[-22:-2])
    return whole[:offset], whole[offset : offset + length], whole[-22:]


def two_directories(path: Path) -> None:
    """The record at the end gives the place of one directory, and another one is directly before the record."""
    parts = []
    for content in (BOMB, SOUND):
        in_archive(path, content[2:-1])
        parts.append(directory_of(path.read_bytes()))
    (bomb, hidden, _), (sound, shown, end) = parts
    moved = bytearray(shown)
    for place in [match.start() for match in re.finditer(b"PK\x01\x02", shown)]:
        (offset,) = struct.unpack_from("<I", shown, place + 42)
        struct.pack_into("<I", moved, place + 42, offset + len(bomb))
    size = max(len(hidden), len(shown))
    record = end[:12] + struct.pack("<II", size, len(bomb) + len(sound)) + end[20:]
    path.write_bytes(bomb + sound + hidden.ljust(size, b"\0") + bytes(moved).ljust(size, b"\0") + record)


def members(path: Path, *named: tuple[str, bytes]) -> None:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")
        for name, content in (*named, ("x/version", b"3\n")):
            archive.writestr(name, content)


AMBIGUOUS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a name in other case": (lambda path: members(path, ("x/Data.pkl", BOMB)), "has a member 'x/Data.pkl'"),
    "the same name twice": (
        lambda path: members(path, ("x/data.pkl", SOUND), ("x/data.pkl", BOMB)),
        "two of its members have the same name",
    ),
    "another folder": (lambda path: members(path, ("x/data.pkl", SOUND), ("y/data.pkl", BOMB)), "has a member 'y/"),
    "two directories": (two_directories, "directory in a different place"),
    "a comment at its end": (
        lambda path: (in_archive(path, b"}"), path.write_bytes(path.read_bytes()[:-2] + b"\x04\0more"))[0],
        "does not end where the file ends",
    ),
    "bytes after its end": (
        lambda path: (in_archive(path, b"}"), path.write_bytes(path.read_bytes() + b"more"))[0],
        "does not end where the file ends",
    ),
}


@pytest.mark.parametrize("kind", AMBIGUOUS)
def test_an_archive_that_readers_could_take_in_two_ways_is_refused(kind: str, tmp_path: Path) -> None:
    write, words = AMBIGUOUS[kind]
    write(tmp_path / "x.pt")
    with (tmp_path / "x.pt").open("rb") as file, pytest.raises(RefusedError, match=words):
        load_torch_file(file)
    with pytest.raises(CheckpointError, match=rf"x.pt was refused: .*{words}"):
        load_checkpoint(tmp_path / "x.pt")


def test_thousands_of_small_tensors_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:  # torch.save would take seconds
        for name in ("data.pkl", *(f"data/{number}" for number in range(20_000))):
            archive.writestr(f"x/{name}", b"")
    with pytest.raises(CheckpointError, match=r"x.pt was refused: it has 20,00\d members"):
        load_checkpoint(tmp_path / "x.pt")


def deep(levels: int) -> list[Any]:
    return [deep(levels - 1)] if levels else []


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": OrderedDict(a=torch.ones(2)), "betas": [(0.9, 0.999)] * 5000, "seed": 2**63, "epoch": 10**15},
        {str(number): torch.ones(1, dtype=torch.float64) for number in range(200)},
        [torch.ones(3, 4)[:, ::2], torch.nn.Parameter(torch.ones(2)), torch.tensor(1), torch.float16, torch.Size([2])],
        {"nested": deep(100), "bytes": b"abc", "text": "ü" * 1000, "none": None, "set": {1, 2}},
    ],
    ids=["training state", "hundreds of tensors", "kinds of tensors", "containers"],
)
def test_what_torch_save_writes_is_read(content: Any, new: bool, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    with (tmp_path / "x.pt").open("rb") as file:
        assert repr(load_torch_file(file)) == repr(content)


def test_a_compressed_tensor_file_is_unpacked_and_not_taken_for_its_values(tmp_path: Path) -> None:
    values = torch.randn(8, 3, 5, 4)
    torch.save(values, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    (batch,) = tensor_batches(tmp_path / "small.pt")
    assert torch.equal(batch.images, values)


def test_a_header_of_thousands_of_brackets_gets_one_short_line(tmp_path: Path) -> None:
    header = b"(" * 5000 + b"\n"
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header)
    with pytest.raises(ImageError, match=r"x.npy is damaged, or not a .npy file \(") as caught:
        tensor_batches(tmp_path / "x.npy")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
