"""Settings in a file beside a .pth, as older versions of bn-insert wrote them, are still read."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bn_insert.checkpoints.load_network import load_checkpoint
from bn_insert.checkpoints.read_file import read_checkpoint
from bn_insert.checkpoints.save import save_checkpoint
from bn_insert.checkpoints.settings import Settings
from bn_insert.errors import CheckpointError
from support.vgg_specs import Conv, Dense, Spec, vgg_of

SPEC = Spec((Conv(norm="before"), Conv(5, pool=True), Conv(6, norm="after")), (Dense(norm="before"),))


def refusal_of(action: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as refusal:
        action()
    return str(refusal.value)


def document_of(model: nn.Module, **changes: object) -> dict[str, Any]:
    return Settings.of(model).to_document() | changes


def old_checkpoint(folder: Path, name: str = "vgg.pth", **changes: object) -> Path:
    """Write the two files that an older bn-insert wrote."""
    vgg, path = vgg_of(SPEC), folder / name
    torch.save(dict(vgg.state_dict()), path)
    path.with_suffix(".json").write_text(json.dumps(document_of(vgg, **changes)))
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("name", ["vgg.pth", "vgg.pt", "vgg.bin"])
def test_settings_beside_a_checkpoint_are_applied(name: str, mmap: bool, tmp_path: Path) -> None:
    path = old_checkpoint(tmp_path, name, transform={"resize": 32})
    checkpoint = read_checkpoint(path, mmap=mmap)
    assert checkpoint.settings_place == str(tmp_path / "vgg.json")
    assert checkpoint.settings is not None
    assert checkpoint.settings.transform == {"resize": 32}
    assert repr(load_checkpoint(path, mmap=mmap)) == repr(vgg_of(SPEC))


def test_they_are_found_through_a_link(tmp_path: Path) -> None:
    path = old_checkpoint(tmp_path)
    (tmp_path / "latest.pth").symlink_to(path)
    assert repr(load_checkpoint(tmp_path / "latest.pth")) == repr(vgg_of(SPEC))


def test_settings_in_the_file_come_first_and_the_sidecar_stays(tmp_path: Path) -> None:
    path = old_checkpoint(tmp_path)
    before = (tmp_path / "vgg.json").read_bytes()
    new = vgg_of(SPEC, seed=1)
    new.features[1].eps = 0.25
    save_checkpoint(new, path, overwrite=True)
    assert load_checkpoint(path).features[1].eps == 0.25
    (tmp_path / "vgg.json").write_text("{")
    assert load_checkpoint(path).features[1].eps == 0.25
    (tmp_path / "vgg.json").write_bytes(before)
    save_checkpoint(nn.Linear(2, 2), path, overwrite=True)  # without any layer that settings name
    assert read_checkpoint(path).settings == Settings()
    assert (tmp_path / "vgg.json").read_bytes() == before


def test_a_safetensors_file_has_no_sidecar(tmp_path: Path) -> None:
    path = old_checkpoint(tmp_path)
    save_checkpoint(vgg_of(SPEC), tmp_path / "vgg.safetensors")
    path.unlink()
    (tmp_path / "vgg.json").write_text("{")
    assert load_checkpoint(tmp_path / "vgg.safetensors").features[1].eps == vgg_of(SPEC).features[1].eps


# A kill between the three steps in which older versions replaced the two files


def test_killed_before_the_checkpoint_was_replaced_its_old_settings_hold(tmp_path: Path) -> None:
    path = old_checkpoint(tmp_path)
    old, new = vgg_of(SPEC), vgg_of(SPEC)
    new.features[1].eps = 0.25
    replaced = {"sha256": sha256(path), "settings": document_of(old)}
    (tmp_path / "vgg.json").write_text(json.dumps(document_of(new, replaces=replaced)))
    assert repr(load_checkpoint(path)) == repr(old)
    replaced["settings"] = None  # the old one had none
    (tmp_path / "vgg.json").write_text(json.dumps(document_of(new, replaces=replaced)))
    assert read_checkpoint(path).settings is None


@pytest.mark.parametrize("replaced", [{"sha256": "0" * 64, "settings": {"format": "bn-insert"}}, {}])
def test_killed_after_the_checkpoint_was_replaced_its_new_settings_hold(
    replaced: dict[str, Any], tmp_path: Path
) -> None:
    path = old_checkpoint(tmp_path, replaces=replaced)
    assert repr(load_checkpoint(path)) == repr(vgg_of(SPEC))


# Damaged and foreign files


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"version": 5}, 'the field "version" is 5, and this version of bn-insert reads versions 1 to 4'),
        (
            {"batchnorm": {"features.1": {"eps": -1e-5}}},
            "batchnorm.features.1.eps is wrong: expected float >= 0.0, got -1e-05",
        ),
        ({"batch_norm": {}}, "unknown field batch_norm"),
        ({"replaces": 3}, "the field replaces is wrong: expected object, got int"),
        (
            {"replaces": {"sha256": "", "settings": 3}},
            "the field replaces.settings is wrong: expected object | null, got int",
        ),
    ],
)
def test_damaged_settings_are_told_with_file_and_field(changes: dict[str, Any], fragment: str, tmp_path: Path) -> None:
    path = old_checkpoint(tmp_path, **changes)
    message = refusal_of(lambda: load_checkpoint(path))
    assert message.startswith(f"{tmp_path / 'vgg.json'}: ")
    assert fragment in message
    assert "correct the file, or delete it to read vgg.pth with PyTorch's defaults" in message
    assert refusal_of(lambda: read_checkpoint(path).settings) == message


@pytest.mark.parametrize("text", [b'{"format": "bn-insert",', b"\xff\xfe", b"[" * 100_000, b"", b"9" * 5000])
def test_a_settings_file_that_is_no_json_is_told(text: bytes, tmp_path: Path) -> None:
    path = old_checkpoint(tmp_path)
    (tmp_path / "vgg.json").write_bytes(text)
    assert "vgg.json: invalid JSON" in refusal_of(lambda: load_checkpoint(path))


def test_settings_of_another_checkpoint_are_told(tmp_path: Path) -> None:
    path = old_checkpoint(tmp_path, batchnorm={"features.9": {}})
    message = refusal_of(lambda: load_checkpoint(path))
    assert f"the settings in {tmp_path / 'vgg.json'} belong to another checkpoint" in message


@pytest.mark.parametrize("text", ['{"format": "other"}', "[1, 2]", "3", '{"features.0": "conv"}'])
def test_foreign_json_beside_a_checkpoint_is_passed_over(text: str, tmp_path: Path) -> None:
    path = old_checkpoint(tmp_path)
    (tmp_path / "vgg.json").write_text(text)
    assert read_checkpoint(path).settings is None
    assert load_checkpoint(path).features[1].eps == 1e-5


def test_a_folder_or_a_huge_file_with_the_name_of_the_settings_is_passed_over(tmp_path: Path) -> None:
    path = old_checkpoint(tmp_path)
    (tmp_path / "vgg.json").unlink()
    (tmp_path / "vgg.json").mkdir()
    assert read_checkpoint(path).settings is None
    (tmp_path / "vgg.json").rmdir()
    (tmp_path / "vgg.json").touch()
    os.truncate(tmp_path / "vgg.json", 1 << 40)
    assert read_checkpoint(path).settings is None


def test_settings_by_hand_may_hold_the_transform_alone(tmp_path: Path) -> None:
    path = old_checkpoint(tmp_path)
    (tmp_path / "vgg.json").write_text('{"format": "bn-insert", "version": 1, "transform": {"resize": 32}}')
    assert read_checkpoint(path).settings == Settings(transform={"resize": 32})
    assert load_checkpoint(path).features[1].eps == 1e-5


def test_an_old_checkpoint_that_was_trained_on_and_saved_over_keeps_its_settings(tmp_path: Path) -> None:
    path = old_checkpoint(tmp_path)
    torch.save(vgg_of(SPEC, seed=1).state_dict(), path)
    assert load_checkpoint(path).features[1].eps == vgg_of(SPEC).features[1].eps
