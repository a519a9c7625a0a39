"""Calibration shared by several processes."""

from pathlib import Path

import pytest
import torch

from bn_insert import calibrate, find_sites, insert_batchnorm, load_checkpoint, recalibrate
from bn_insert.demo import images_path, network_path
from support.commands import AS_STORED, forked_ranks, run

pytestmark = pytest.mark.usefixtures("one_thread")

INSERT = ("insert", network_path(), images_path(), *AS_STORED, "--device", "cpu")


def test_the_written_file_is_that_of_one_process_within_one_float_step(tmp_path: Path) -> None:
    # A batch of 16 for the first process, 4 for the second, none for the third.
    options = (*INSERT, "-b", 16, "--images", 20)
    assert run(*options, "-o", tmp_path / "alone.pth").exit_code == 0
    done = forked_ranks(3, "-m", "bn_insert", *options, "-o", "shared.pth", folder=tmp_path)
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
    command = ("insert", network_path(), "x.pt", "-o", "out.pth", "-b", 16, "--device", "cpu")
    done = forked_ranks(2, "-m", "bn_insert", *command, folder=tmp_path)
    assert done.returncode == 2, "both processes fail, and neither waits for the other"
    assert "failed: x.pt (32 x 3 x 32 x 32) contains nan" in done.stderr
    assert not list(tmp_path.glob("out*"))


def assert_within_a_float_step(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=3e-7, atol=1e-9, msg=key)


def test_adapt_writes_the_file_of_one_process_within_a_float_step(tmp_path: Path) -> None:
    x = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.save(x, tmp_path / "source.pt")
    torch.save(0.3 * x[:24], tmp_path / "target.pt")
    command = ("adapt", network_path(), tmp_path / "source.pt", tmp_path / "target.pt", "--device", "cpu", "-b", 16)
    command = (*command, "--keep-batchnorm")  # after folding, a step of a statistic is several of a weight
    assert run(*command, "-o", tmp_path / "alone.pth").exit_code == 0
    done = forked_ranks(2, "-m", "bn_insert", *command, "-o", "shared.pth", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_within_a_float_step(*(torch.load(tmp_path / name) for name in ("shared.pth", "alone.pth")))


IN_STEP = """
import torch, torch.distributed as dist
from bn_insert import CalibrationError, adapt_statistics, load_checkpoint
from bn_insert.demo import images_path, network_path
from bn_insert.images import Transform, open_batches

dist.init_process_group("gloo")
rank = dist.get_rank()
model = load_checkpoint(network_path())
batches = open_batches(images_path(), Transform(resize=None, crop=None, mean=(0.0,), std=(1.0,)), batch_size=32)
digits = torch.cat([batch.images for batch in batches])[torch.randperm(360, generator=torch.Generator().manual_seed(0))]
source, faded = digits.split(16), 0.24 + 0.2 * digits[:45]
for name, sizes in {"small": [5] * 9, "mixed": [16, 16, 8, 5], "single": [1] * 5}.items():
    target = faded[: sum(sizes)].split(sizes)
    adapted = adapt_statistics(model, source[rank::2], target[rank::2], keep_batchnorm=True)
    torch.save(adapted.state_dict(), f"{name}{rank}.pth")
broken = [each.clone() for each in faded.split(5)]
broken[3][:] = torch.nan  # on the second rank
for wrong in (broken, [*faded.split(5)[:7], None]):
    try:
        adapt_statistics(model, source[rank::2], wrong[rank::2])
    except CalibrationError as error:
        print(f"rank {rank}: {error}")
dist.destroy_process_group()
if rank == 0:
    for name, sizes in {"small": [5] * 9, "mixed": [16, 16, 8, 5], "single": [1] * 5}.items():
        adapted = adapt_statistics(model, source, faded[: sum(sizes)].split(sizes), keep_batchnorm=True)
        torch.save(adapted.state_dict(), f"{name}.pth")
"""


def test_small_batches_are_adapted_to_in_the_order_of_one_process_and_an_error_on_one_rank_ends_all(
    tmp_path: Path,
) -> None:
    (tmp_path / "script.py").write_text(IN_STEP)
    done = forked_ranks(2, "script.py", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("small", "mixed", "single"):
        alone, *shared = (torch.load(tmp_path / f"{name}{rank}.pth") for rank in ("", 0, 1))
        for each in shared:
            assert_within_a_float_step(each, alone)
    assert "rank 0: target: rank 1 failed: the activations of features.0 are not finite" in done.stdout
    assert "rank 1: target: the activations of features.0 are not finite" in done.stdout
    assert "rank 0: target: rank 1 failed: batch 3 is None;" in done.stdout
    assert "rank 1: target: batch 3 is None;" in done.stdout


ALONE = """
import time, torch, torch.distributed as dist
from datetime import timedelta
from bn_insert import CalibrationError, insert_batchnorm, recalibrate
from bn_insert.support import processes

processes._LONGEST_WAIT = timedelta(seconds=0.2)
dist.init_process_group("gloo")
if dist.get_rank() == 0:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    for function in (insert_batchnorm, recalibrate):
        try:
            function(model, [torch.rand(8, 4)])
        except CalibrationError as error:
            print(error)
dist.barrier()
dist.destroy_process_group()
"""


def test_inserting_on_one_rank_alone_is_an_error_that_says_so_and_leaves_the_group_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(ALONE)
    done = forked_ranks(2, "script.py", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for function in ("insert_batchnorm", "recalibrate"):
        assert f"{function} was called on 1 of 2 ranks (this is rank 0), and waited 0 s for the others." in done.stdout


API = """
import sys, torch, torch.distributed as dist
from bn_insert import adapt_statistics, calibrate, find_sites, insert_batchnorm, load_checkpoint, recalibrate
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
adapt_statistics(model, own, [each / 4 for each in own], progress=lambda images: print("rank", rank, "at", images))
dist.destroy_process_group()
"""


def test_ranks_with_uneven_parts_one_of_them_empty_get_one_processs_statistics_and_all_the_same_model(
    tmp_path: Path,
) -> None:
    (tmp_path / "script.py").write_text(API)
    done = forked_ranks(3, "script.py", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for rank, images in ((0, (16, 32, 48, 64)), (1, (16, 32, 48, 64)), (2, ())):
        assert [int(line.split()[-1]) for line in done.stdout.splitlines() if f"rank {rank} at" in line] == [*images]
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
