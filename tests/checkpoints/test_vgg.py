import sys
from collections.abc import Callable
from dataclasses import replace
from urllib.error import URLError

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models.vgg import VGG

from bn_insert.checkpoints.load_network import build_network
from bn_insert.checkpoints.settings import Settings
from bn_insert.checkpoints.torchvision_weights import torchvision_checkpoint
from bn_insert.checkpoints.vgg import vgg_from_state_dict
from bn_insert.errors import CheckpointError
from support.vgg_specs import Conv, Dense, Spec, images_for, vgg_of

StateDict = dict[str, Tensor]

LAYOUTS = {
    "no batchnorm": Spec(),
    "before every activation": Spec((Conv(norm="before"), Conv(pool=True, norm="before")), (Dense(norm="before"),)),
    "after every activation": Spec((Conv(norm="after"), Conv(pool=True, norm="after")), (Dense(norm="after"),)),
    "on dense layers alone": Spec(dense=(Dense(norm="before"), Dense(norm="before"))),
    "on the last conv alone, before": Spec((Conv(), Conv(norm="before"))),
    "on the last conv alone, after": Spec((Conv(), Conv(norm="after"))),
    "before here, after there": Spec((Conv(norm="before", pool=True), Conv(norm="after"), Conv())),
    "behind the output": Spec(output_norm=True),
    "leading dropout": Spec(leading_dropout=True),
    "no dropout": Spec(dense=(Dense(dropout=False), Dense(dropout=False, norm="before"))),
    "no dropout, batchnorm after": Spec(dense=(Dense(dropout=False, norm="after"), Dense(dropout=False))),
    "one dense layer": Spec(dense=()),
    "one dense layer behind a dropout": Spec(dense=(), leading_dropout=True, output_norm=True),
    "no biases": Spec((Conv(bias=False, norm="before"),), (Dense(bias=False, norm="after"),), output_bias=False),
    "kernels of one": Spec((Conv(), Conv(kernel=1, pool=True), Conv(kernel=1))),
    "one conv, one pixel, grey": Spec((Conv(1),), (), channels=1, classes=1, pooled=1),
}


def rebuilt(vgg: VGG) -> VGG:
    return vgg_from_state_dict(vgg.state_dict(), Settings.of(vgg))


def assert_same_network(actual: VGG, expected: VGG, batch: Tensor) -> None:
    assert repr(actual) == repr(expected)  # types, order, sizes, eps, momentum and p
    assert list(actual.state_dict()) == list(expected.state_dict())
    assert not actual.training
    with torch.inference_mode():
        assert torch.equal(actual(batch), expected(batch))


@pytest.mark.parametrize("spec", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout_is_rebuilt_with_equal_outputs(spec: Spec) -> None:
    vgg = vgg_of(spec)
    assert_same_network(rebuilt(vgg), vgg, images_for(spec))


NORMS = st.sampled_from(["none", "before", "after"])
CONVS = st.builds(
    Conv, width=st.integers(1, 5), pool=st.booleans(), norm=NORMS, kernel=st.sampled_from([1, 3]), bias=st.booleans()
)
DENSE = st.builds(Dense, width=st.integers(1, 5), dropout=st.booleans(), norm=NORMS, bias=st.booleans())


def with_usual_biases(convs: list[Conv]) -> tuple[Conv, ...]:
    """Convs without a bias are all of a network, or directly before a BatchNorm."""
    if not any(conv.bias for conv in convs):
        return tuple(convs)
    return tuple(replace(conv, bias=conv.bias or conv.norm != "before") for conv in convs)


SPECS = st.builds(
    Spec,
    convs=st.lists(CONVS, min_size=1, max_size=5).map(with_usual_biases),
    dense=st.lists(DENSE, max_size=3).map(tuple),
    channels=st.integers(1, 4),
    classes=st.integers(1, 4),
    pooled=st.integers(1, 3),
    leading_dropout=st.booleans(),
    output_norm=st.booleans(),
    output_bias=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(spec=SPECS, seed=st.integers(0, 2**30))
def test_any_vgg_is_rebuilt_with_equal_outputs(spec: Spec, seed: int) -> None:
    vgg = vgg_of(spec, seed)
    assert_same_network(rebuilt(vgg), vgg, images_for(spec))


@pytest.mark.parametrize("name", ["vgg11", "vgg11_bn", "vgg19_bn"])
def test_the_networks_of_torchvision_are_rebuilt_module_for_module(name: str) -> None:
    with torch.device("meta"):
        original = getattr(torchvision.models, name)()
    # One storage for all: the dense layers of each network have 120 million values.
    storage = torch.zeros(max(value.numel() for value in original.state_dict().values()), dtype=torch.float16)
    state = {key: storage[: value.numel()].view(value.shape) for key, value in original.state_dict().items()}
    result = vgg_from_state_dict(state)
    assert type(result) is VGG
    assert repr(result) == repr(original)
    assert list(result.state_dict()) == list(original.state_dict())


def test_without_settings_batchnorm_and_dropout_have_the_defaults_of_pytorch() -> None:
    result = vgg_from_state_dict(vgg_of(LAYOUTS["before every activation"]).state_dict())
    norms = [module for module in result.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-5, 0.1)}
    assert {module.p for module in result.modules() if isinstance(module, nn.Dropout)} == {0.5}


def test_without_classifier_keys_the_network_returns_flattened_features() -> None:
    vgg = vgg_of()
    state = {key: value for key, value in vgg.state_dict().items() if key.startswith("features.")}
    result = vgg_from_state_dict(state)
    assert isinstance(result.avgpool, nn.Identity)
    assert isinstance(result.classifier, nn.Identity)
    assert torch.equal(result(images_for()), vgg.features(images_for()).flatten(1))


def test_the_network_has_the_given_tensors_trainable_and_no_random_number_is_drawn() -> None:
    state = vgg_of(LAYOUTS["before every activation"]).state_dict()
    random_state = torch.get_rng_state()
    result = vgg_from_state_dict(state)
    assert torch.equal(torch.get_rng_state(), random_state)
    own = result.state_dict(keep_vars=True)
    assert all(own[key].data_ptr() == state[key].data_ptr() for key in state)
    assert all(type(parameter) is nn.Parameter and parameter.requires_grad for parameter in result.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_stay_and_may_differ_between_layers(dtype: torch.dtype) -> None:
    vgg = vgg_of(LAYOUTS["before every activation"])
    for module in vgg.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.to(dtype)
    result = vgg_from_state_dict(vgg.state_dict())
    assert result.features[0].weight.dtype == dtype
    assert result.features[1].weight.dtype == result.features[1].running_var.dtype == torch.float32
    assert result.features[1].num_batches_tracked.dtype == torch.int64


def test_a_checkpoint_from_before_batches_were_counted_is_taken() -> None:
    state = vgg_of(LAYOUTS["before every activation"]).state_dict()
    result = vgg_from_state_dict({key: value for key, value in state.items() if "num_batches" not in key})
    assert torch.equal(result.features[1].num_batches_tracked, torch.tensor(0))


def test_a_counter_of_batches_that_was_cast_to_half_is_taken() -> None:
    state = {key: value.half() for key, value in vgg_of(LAYOUTS["before every activation"]).state_dict().items()}
    assert torch.equal(vgg_from_state_dict(state).features[1].num_batches_tracked, torch.tensor(7))


def test_values_that_are_not_finite_are_somebody_elses_concern() -> None:
    state = vgg_of().state_dict()
    state["features.0.bias"][:] = torch.nan
    assert vgg_from_state_dict(state).features[0].bias.isnan().all()


# Of `vgg_of()`: convs at features 0, 2, 5; dense layers at classifier 0, 3, 6.


def without(*keys: str) -> Callable[[StateDict], StateDict]:
    return lambda state: {key: value for key, value in state.items() if key not in keys}


def replaced(**by_key: Tensor) -> Callable[[StateDict], StateDict]:
    return lambda state: state | {key.replace("__", "."): value for key, value in by_key.items()}


def moved(old: str, new: str) -> Callable[[StateDict], StateDict]:
    return lambda state: {
        key.replace(old, new, 1) if key.startswith(old) else key: value for key, value in state.items()
    }


def norm_at(name: str, channels: int) -> Callable[[StateDict], StateDict]:
    return lambda state: (
        state | {f"{name}.{kind}": torch.ones(channels) for kind in ("weight", "bias", "running_mean", "running_var")}
    )


REFUSALS: dict[str, tuple[Callable[[StateDict], StateDict], list[str]]] = {
    "another architecture": (lambda _: {"layer1.0.conv1.weight": torch.ones(4, 3, 3, 3)}, ["'layer1.0.conv1.weight'"]),
    "a key beside": (replaced(fc__weight=torch.ones(2, 2)), ["'fc.weight'", "not features.N"]),
    "a nested key": (replaced(features__0__0__weight=torch.ones(2, 2)), ["'features.0.0.weight'"]),
    "no number": (replaced(classifier__weight=torch.ones(2, 2)), ["'classifier.weight'"]),
    "a number with zeros": (moved("features.2.", "features.02."), ["'features.02.weight'"]),
    "digits that are not ASCII": (moved("features.2.", "features.٢."), ["'features.٢.weight'"]),
    "a huge number": (moved("features.5.", "features.99999999999."), ["'features.99999999999.weight'"]),
    "nothing": (lambda _: {}, ["no features.N keys"]),
    "no conv": (
        lambda state: {key: value for key, value in state.items() if key.startswith("classifier")},
        ["no features.N keys"],
    ),
    "kernels whose stride is unknown": (
        replaced(features__0__weight=torch.ones(4, 3, 11, 11)),
        ["features.0.weight (4, 3, 11, 11) is not a 3x3 or 1x1 kernel"],
    ),
    "kernels that are not square": (
        replaced(features__0__weight=torch.ones(4, 3, 3, 1)),
        ["is not a 3x3 or 1x1 kernel"],
    ),
    "channels that do not chain": (
        replaced(features__2__weight=torch.ones(5, 8, 3, 3)),
        ["features.2.weight (5, 8, 3, 3) takes 8 channels, but features.0.weight (4, 3, 3, 3) returns 4"],
    ),
    "dense sizes that do not chain": (
        replaced(classifier__3__weight=torch.ones(7, 9)),
        ["classifier.3.weight (7, 9) takes 9 channels, but classifier.0.weight (6, 24) returns 6"],
    ),
    "no square image": (
        replaced(classifier__0__weight=torch.ones(6, 18)),
        ["classifier.0.weight (6, 18) takes 18 values", "6 channels of features.5.weight (6, 5, 3, 3)"],
    ),
    "fewer inputs than channels": (replaced(classifier__0__weight=torch.ones(6, 5)), ["takes 5 values"]),
    "BatchNorm of another width": (
        norm_at("features.3", 9),
        ["features.3.weight (9,) does not fit the 5 channels of features.2.weight (5, 4, 3, 3)"],
    ),
    "statistics of another width": (
        lambda state: norm_at("features.3", 5)(state) | {"features.3.running_var": torch.ones(4)},
        ["features.3.running_var (4,) does not fit features.3.weight (5,)"],
    ),
    "no running_var": (
        lambda state: without("features.3.running_var")(norm_at("features.3", 5)(state)),
        ["features.3.running_var is missing", "bias, running_mean, weight"],
    ),
    "no weight": (without("features.2.weight"), ["features.2.running_mean is missing, and features.2 has only bias"]),
    "statistics in a conv": (
        replaced(features__2__running_mean=torch.ones(5), features__2__running_var=torch.ones(5)),
        ["features.2.weight (5, 4, 3, 3) should have 1 dimensions for a batchnorm layer"],
    ),
    "a dense layer among convs": (
        replaced(features__2__weight=torch.ones(5, 4)),
        ["features.2.weight (5, 4) should have 4 dimensions for a conv layer in features"],
    ),
    "a conv among dense layers": (
        replaced(classifier__3__weight=torch.ones(7, 6, 1, 1)),
        ["classifier.3.weight (7, 6, 1, 1) should have 2 dimensions for a dense layer in classifier"],
    ),
    "bias of another width": (
        replaced(features__0__bias=torch.ones(3)),
        ["features.0.bias (3,) does not fit features.0.weight (4, 3, 3, 3)"],
    ),
    "no channels": (replaced(features__0__weight=torch.ones(0, 3, 3, 3)), ["features.0.weight (0, 3, 3, 3) is empty"]),
    "no room for an activation": (
        moved("features.2.", "features.1."),
        ["an activation and at most one MaxPool between features.0 and features.1"],
    ),
    "too much room between convs": (
        moved("features.5.", "features.6."),
        ["an activation and at most one MaxPool between features.2 and features.6"],
    ),
    "too much room between dense layers": (
        moved("classifier.6.", "classifier.7."),
        ["an activation and at most one Dropout between classifier.3 and classifier.7"],
    ),
    "BatchNorm and no room for an activation": (
        norm_at("features.1", 4),
        ["an activation and at most one MaxPool between features.0 and features.2"],
    ),
    "BatchNorm behind a pooling": (
        lambda state: norm_at("features.5", 5)(moved("features.5.", "features.6.")(state)),
        ["BatchNorm features.5 comes neither directly after features.2 nor after its activation"],
    ),
    "BatchNorm too far behind": (
        norm_at("features.9", 6),
        ["BatchNorm features.9 comes neither directly after features.5 nor after its activation"],
    ),
    "two BatchNorms": (
        lambda state: norm_at("features.8", 6)(norm_at("features.6", 6)(state)),
        ["BatchNorm features.6 and features.8 comes neither"],
    ),
    "BatchNorm first": (
        lambda state: norm_at("classifier.0", 24)(without("classifier.0.weight", "classifier.0.bias")(state)),
        ["classifier.0 is a BatchNorm with no layer before it"],
    ),
    "BatchNorm behind an activation of the output": (
        norm_at("classifier.8", 3),
        ["BatchNorm classifier.8 comes after an activation of the last layer classifier.6"],
    ),
    "no first conv": (without("features.0.weight", "features.0.bias"), ["the first conv is features.2"]),
    "too much room in front": (
        without("classifier.0.weight", "classifier.0.bias"),
        ["the first dense layer is classifier.3, but only one Dropout can come before it"],
    ),
    "whole numbers": (
        replaced(features__0__weight=torch.ones(4, 3, 3, 3, dtype=torch.int8)),
        ["features.0.weight is torch.int8", "float16, bfloat16, float32 or float64"],
    ),
    "complex numbers": (
        replaced(features__0__bias=torch.ones(4, dtype=torch.complex64)),
        ["features.0.bias is torch.complex64"],
    ),
    "float8": (
        lambda state: state | {"features.0.bias": torch.ones(4).to(torch.float8_e4m3fn)},
        ["features.0.bias is torch.float8_e4m3fn"],
    ),
    "two dtypes in a layer": (
        replaced(features__0__bias=torch.ones(4, dtype=torch.float16)),
        ["features.0.bias is torch.float16, but features.0.weight is torch.float32"],
    ),
    "sparse": (
        replaced(classifier__0__weight=torch.ones(6, 24).to_sparse()),
        ["classifier.0.weight is sparse, quantized or without values"],
    ),
    "quantized": (
        lambda state: state | {"classifier.0.bias": torch.quantize_per_tensor(torch.ones(6), 0.1, 0, torch.qint8)},
        ["classifier.0.bias is sparse, quantized or without values"],
    ),
    "without values": (replaced(classifier__0__weight=torch.ones(6, 24, device="meta")), ["or without values"]),
    "a counter that is no number": (
        lambda state: norm_at("features.8", 6)(state) | {"features.8.num_batches_tracked": torch.zeros(2)},
        ["features.8.num_batches_tracked (2,) should be a single integer"],
    ),
}


@pytest.mark.parametrize(("change", "fragments"), REFUSALS.values(), ids=REFUSALS.keys())
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor.*")
def test_a_state_dict_that_makes_no_vgg_is_refused_with_key_reason_and_way_out(
    change: Callable[[StateDict], StateDict], fragments: list[str]
) -> None:
    with pytest.raises(CheckpointError) as refusal:
        vgg_from_state_dict(change(dict(vgg_of().state_dict())))
    message = str(refusal.value)
    assert message.startswith("this is not a VGG in torchvision's layout: ")
    assert message.endswith("; for other architectures pass model")
    assert [fragment for fragment in fragments if fragment not in message] == [], message


@pytest.mark.parametrize("name", ["alexnet", "resnet18", "densenet121", "mobilenet_v2", "squeezenet1_0"])
def test_other_networks_of_torchvision_are_refused(name: str) -> None:
    with torch.device("meta"):
        state = getattr(torchvision.models, name)().state_dict()
    with pytest.raises(CheckpointError, match="this is not a VGG in torchvision's layout"):
        vgg_from_state_dict({key: torch.zeros(()).expand(value.shape) for key, value in state.items()})


def test_torchvisions_weights_come_as_the_same_network(monkeypatch: pytest.MonkeyPatch) -> None:
    vgg = vgg_of()
    calls: list[dict[str, object]] = []

    def get_state_dict(self: object, **options: object) -> StateDict:
        calls.append({"weights": str(self)} | options)
        return vgg.state_dict()

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", get_state_dict)
    result = build_network(torchvision_checkpoint("vgg13"))
    assert torch.equal(result(images_for()), vgg(images_for()))
    assert calls == [
        {
            "weights": "VGG13_Weights.IMAGENET1K_V1",
            "progress": False,
            "check_hash": True,
            "map_location": "cpu",
            "weights_only": True,
        }
    ]


def test_what_the_download_prints_is_not_among_the_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def get_state_dict(*_: object, **__: object) -> StateDict:
        sys.stdout.write("Downloading: ...\n")  # as torch.hub does
        return vgg_of().state_dict()

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", get_state_dict)
    torchvision_checkpoint("vgg13")
    assert capsys.readouterr() == ("", "Downloading: ...\n")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (URLError("Name or service not known"), "Name or service not known"),
        (TimeoutError("timed out"), "timed out"),
        (RuntimeError('invalid hash value (expected "ab", got "cd")'), "invalid hash value"),
        (EOFError(), "EOFError"),
    ],
)
def test_without_a_network_the_error_says_what_could_not_be_had(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get_state_dict(*_: object, **__: object) -> StateDict:
        raise error

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", get_state_dict)
    with pytest.raises(CheckpointError) as refusal:
        torchvision_checkpoint("vgg16")
    assert "could not get the weights of vgg16 from torchvision (https://" in str(refusal.value)
    assert reason in str(refusal.value)
    assert "pass a checkpoint file" in str(refusal.value)


def test_a_name_that_is_not_offered_is_refused_with_those_that_are() -> None:
    with pytest.raises(
        CheckpointError,
        match=r"'resnet18' is not one of the networks .* \(vgg11, vgg13, vgg16, vgg19\); for another architecture",
    ):
        torchvision_checkpoint("resnet18")


@pytest.mark.parametrize("key", ["features.0.bias", "features.2.bias"])
def test_one_missing_bias_among_convs_with_one_is_named(key: str) -> None:
    state = vgg_spec_state()
    del state[key]
    with pytest.raises(CheckpointError, match=rf"{key} is missing, and other convs have a bias"):
        vgg_from_state_dict(state)


def test_no_layer_with_a_bias_is_a_network_without_biases() -> None:
    state = {name: value for name, value in vgg_spec_state().items() if not name.endswith("bias")}
    assert all(module.bias is None for module in vgg_from_state_dict(state).features if isinstance(module, nn.Conv2d))


def vgg_spec_state() -> dict[str, Tensor]:
    """Return two convs and two dense layers, all with biases."""
    shapes = {"features.0": (4, 3, 3, 3), "features.2": (4, 4, 3, 3), "classifier.0": (8, 16), "classifier.2": (3, 8)}
    state = {}
    for name, shape in shapes.items():
        state[f"{name}.weight"] = torch.randn(shape)
        state[f"{name}.bias"] = torch.randn(shape[0])
    return state
