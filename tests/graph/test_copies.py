"""Copies of models with code of their own: models are left as they are, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from bn_insert import (
    BNInsertError,
    CalibrationError,
    GraphError,
    adapt_statistics,
    compare_outputs,
    equalize,
    find_edges,
    find_sites,
    fold_batchnorm,
    insert,
    insert_batchnorm,
    inserted_batchnorms,
    load_checkpoint,
    recalibrate,
    save_checkpoint,
    train_mode_agreement,
)
from bn_insert.graph.copies import protected_passes, working_copy

WRITES: dict[str, Callable[[nn.Module], object]] = {
    "in place": lambda layer: layer.weight.mul_(1.5),
    "by .data": lambda layer: layer.weight.data.clamp_(-0.01, 0.01),
    "to a view": lambda layer: layer.weight[0].zero_(),
    "by an index": lambda layer: layer.weight.data.__setitem__(0, 0.0),
    "by out=": lambda layer: torch.mul(layer.weight, 2, out=layer.weight),
    "by copy_": lambda layer: layer.bias.copy_(layer.bias + 1),
    "by foreach": lambda layer: torch._foreach_mul_([layer.weight, layer.bias], 2.0),
}


class Writing(nn.Module):
    def __init__(self, write: Callable[[nn.Module], object]) -> None:
        super().__init__()
        self.c, self.norm, self.d = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.write(self.c)
        return self.d(self.norm(self.c(x)).relu()).relu().mean((2, 3))


def calls(model: nn.Module, x: Tensor) -> dict[str, Callable[[], Any]]:
    return {
        "insert_batchnorm": lambda: insert_batchnorm(model, [x]),
        "recalibrate": lambda: recalibrate(model, [x]),
        "compare_outputs": lambda: compare_outputs(model, model, [x]),
        "train_mode_agreement": lambda: train_mode_agreement(model, [x], (4,)),
    }


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("call", ["insert_batchnorm", "recalibrate", "compare_outputs", "train_mode_agreement"])
def test_a_model_that_writes_to_its_parameters_is_refused_and_unchanged(write: str, call: str) -> None:
    model = Writing(WRITES[write]).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BNInsertError, match=r"changes its parameter c\.(weight|bias) in place|cannot trace Writing"):
        calls(model, torch.rand(8, 3, 8, 8))[call]()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_model_that_writes_to_its_parameters_is_refused_in_the_first_pass() -> None:
    model = Writing(WRITES["in place"]).eval()
    before = model.c.weight.detach().clone()
    drawn = 0

    def batches() -> Iterator[Tensor]:
        nonlocal drawn
        for _ in range(4):
            assert torch.equal(model.c.weight, before)
            drawn += 1
            yield torch.rand(8, 3, 8, 8)

    with pytest.raises(BNInsertError, match=r"changes its parameter c\.weight in place"):
        recalibrate(model, batches())
    assert drawn < 4


@pytest.mark.parametrize("write", WRITES)
def test_parameters_written_to_in_a_later_pass_are_restored_and_named(write: str) -> None:
    layer = nn.Conv2d(3, 4, 3)
    before = copy.deepcopy(layer.state_dict())
    with (
        pytest.raises(BNInsertError, match=r"forward of Conv2d changes its parameter (weight|bias) in place, so"),
        torch.no_grad(),
        protected_passes(layer) as protection,
    ):
        with protection():
            layer(torch.zeros(1, 3, 4, 4))
        with protection():
            WRITES[write](layer)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_each_pass_of_a_large_network_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bn_insert.graph.copies._BYTES_TO_COPY", 0)
    layer = nn.Conv2d(3, 4, 3)
    with torch.no_grad(), protected_passes(layer) as protection:
        for _ in range(2):
            with protection(), pytest.raises(BNInsertError, match=r"changes its parameter weight in place \(aten"):
                layer.weight.mul_(2)


def test_parameters_that_are_not_numbers_are_no_change() -> None:
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, torch.nan)
    with protected_passes(layer) as protection, protection():
        pass


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()


def test_threads_that_insert_at_once_all_succeed() -> None:
    models = [small() for _ in range(8)]
    inputs = [torch.rand(4, 3, 10 + number, 10) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda model, x: insert_batchnorm(model, [x], include_output=True), models, inputs))
    assert all(torch.equal(result(x), model(x)) for result, model, x in zip(results, models, inputs, strict=True))


@pytest.mark.parametrize("name", ["insert_batchnorm", "fold_batchnorm", "recalibrate"])
def test_a_result_made_in_inference_mode_can_be_trained(name: str) -> None:
    x = torch.rand(4, 3, 10, 10)
    with torch.inference_mode():
        model = small()
        made = {
            "insert_batchnorm": lambda: insert_batchnorm(model, [x], include_output=True),
            "fold_batchnorm": lambda: fold_batchnorm(model, x),
            "recalibrate": lambda: recalibrate(model, [x]),
        }[name]()
    assert not any(value.is_inference() for value in made.state_dict().values())
    made.train()(x).sum().backward()
    torch.optim.SGD(made.parameters(), 0.1).step()


def test_a_model_that_assigns_new_values_is_run_and_unchanged() -> None:
    def assign(layer: nn.Module) -> None:
        layer.weight.data = layer.weight.data.clamp(-0.1, 0.1)

    model = Writing(assign).eval()
    before = copy.deepcopy(model.state_dict())
    assert compare_outputs(model, model, [torch.rand(8, 3, 8, 8)]).bit_identical
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class MergesForEvaluation(nn.Linear):
    """A LoRA layer: in eval mode its weight contains the low-rank part."""

    merged = False

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__(features, outputs)
        self.a, self.b = nn.Parameter(torch.rand(2, features)), nn.Parameter(torch.rand(outputs, 2))

    def train(self, mode: bool = True) -> MergesForEvaluation:
        super().train(mode)
        if self.merged is mode:
            self.weight.data += (self.b @ self.a) * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.merged else y + x @ self.a.T @ self.b.T


@pytest.mark.parametrize("training", [True, False])
def test_a_model_that_merges_weights_for_evaluation_is_left_alone(training: bool) -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), MergesForEvaluation(64, 6), nn.ReLU(), nn.Linear(6, 2)]
    model, x = nn.Sequential(*layers).train(training), torch.rand(8, 3, 6, 6)
    before, expected = copy.deepcopy(model.state_dict()), copy.deepcopy(model).eval()(x)
    result = insert_batchnorm(model, [x])
    assert compare_outputs(model, result, [x]).bit_identical
    recalibrate(result, [x])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(result.eval()(x), expected)


class BuildsForEvaluation(nn.Module):
    """A RepVGG block: in eval mode one conv stands for the sum of two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.merged = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), None

    def train(self, mode: bool = True) -> BuildsForEvaluation:
        super().train(mode)
        self.merged = None if mode else nn.Conv2d(3, 8, 1).requires_grad_(False)
        if self.merged is not None:
            self.merged.weight.copy_((self.first.weight + self.second.weight).detach())
            self.merged.bias.copy_((self.first.bias + self.second.bias).detach())
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x) if self.merged is None else self.merged(x)  # type: ignore[no-any-return]


def test_a_model_that_builds_layers_for_evaluation_is_inserted_into_once_it_has_them() -> None:
    model, x = nn.Sequential(BuildsForEvaluation(), nn.ReLU(), nn.Conv2d(8, 3, 1)), torch.rand(4, 3, 6, 6)
    message = (
        r"^Sequential builds modules when it is switched to eval mode \(0\.merged\), .* call model\.eval\(\) first$"
    )
    for call in (lambda: insert_batchnorm(model, [x]), lambda: find_sites(model, x)):
        with pytest.raises(GraphError, match=message):
            call()
    assert model.training and model[0].merged is None
    assert [site.name for site in find_sites(model.eval(), x)] == ["0.merged"]


class BuildsInForward(nn.Module):
    """Builds a layer once it knows the number of channels of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv: nn.Module | None = None
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Any:
        if self.conv is None:
            self.conv = nn.Conv2d(x.shape[1], 8, 1)
        return self.head(self.conv(x).relu())


def test_a_model_that_builds_layers_in_its_first_pass_is_inserted_into_once_it_has_them() -> None:
    model, x = BuildsInForward().eval(), torch.rand(4, 3, 6, 6)
    message = r"^BuildsInForward builds layers in its first forward pass \(conv\); call it once on a batch first"
    for call in (lambda: insert_batchnorm(model, [x]), lambda: find_sites(model, x)):
        with pytest.raises(GraphError, match=message):
            call()
    assert model.conv is None
    expected = model(x)
    result = insert_batchnorm(model, [x])
    assert inserted_batchnorms(result) == ["conv.1"]
    assert torch.equal(result(x), expected)  # the conv is in train mode, and its BatchNorm in eval mode as the model


def test_a_train_method_that_returns_nothing_does_not_matter() -> None:
    class Frozen(nn.Sequential):
        def train(self, mode: bool = True) -> None:  # type: ignore[override]
            super().train(mode)
            self[0].eval()

    model, x = Frozen(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.rand(2, 3, 6, 6)
    assert compare_outputs(model, insert_batchnorm(model, [x], include_output=True), [x]).bit_identical
    assert working_copy(model, training=True).training


@pytest.mark.parametrize("keep", [lambda kept, y: kept.append(y), lambda kept, y: kept.append({"low": (y,)})])
def test_a_model_may_keep_outputs_that_have_gradients(keep: Callable[[list[Any], Tensor], object]) -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.d, self.kept = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), list[Any]()

        def forward(self, x: Tensor) -> Tensor:
            y = self.c(x).relu()
            keep(self.kept, y)
            return self.d(y)

    model, x = Keeping(), torch.rand(2, 3, 6, 6)
    model(x).sum().backward()
    result = insert_batchnorm(model, [x])
    assert compare_outputs(model, result, [x]).bit_identical
    result(x).sum().backward()
    assert compare_outputs(model, recalibrate(result, [x]), [x]).images == 2
    assert len(model.kept) == 1


def test_what_cannot_be_copied_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    model[0].lock = Lock()
    message = (
        r"^Sequential cannot be copied: cannot pickle '_thread.lock' object \(attribute 0.lock\); remove it, or give"
    )
    for call in (lambda: insert_batchnorm(model, [torch.rand(2, 3, 6, 6)]), lambda: compare_outputs(model, model, [])):
        with pytest.raises(GraphError, match=message):
            call()


class FrozenTeacher(nn.Module):
    """Is never copied, as some networks with a frozen part are written."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTeacher:
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()  # type: ignore[no-any-return]


def test_a_module_that_copies_share_is_named_and_unchanged() -> None:
    model = nn.Sequential(FrozenTeacher(), nn.Conv2d(4, 4, 3), nn.ReLU())
    before = list(model.state_dict())
    message = r"^Sequential cannot be copied: a copy shares 0 \(FrozenTeacher\) with it, .* let it return a new module"
    for call in (lambda: insert_batchnorm(model, [torch.rand(2, 3, 8, 8)]), lambda: compare_outputs(model, model, [])):
        with pytest.raises(GraphError, match=message):
            call()
    assert list(model.state_dict()) == before
    assert model[0].training


def test_a_model_made_in_inference_mode_is_inserted_into_outside_of_it() -> None:
    x = torch.rand(4, 3, 10, 10)
    with torch.inference_mode():
        model = small()
    result = insert_batchnorm(model, [x], include_output=True)
    assert not any(value.is_inference() for value in result.state_dict().values())
    assert compare_outputs(model, result, [x]).bit_identical
    recalibrate(result, [x]).train()(x).sum().backward()
    assert [type(module) for module in fold_batchnorm(result, x)] == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU]


def test_a_layer_whose_weight_and_bias_are_buffers_gets_a_batchnorm(tmp_path: Path) -> None:
    model, x = small().double(), torch.rand(4, 3, 10, 10, dtype=torch.float64)

    def frozen() -> nn.Module:
        copied = copy.deepcopy(model)
        for name in ("weight", "bias"):
            tensor = getattr(copied[0], name).detach()
            delattr(copied[0], name)
            copied[0].register_buffer(name, tensor)
        return copied

    result = insert_batchnorm(frozen(), [x])
    assert isinstance(result[1], nn.BatchNorm2d) and result[1].weight.dtype == torch.float64
    assert compare_outputs(model, result, [x]).bit_identical
    save_checkpoint(result, tmp_path / "frozen.pth")
    assert compare_outputs(load_checkpoint(tmp_path / "frozen.pth", model=frozen), result, [x]).bit_identical


def test_a_parameter_made_of_several_tensors_is_no_obstacle() -> None:
    model, x = small(), torch.rand(4, 3, 10, 10)
    expected = insert_batchnorm(model, [x], include_output=True)
    weight = model[2].weight.detach()
    model[2].weight = nn.Parameter(TwoTensor(weight, weight.clone()))
    result = insert_batchnorm(model, [x], include_output=True)
    assert type(result[3].weight) is TwoTensor
    assert result.state_dict().keys() == expected.state_dict().keys()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning", "ignore:.*is deprecated")
@pytest.mark.filterwarnings("ignore:no BatchNorm was inserted after layers that are not modules of torch.nn")
def test_the_parameters_of_a_scripted_part_are_trained_in_the_copy_alone() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.frozen = (torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU())) for _ in range(2))
            for parameter in self.frozen.parameters():
                parameter.requires_grad_(False)
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Any:
            return self.head(self.conv(self.frozen(self.stem(x))).relu().mean((2, 3)))

    model = Partly().eval()
    result = insert_batchnorm(model, [torch.rand(8, 3, 16, 16)])
    parameters = dict(result.named_parameters())
    torch.optim.SGD(parameters.values(), lr=0.1)
    result(torch.rand(8, 3, 16, 16)).sum().backward()
    assert {name for name, parameter in parameters.items() if parameter.grad is None} == {
        "frozen.0.weight",
        "frozen.0.bias",
    }
    assert all(parameter.grad is None for parameter in model.parameters())


class Small(nn.Sequential):
    def __init__(self) -> None:
        layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten())
        super().__init__(*layers, nn.Linear(8 * 16, 4))
        self.eval()


def scaled(model: nn.Module, x: Tensor) -> object:
    insertion = insert(Small(), [x])
    return equalize(model, find_edges(model, x, insertion.sites), insertion.moments)


NEED_VALUES: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "insert_batchnorm": lambda model, x: insert_batchnorm(model, [x]),
    "equalize": scaled,
    "fold_batchnorm": fold_batchnorm,
    "recalibrate": lambda model, x: recalibrate(model, [x]),
    "adapt_statistics": lambda model, x: adapt_statistics(model, [x], [x]),
    "adapt_statistics without a source": lambda model, x: adapt_statistics(model, None, [x], keep_batchnorm=True),
    "compare_outputs, reference": lambda model, x: compare_outputs(model, Small(), [x]),
    "compare_outputs, candidate": lambda model, x: compare_outputs(Small(), model, [x]),
}


@pytest.mark.parametrize("call", NEED_VALUES)
def test_a_model_on_the_meta_device_is_refused_with_the_way_to_values_where_they_are_needed(call: str) -> None:
    x = torch.rand(4, 3, 8, 8)
    with torch.device("meta"):
        model = Small()
    message = r"^Small is on the meta device \(0\.weight has no data\); build it on the"
    with pytest.raises(GraphError, match=message):
        NEED_VALUES[call](model, x)
    assert [site.name for site in find_sites(model, x)] == ["3"]  # needs none
    model.to_empty(device="cpu").load_state_dict(Small().state_dict())
    NEED_VALUES[call](model, x)


def reading_values(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else x * 2


def writing_values(x: Tensor) -> Tensor:
    return x * float(f"{x.mean():.1f}")


class Reading(Small):
    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.read(x))


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (
            Small,
            (4, 1, 8, 8),
            r"^Small cannot run on an input of shape \(4, 1, 8, 8\): .* Pass inputs of the shape that",
        ),
        (lambda: Reading(reading_values), (4, 3, 8, 8), r"^Reading is on the meta device \(0\.weight has no data"),
        (lambda: Reading(writing_values), (4, 3, 8, 8), r"^Reading is on the meta device \(0\.weight has no data"),
    ],
)
def test_the_meta_device_is_named_as_the_cause_only_where_a_forward_reads_values(
    model: Callable[[], nn.Module], shape: tuple[int, ...], message: str
) -> None:
    with torch.device("meta"):
        network = model()
    with pytest.raises(GraphError, match=message):
        find_sites(network, torch.rand(shape))


def test_a_batch_on_the_meta_device_is_refused_for_a_model_that_is_not_and_taken_for_one_that_is() -> None:
    x = torch.rand(4, 3, 8, 8, device="meta")
    for function in (find_sites, lambda model, batch: insert(model, [batch])):
        with pytest.raises(CalibrationError, match=r"^batch 0 is on the meta device, .* torch\.zeros\(4, 3, 8, 8\)$"):
            function(Small(), x)
    assert [site.name for site in find_sites(Small().to("meta"), x)] == ["3"]
