"""Calibration shared by several processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bn_insert.demo import images_path, network_path

# One thread each: PyTorch's kernels add up in another order with another number of threads.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
AS_IT_IS = ("--resize", "0", "--crop", "0", "--mean", "0", "--std", "1", "-j", "0", "--device", "cpu")


def run(folder: Path, ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments in `ranks` processes, as torchrun does, or in one."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120
    )


def insert(folder: Path, ranks: int, output: str, *options: object) -> dict[str, Tensor]:
    arguments = ("insert", network_path(), images_path(), "-o", output, *AS_IT_IS, *options)
    done = run(folder, ranks, "-m", "cli", *arguments)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / output)


def test_the_written_file_is_that_of_one_process_within_one_float_step(tmp_path: Path) -> None:
    alone = insert(tmp_path, 1, "alone.pth", "--images", 100, "-b", 16)
    shared = insert(tmp_path, 2, "shared.pth", "--images", 100, "-b", 16)
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
    done = run(tmp_path, 2, "-m", "cli", "insert", network_path(), "x.pt", "-o", "out.pth", "-b", 16, "--device", "cpu")
    assert done.returncode != 0
    assert "failed: x.pt (32 x 3 x 32 x 32) holds nan" in done.stderr
    assert not list(tmp_path.glob("out*"))


API = """
import sys, torch, torch.distributed as dist
from bn_insert import calibrate, find_sites, insert_batchnorm, load_checkpoint
from bn_insert.demo import network_path

dist.init_process_group("gloo")
rank = dist.get_rank()
model = load_checkpoint(network_path())
x = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
own = {0: [x[:16], x[16:32]], 1: [x[32:48], x[48:]], 2: []}[rank]
result = insert_batchnorm(model, own)
torch.save(result.state_dict(), f"rank{rank}.pth")
sites = find_sites(model, x)
torch.save({name: (m.count, m.mean, m.m2) for name, m in calibrate(model, sites, own).items()}, f"moments{rank}.pth")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def api_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    (folder / "script.py").write_text(API)
    done = run(folder, 3, "script.py")
    assert done.returncode == 0, done.stderr
    return folder


def test_every_rank_gets_the_same_model_from_the_api(api_run: Path) -> None:
    first, *others = (torch.load(api_run / f"rank{rank}.pth") for rank in range(3))
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in first)


def test_statistics_of_uneven_parts_one_of_them_empty_equal_one_process_within_1e_12(
    api_run: Path, tmp_path: Path
) -> None:
    alone = API.replace('dist.init_process_group("gloo")\nrank = dist.get_rank()', "rank = 0")
    alone = alone.replace("[x[:16], x[16:32]], 1", "list(x.split(16)), 1").replace("dist.destroy_process_group()", "")
    (tmp_path / "script.py").write_text(alone)
    done = run(tmp_path, 1, "script.py")
    assert done.returncode == 0, done.stderr
    expected, found = torch.load(tmp_path / "moments0.pth"), torch.load(api_run / "moments2.pth")
    for name, (count, mean, m2) in expected.items():
        assert found[name][0] == count
        torch.testing.assert_close(found[name][1], mean, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(found[name][2], m2, rtol=1e-12, atol=1e-15)
