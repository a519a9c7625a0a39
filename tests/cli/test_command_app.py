"""What all commands share: help, bad checkpoints, errors, exit codes, signals, and the installed command."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from pathlib import Path

import pytest
import torch

from bn_insert import BNInsertError
from bn_insert.demo import network_path
from support.commands import AS_STORED, Run, assert_refused, run_process, start_forked, text_of


@pytest.mark.parametrize("command", ["insert", "inspect", "compare", "evaluate", "predict", "demo"])
def test_every_help_has_an_example(run: Run, command: str) -> None:
    assert f"Example: bn-insert {command}" in text_of(run(command, "--help").stdout)


def test_help_does_not_import_torch(tmp_path: Path) -> None:
    script = """
import sys
from bn_insert_cli.app import app
try:
    app(['insert', '--help'])
except SystemExit:
    assert 'torch' not in sys.modules
"""
    done = run_process(sys.executable, "-c", script, folder=tmp_path)
    assert done.returncode == 0, done.stderr


def test_every_error_of_ours_is_one_class() -> None:
    import bn_insert  # noqa: PLC0415

    errors = [getattr(bn_insert, name) for name in bn_insert.__all__ if name.endswith("Error")]
    assert len(errors) > 3
    assert all(issubclass(error, BNInsertError) for error in errors)


def bad_checkpoints(folder: Path) -> dict[str, str]:
    """Make files that are no checkpoints; return what the message must say of each."""
    whole = network_path().read_bytes()
    (folder / "truncated.pth").write_bytes(whole[: len(whole) // 2])
    (folder / "text.pth").write_text("not a checkpoint")
    (folder / "empty.pth").touch()
    torch.save({"conv1.weight": torch.zeros(4, 3, 3, 3)}, folder / "no-vgg.pth")
    (folder / "folder.pth").mkdir()
    return {
        "missing.pth": "missing.pth",
        "truncated.pth": "truncated.pth",
        "text.pth": "text.pth",
        "empty.pth": "empty.pth",
        "no-vgg.pth": "conv1",
        "folder.pth": "folder.pth",
        "vgg12": "vgg12",
    }


@pytest.mark.parametrize("command", ["insert", "inspect", "compare"])
def test_a_bad_checkpoint_gets_one_message_and_exit_code_2(run: Run, digits: Path, command: str) -> None:
    for name, wording in bad_checkpoints(digits.parent).items():
        rest = {"insert": (digits, "-o", "out.pth"), "compare": (network_path(), digits), "inspect": ()}[command]
        assert_refused(run(command, name, *rest), "error:", wording)
    assert not Path("out.pth").exists()


class Payload:
    """A pickle that runs code when it is read."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


def test_code_in_a_pickle_is_never_run(run: Run, digits: Path) -> None:
    Path("evil.pth").write_bytes(pickle.dumps({"features.0.weight": Payload()}, protocol=2))
    torch.save({"state_dict": Payload()}, "evil-zip.pth")
    for name in ("evil.pth", "evil-zip.pth"):
        assert_refused(run("insert", name, digits, "-o", "out.pth", *AS_STORED), name)
    assert not Path("executed").exists()


# Runs the command line, and prints a line when the first layer runs.
ANNOUNCING = """
import torch
from bn_insert_cli.app import main

def announce(*_):
    handle.remove()
    print("running", flush=True)

handle = torch.nn.modules.module.register_module_forward_pre_hook(announce)
main()
"""


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_from_outside_leaves_nothing_behind(tmp_path: Path, stop: signal.Signals, code: int) -> None:
    torch.save(torch.zeros(5000, 3, 32, 32), tmp_path / "x.pt")
    command = ("insert", network_path(), "x.pt", "-o", "out.pth", "--images", 1000000, "-b", 2)
    process = start_forked("-c", ANNOUNCING, *command, folder=tmp_path)
    assert process.stdout.readline() == "running\n"
    process.send_signal(stop)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]
