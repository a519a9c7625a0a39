"""Networks that torch.export cannot trace, and that run: the graph of one run shows where a BatchNorm can go."""

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bn_insert import GraphError, compare_outputs, find_sites, fold, insert, insert_batchnorm, survey
from bn_insert.graph import trace
from bn_insert.graph.compiled import uncompiled
from bn_insert.graph.sites import SiteOptions, layers_in
from bn_insert.graph.trace import Trace
from support.architectures import ARCHITECTURES, made
from support.networks import images, randomised


@dataclass
class Outputs:
    logits: Tensor
    features: Tensor | None = None


class Task(Enum):
    LABEL = "label"


class Result:
    def __init__(self, logits: Tensor) -> None:
        self.logits, self.again = logits, self


class ByAttribute(OrderedDict[str, Tensor]):
    """As the outputs of Hugging Face's transformers."""


class Network(nn.Module):
    """Three convs and a dense layer; what happens in between and to the output is up to functions."""

    def __init__(self, between: Callable[..., Any] | None = None, at_end: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.between, self.at_end = between, at_end
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = self.between(self, x) if self.between else x
        x = self.head(F.relu(self.conv3(x)).mean((2, 3)))
        return self.at_end(x) if self.at_end else x


def by_numpy(_: nn.Module, x: Tensor) -> Tensor:
    return x * float(x.detach().numpy().mean())


def from_data(network: Any, x: Tensor) -> Tensor:
    weight = network.conv2.weight.data
    return x * (weight / weight.norm()).sum()


def of_plain_type(_: nn.Module, x: Tensor) -> Tensor:
    if type(x) is not Tensor:
        raise TypeError("a tensor is expected")
    return x


BETWEEN = [by_numpy, from_data, of_plain_type]
AT_END = [Outputs, Result, lambda x: ByAttribute(logits=x)]


@pytest.mark.parametrize(
    "model",
    [
        *(lambda each=each: Network(each) for each in BETWEEN),
        *(lambda each=each: Network(None, each) for each in AT_END),
    ],
    ids=[each.__name__ for each in BETWEEN] + ["dataclass", "object", "subclass of OrderedDict"],
)
def test_a_network_that_cannot_be_exported_is_inserted_into_but_neither_equalized_nor_folded(
    model: Callable[[], nn.Module],
) -> None:
    network, x = randomised(model()), images(4, 12)
    insertion = insert(network, [x, images(4, 12, seed=3)], equalize=True)
    assert [site.name for site in insertion.sites] == ["conv1", "conv2", "conv3"]
    assert {layer.name: layer.reason for layer in insertion.layers if not layer.site} == {"head": "output layer"}
    assert [moments.count for moments in insertion.moments.values()] == [8 * size**2 for size in (10, 8, 6)]
    assert all("cannot trace the forward" in edge.reason for edge in insertion.edges)
    assert not insertion.fault
    comparison = compare_outputs(network, insertion.model, [x])
    assert comparison.bit_identical and comparison.images == 4
    with pytest.raises(GraphError, match="cannot trace Network for an input"):
        fold(insertion.model, x)


def by_an_if(_: nn.Module, x: Tensor) -> Tensor:
    return x if x.sum() > 0 else x * 2


def by_an_index(_: nn.Module, x: Tensor) -> Tensor:
    return x * x.flatten()[: int(x.argmax()) + 1].mean()


def by_text(_: nn.Module, x: Tensor) -> Tensor:
    return x * float(f"{x.mean():.1f}")


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (
            lambda: Network(by_an_if),
            r"depends on tensor values, .* \(.*test_recording.py:\d+: return x if x.sum\(\) > 0 else x \* 2",
        ),
        (
            lambda: Network(by_an_index),
            r"depends on tensor values, .*: return x \* x.flatten\(\)\[: int\(x.argmax",
        ),
        (
            lambda: Network(by_numpy),
            r"depends on tensor values, .*: return x \* float\(x.detach\(\).numpy",
        ),
        (lambda: Network(by_text), r"depends on tensor values, .*: return x \* float\(f"),
        (
            lambda: Network(None, Outputs),
            r"returns an object of the class Outputs\. Let it .* torch.export.register_dataclass$",
        ),
        (lambda: Network(None, Result), "returns an object of the class Result. Let it return tensors"),
        (
            lambda: Network(None, lambda x: {"task": Task.LABEL, "logits": x}),
            "returns an object of the class Task. Let",
        ),
    ],
)
def test_why_a_network_cannot_be_folded_is_said_in_plain_words(model: Callable[[], nn.Module], why: str) -> None:
    network, x = randomised(model()), images(4, 12)
    with pytest.raises(GraphError, match=rf"^torch.export cannot trace Network for an input .*: its forward {why}"):
        fold(insert(network, [x]).model, x)


@pytest.mark.filterwarnings("ignore:.*is deprecated")  # TorchScript
def test_a_part_in_torchscript_that_prevents_folding_is_named() -> None:
    network, x = randomised(Network()), images(4, 12)
    network.conv2 = torch.jit.script(network.conv2)
    with pytest.raises(
        GraphError, match=r": its parameter conv2.weight is not an nn.Parameter, as in TorchScript modules\. Replace"
    ):
        fold(insert(network, [x]).model, x)


def test_of_a_message_for_developers_of_pytorch_the_beginning_is_passed_on() -> None:
    @torch.library.custom_op("bn_insert_tests::doubled", mutates_args=())
    def doubled(x: Tensor) -> Tensor:
        return x * 2

    network, x = randomised(Network(lambda _, x: doubled(x))), images(4, 12)
    with pytest.raises(GraphError) as caught:
        fold(insert(network, [x]).model, x)
    assert "http" not in str(caught.value) and "lease" not in str(caught.value)
    assert "doubled" in str(caught.value)


class Config:
    scale = 2.0


def by_a_missing_attribute(_: nn.Module, x: Tensor) -> Tensor:
    if torch.compiler.is_exporting():
        return x * Config().meta  # type: ignore[attr-defined]
    return x


def raising(message: str) -> Callable[[nn.Module, Tensor], Tensor]:
    def between(_: nn.Module, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            raise ValueError(message)
        return x

    return between


@pytest.mark.parametrize(
    ("between", "cause"),
    [
        (by_a_missing_attribute, "'Config' object has no attribute 'meta'"),
        (raising("call .numpy() first"), "call .numpy() first"),
        (raising("a data-dependent branch"), "a data-dependent branch"),
        (raising("sizes must be even if you use pooling"), "sizes must be even if you use pooling"),
        (raising("cannot see the mask for more than 3 heads"), "cannot see the mask for more than 3 heads"),
        (raising("too many heads; see https://example.org/heads for details"), "too many heads"),
        (raising("too many heads: https://example.org/heads"), "too many heads"),
        (raising("too many heads. Please use fewer"), "too many heads"),
    ],
)
def test_what_a_forward_says_itself_is_passed_on_up_to_a_link_or_a_request(
    between: Callable[[nn.Module, Tensor], Tensor], cause: str
) -> None:
    network, x = randomised(Network(between)), images(4, 12)
    with pytest.raises(GraphError) as caught:
        fold(insert(network, [x]).model, x)
    assert f"for an input of shape (4, 3, 12, 12): {cause} ({__file__}:" in str(caught.value)


def test_outputs_in_a_dataclass_or_an_object_are_compared() -> None:
    for at_end in AT_END:
        model, other = randomised(Network(None, at_end)), randomised(Network(None, at_end), seed=1)
        assert compare_outputs(model, other, [images(4, 12)]).max_rel > 0.01


def not_exported(*_: object) -> None:
    raise RuntimeError("torch.export is not used")


@pytest.mark.parametrize("placement", ["before_activation", "after_activation"])
@pytest.mark.parametrize(
    "name",
    [
        "squeeze and excite",
        "one weight for two convs",
        "recurrent refinement",
        "traced by torch.fx",
        "layers under autocast",
        "unpooling by positions (SegNet)",
        "forward takes a dict",
        "weight_norm",
    ],
)
def test_a_recording_has_the_sites_that_torch_export_has(
    name: str, placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = made(name), ARCHITECTURES[name].batch()
    options = SiteOptions.checked(("conv", "dense"), include_output=False, skip=(), placement=placement)
    traced = Trace.of(model, batch)
    monkeypatch.setattr(trace, "_exported", not_exported)
    recording = Trace.of(model, batch)
    assert not traced.obstacle and recording.obstacle

    def described(layers: Any) -> list[Any]:
        return [
            (each.name, each.shape, each.reason, each.site and (each.site.anchor, each.site.in_sequence))
            for each in layers
        ]

    assert described(layers_in(recording, options)) == described(layers_in(traced, options))


def test_a_layer_whose_values_leave_pytorch_may_be_an_output_layer() -> None:
    class Leaves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Any:
            x = torch.from_numpy(self.conv(F.relu(self.stem(x))).numpy().clip(0))
            return self.head(F.relu(x)).numpy()

    model, x = randomised(Leaves()), images(2, 8)
    unknown = "possibly an output layer: its consumers could not be traced"
    assert {layer.name: layer.reason for layer in survey(model, x)} == {"stem": "", "conv": unknown, "head": unknown}
    assert len(find_sites(model, x, include_output=True)) == 3


def test_a_recording_changes_neither_the_model_nor_the_random_state() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
            self.register_buffer("passes", torch.zeros(()))
            self.last: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            self.conv.weight.data.clamp_(-0.1, 0.1)
            self.last = self.head(F.relu(self.conv(x + torch.rand(1))))
            return self.last * float(f"{self.last.mean():.2f}")

    model = randomised(Counts())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    assert [site.name for site in find_sites(model, images(2, 8))] == ["conv"]
    assert torch.equal(torch.get_rng_state(), state)
    assert model.last is None and not model._forward_hooks and not model.conv._forward_hooks
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_forward_that_catches_the_failure_of_a_layer_is_recorded() -> None:
    def with_another(network: Any, x: Tensor) -> Tensor:
        try:
            return network.conv3(x[:, :5])
        except RuntimeError:
            return x * float(f"{x.mean():.2f}")

    model, x = randomised(Network(with_another)), images(2, 12)
    assert {layer.name: layer.reason for layer in survey(model, x)}["head"] == "output layer"
    assert [site.name for site in find_sites(model, x)] == ["conv1", "conv2", "conv3"]


def test_layers_that_run_in_another_thread_are_not_said_to_be_never_called() -> None:
    class Threaded(Network):
        def forward(self, x: Tensor) -> Any:
            with ThreadPoolExecutor(1) as executor:
                return executor.submit(super().forward, x).result()

    model, x = randomised(Threaded()), images(2, 12)
    reason = "called, but without a conv or dense operation in the trace"
    assert {layer.reason for layer in survey(model, x)} == {reason}
    with pytest.warns(UserWarning, match=rf"no BatchNorm was inserted: .* \({reason}\)$"):
        insert_batchnorm(model, [x])


def test_a_network_with_cond_is_run_and_what_is_in_its_branches_gets_no_batchnorm() -> None:
    class Conditional(Network):
        def forward(self, x: Tensor) -> Any:
            x = F.relu(self.conv1(x))
            x = torch.cond(x.sum() > 1e9, lambda x: F.relu(self.conv2(x)) * 2, lambda x: F.relu(self.conv2(x)), (x,))
            return self.head(F.relu(self.conv3(x)).mean((2, 3)))

    model, batches = randomised(Conditional()), [images(4, 12, seed=seed) for seed in range(3)]
    insertion = insert(model, batches)
    assert [site.name for site in insertion.sites] == ["conv1", "conv3"]
    assert compare_outputs(model, insertion.model, batches).bit_identical


def test_a_compiled_child_runs_as_it_was_written() -> None:
    convs = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    model = randomised(nn.Sequential(convs, nn.Conv2d(8, 4, 1)))
    batches = [images(4, 12, seed=seed) for seed in range(3)]
    expected = insert(model, batches)
    model[0] = torch.compile(model[0], backend="eager")
    found = insert(model, batches)
    assert [site.name for site in found.sites] == ["0._orig_mod.0", "0._orig_mod.2"]
    for moments, same in zip(found.moments.values(), expected.moments.values(), strict=True):
        assert torch.equal(moments.mean, same.mean)
    assert compare_outputs(model, found.model, batches).bit_identical
    assert not fold(found.model, batches[0]).left


def test_compiled_functions_are_compiled_again_once_the_last_thread_is_done() -> None:
    compiled = 0

    def backend(graph: Any, _: Any) -> Any:
        nonlocal compiled
        compiled += 1
        return graph.forward

    function = torch.compile(lambda x: x * 2, backend=backend)
    first, second = uncompiled(), uncompiled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert function(torch.ones(2)).sum() == 4 and compiled == 0
    second.__exit__(None, None, None)
    function(torch.ones(2))
    assert compiled == 1
