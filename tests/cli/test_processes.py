"""Calibration shared by several processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bn_insert import calibrate, find_sites, insert_batchnorm, load_checkpoint, recalibrate
from bn_insert.demo import images_path, network_path
from bn_insert_cli.app import app

pytestmark = pytest.mark.usefixtures("one_thread")

# One thread each: PyTorch's kernels add up in another order with another number of threads.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
AS_IT_IS = ("--resize", "0", "--crop", "0", "--mean", "0", "--std", "1", "-j", "0", "--device", "cpu")
INSERT = ("insert", network_path(), images_path(), *AS_IT_IS)


def run(folder: Path, ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments in `ranks` processes, as torchrun does."""
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", str(ranks))
    command = [sys.executable, *launcher, *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120
    )


def test_the_written_file_is_that_of_one_process_within_one_float_step(tmp_path: Path) -> None:
    # A batch of 16 for the first process, 4 for the second, none for the third.
    options = (*INSERT, "-b", 16, "--images", 20)
    assert CliRunner().invoke(app, [*map(str, options), "-o", str(tmp_path / "alone.pth")]).exit_code == 0
    done = run(tmp_path, 3, "-m", "bn_insert", *options, "-o", "shared.pth")
    assert done.returncode == 0, done.stderr
    alone, shared = (torch.load(tmp_path / name) for name in ("alone.pth", "shared.pth"))
    assert alone.keys() == shared.keys()
    for key, expected in alone.items():
        up = (
            torch.nextafter(expected, torch.full_like(expected, torch.inf))
            if expected.is_floating_point()
            else expected
        )
        down = torch.nextafter(expected, -torch.full_like(expected, torch.inf)) if up is not expected else expected
        assert ((shared[key] >= down) & (shared[key] <= up)).all(), key


def test_a_failing_process_stops_all_with_its_message_and_no_file_appears(tmp_path: Path) -> None:
    torch.save(torch.rand(32, 3, 32, 32).index_fill(0, torch.tensor(20), torch.nan), tmp_path / "x.pt")
    done = run(
        tmp_path, 2, "-m", "bn_insert", "insert", network_path(), "x.pt", "-o", "out.pth", "-b", 16, "--device", "cpu"
    )
    assert done.returncode != 0
    assert "failed: x.pt (32 x 3 x 32 x 32) holds nan" in done.stderr
    assert not list(tmp_path.glob("out*"))


API = """
import sys, torch, torch.distributed as dist
from bn_insert import calibrate, find_sites, insert_batchnorm, load_checkpoint, recalibrate
from bn_insert.demo import network_path

dist.init_process_group("gloo")
rank = dist.get_rank()
model = load_checkpoint(network_path())
x = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
own = {0: [x[:16], x[16:32]], 1: [x[32:48], x[48:]], 2: []}[rank]
result = insert_batchnorm(model, own)
torch.save(result.state_dict(), f"rank{rank}.pth")
torch.save(recalibrate(result, [each + 1 for each in own], earlier="running").state_dict(), f"recalibrated{rank}.pth")
sites = find_sites(model, x)
torch.save({name: (m.count, m.mean, m.m2) for name, m in calibrate(model, sites, own).items()}, f"moments{rank}.pth")
dist.destroy_process_group()
"""


def test_ranks_with_uneven_parts_one_of_them_empty_get_one_processs_statistics_and_all_the_same_model(
    tmp_path: Path,
) -> None:
    (tmp_path / "script.py").write_text(API)
    done = run(tmp_path, 3, "script.py")
    assert done.returncode == 0, done.stderr
    first, *others = (torch.load(tmp_path / f"rank{rank}.pth") for rank in range(3))
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in first)

    model = load_checkpoint(network_path())
    x = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = calibrate(model, find_sites(model, x), x.split(16))
    found = torch.load(tmp_path / "moments2.pth")  # of the rank without images
    assert found.keys() == expected.keys()
    for name, moments in expected.items():
        assert found[name][0] == moments.count
        torch.testing.assert_close(found[name][1], moments.mean, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(found[name][2], moments.m2, rtol=1e-12, atol=1e-15)

    inserted = insert_batchnorm(model, x.split(16))
    inserted.load_state_dict(first)
    recalibrated = recalibrate(inserted, (x + 1).split(16), earlier="running").state_dict()
    first, *others = (torch.load(tmp_path / f"recalibrated{rank}.pth") for rank in range(3))
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in first)
    assert first.keys() == recalibrated.keys()
    for key, tensor in recalibrated.items():  # running statistics within a float step, everything else equal
        torch.testing.assert_close(first[key], tensor, rtol=2e-7 if "running_" in key else 0, atol=0)
        assert "num_batches_tracked" not in key or tensor == 4
