"""Which inputs a network takes, found by running a copy of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from bn_insert_cli.input_shapes import image_shape, input_shape, runs_on


def network(*before: nn.Module, channels: int = 3, width: int = 4) -> nn.Sequential:
    """Return a network whose first conv takes `channels` after other modules."""
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*before, nn.Conv2d(channels, width, 3), nn.ReLU(), pool, nn.Flatten(), nn.Linear(width, 2))


class Gray(nn.Module):
    """Converts colors to gray, with weights that are no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.tensor([0.3, 0.6, 0.1])

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weights[:, None, None]).sum(1, keepdim=True)


class Coordinates(nn.Module):
    """Adds two channels with coordinates, which it stores."""

    def __init__(self) -> None:
        super().__init__()
        self.stored: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.stored is None or self.stored.shape[-2:] != x.shape[-2:]:
            rows, columns = (torch.linspace(-1, 1, size, device=x.device) for size in x.shape[-2:])
            self.stored = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
        return torch.cat([x, self.stored.expand(len(x), -1, -1, -1)], 1)


class CutUp(nn.Module):
    """Takes any number of values for images of one size."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, 1, 28, 28)


@dataclass
class Scores:
    scores: Tensor


class Hidden:
    """Has a tensor where none can find it."""

    __slots__ = ("scores",)

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores


class Returned(nn.Module):
    """Returns an object with the scores."""

    def __init__(self, kind: Any, before: nn.Module) -> None:
        super().__init__()
        self.kind, self.network = kind, network(before, channels=1)

    def forward(self, x: Tensor) -> Any:
        return self.kind(scores=self.network(x))


class InPairs(nn.Module):
    """Takes even batches alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, -1, *x.shape[1:]).flip(0).view(x.shape)


ROWS: dict[int, Tensor] = {}


@lru_cache
def columns(size: int, device: torch.device) -> Tensor:
    return torch.linspace(-1, 1, size, device=device)


class Cached(nn.Module):
    """Keeps tensors in a dict of the file, in a class attribute and in a cached function."""

    means: ClassVar[Tensor | None] = None

    def forward(self, x: Tensor) -> Tensor:
        if Cached.means is None:
            Cached.means = x.new_tensor([0.4, 0.5, 0.6])[:, None, None]
        rows, size = x.shape[-2:]
        ROWS.setdefault(rows, torch.linspace(-1, 1, rows, device=x.device))
        return x - Cached.means + ROWS[rows][:, None] + columns(size, torch.device("cpu")).to(x.device)


class Noisy(nn.Module):
    """Draws random numbers in each mode."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class Uncopied(nn.Module):
    """Cannot be copied."""

    def __deepcopy__(self, _: Any) -> Any:
        raise TypeError

    def forward(self, x: Tensor) -> Tensor:
        return x


class Decided(nn.Module):
    """Decides by values."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if x.mean() > 0 else x


class ByName(nn.Conv2d):
    def forward(self, *, images: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(images)


class Late(nn.Module):
    """Declares its first conv after another one."""

    def __init__(self, kind: type[nn.Module], channels: int) -> None:
        super().__init__()
        options: Any = {"kernel_size": 1}
        self.last, self.first = kind(8, 2, **options), kind(channels, 8, **options)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.first(x))
        return result


NETWORKS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "colors": (network(), (3, 224, 224)),
    "gray": (network(channels=1), (1, 224, 224)),
    "colors to gray": (network(Gray(), channels=1), (3, 224, 224)),
    "coordinates": (network(Coordinates(), channels=5), (3, 224, 224)),
    "gray with coordinates": (network(Coordinates()), (1, 224, 224)),
    "unshuffled pixels": (network(nn.PixelUnshuffle(2), channels=12), (3, 224, 224)),
    "many channels": (network(channels=12), (12, 224, 224)),
    "cut up": (network(CutUp(), channels=1), (1, 28, 28)),
    "cut up, of as many classes as inputs": (nn.Sequential(CutUp(), *network(channels=1, width=2)), (1, 28, 28)),
    "cut up, of 23 classes": (nn.Sequential(CutUp(), *network(channels=1)[:4], nn.Linear(4, 23)), (1, 28, 28)),
    "cut up, with scores in an object": (Returned(SimpleNamespace, CutUp()), (1, 28, 28)),
    "cut up, with scores in a dataclass": (Returned(Scores, CutUp()), (1, 28, 28)),
    "cut up, with hidden scores": (Returned(Hidden, CutUp()), (1, 224, 224)),
    "in pairs": (network(InPairs()), (3, 224, 224)),
    "not copied": (network(Uncopied(), channels=12), (12, 224, 224)),
    "colors to gray, decided by values": (network(Gray(), Decided(), channels=1), (3, 224, 224)),
    "decided by values": (network(Decided(), channels=12), (12, 224, 224)),
    "by name": (ByName(3, 4, 3), (3, 224, 224)),
    "half": (network().half(), (3, 224, 224)),
    "late": (Late(nn.Conv2d, 3), (3, 224, 224)),
    "late, many channels": (Late(nn.Conv2d, 5), (5, 224, 224)),
    "late signals": (Late(nn.Conv1d, 2), (2, 224)),
    "late volumes": (Late(nn.Conv3d, 1), (1, 16, 16, 16)),
    "features": (nn.Sequential(nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 2)), (64,)),  # also runs on 3 x 64 x 64
    "flattened": (nn.Sequential(nn.Flatten(), nn.Linear(3 * 40 * 40, 5)), (3, 40, 40)),
    "flattened gray": (nn.Sequential(nn.Flatten(), nn.Linear(784, 5)), (1, 28, 28)),
    "dense before conv": (nn.Sequential(nn.Linear(48, 32), nn.Unflatten(1, (2, 4, 4)), nn.Conv2d(2, 3, 3)), (48,)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_shape_of_an_input_is_the_most_probable_one_that_the_network_runs_on(name: str) -> None:
    model, shape = NETWORKS[name]
    assert input_shape(model.eval()) == shape


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_a_network_with_the_older_weight_norm_is_run_too() -> None:
    model = Late(nn.Conv1d, 2)
    nn.utils.weight_norm(model.first)
    assert input_shape(model) == (2, 224)


def test_a_side_and_the_shape_that_a_checkpoint_stores_come_first() -> None:
    model = network(Gray(), channels=1)
    assert input_shape(model, image_side=40) == (3, 40, 40)
    assert input_shape(model, 20, image_side=40) == (3, 20, 20)
    assert input_shape(model, image_side=40, stored=(1, 9, 8)) == (1, 9, 8)
    assert input_shape(model, 20, stored=(1, 9, 8)) == (1, 20, 20)
    fixed = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Flatten(), nn.Linear(1024, 2))
    assert input_shape(fixed, image_side=224) == (3, 32, 32)  # where a default says 224
    assert input_shape(fixed, 20) == (3, 20, 20)  # asked for: the command then says that it does not run


def test_images_for_a_network_that_takes_features_are_read_in_color() -> None:
    assert image_shape(NETWORKS["features"][0], 40) == (3, 40, 40)
    assert image_shape(NETWORKS["flattened gray"][0], 40) == (1, 28, 28)


def test_a_network_runs_on_what_it_takes_and_is_left_as_it_is() -> None:
    model = network(Coordinates(), channels=5)
    model.train()
    before = copy.deepcopy(model.state_dict())
    runs = runs_on(model)
    assert runs((3, 9, 8))
    assert not runs((4, 9, 8))
    assert not runs((3, 2, 2))
    assert not runs((9, 8))
    assert model[0].stored is None
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not runs_on(nn.Bilinear(3, 3, 2))((3,))


def test_a_network_that_keeps_tensors_outside_of_its_modules_runs_afterwards() -> None:
    model = network(Cached()).eval()
    assert input_shape(model, image_side=32) == (3, 32, 32)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


def test_random_numbers_are_drawn_as_without_the_runs() -> None:
    model = network(Noisy())
    state = torch.get_rng_state()
    assert input_shape(model, image_side=32) == (3, 32, 32)
    assert torch.equal(torch.get_rng_state(), state)


def test_volumes_take_no_time_also_where_a_forward_is_not_of_pytorch() -> None:
    assert runs_on(nn.Sequential(Noisy(), nn.Conv3d(3, 64, 3)))((3, 4000, 4000, 4000))
