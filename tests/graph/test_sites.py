from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from bn_insert import (
    GraphError,
    Layer,
    Site,
    dropouts_before_batchnorm,
    find_edges,
    find_sites,
    fold,
    fold_batchnorm,
    survey,
)
from bn_insert.errors import messages_name_options
from bn_insert.graph.sites import SiteOptions, layers_in
from bn_insert.graph.trace import Trace
from support.idioms import SqueezeExcite
from support.networks import (
    CalledFromTwoSequentials,
    CalledTwice,
    HeldAsAttributes,
    RegisteredBackwards,
    SeveralOutputs,
    SlicedInForward,
    SlicesAsAttributes,
    TokenMixer,
    TwoNames,
    WithUnusedLayer,
    features,
    images,
    randomised,
    sequential,
    small_vgg,
)

Unchecked = Callable[[Callable[..., Any]], Callable[..., Any]]

GATE = "part of a gate: its output multiplies other activations, as in squeeze-and-excite blocks"
VGG_LAYERS = ["features.0", "features.3", "classifier.0", "classifier.3", "classifier.6"]


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError(x.dtype)


def reasons(layers: Iterable[Layer]) -> dict[str, str]:
    return {layer.name: layer.reason for layer in layers}


def names(sites: Iterable[Site]) -> list[str]:
    return [site.name for site in sites]


def test_a_vgg_has_a_site_after_every_layer_but_the_last() -> None:
    assert find_sites(small_vgg(), images(2, 16)) == [
        Site("features.0", "conv", "features.0", channels=8, dims=2, calls=1, in_sequence=True),
        Site("features.3", "conv", "features.3", channels=12, dims=2, calls=1, in_sequence=True),
        Site("classifier.0", "dense", "classifier.0", channels=24, dims=1, calls=1, in_sequence=True),
        Site("classifier.3", "dense", "classifier.3", channels=16, dims=1, calls=1, in_sequence=True),
    ]


def test_after_activation_the_anchor_is_the_activation() -> None:
    sites = find_sites(small_vgg(), images(2, 16), placement="after_activation")
    assert names(sites) == VGG_LAYERS[:4]
    assert [site.anchor for site in sites] == ["features.1", "features.4", "classifier.1", "classifier.4"]


@pytest.mark.parametrize("placement", ["before_activation", "after_activation"])
def test_include_output_adds_a_site_directly_after_the_output_layer(placement: str) -> None:
    sites = find_sites(small_vgg(), images(2, 16), include_output=True, placement=placement)
    assert names(sites) == VGG_LAYERS
    assert sites[-1].anchor == "classifier.6"


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (("conv",), VGG_LAYERS[:2]),
        (["dense"], VGG_LAYERS[2:4]),
        ({"dense", "conv"}, VGG_LAYERS[:4]),
        ("conv", VGG_LAYERS[:2]),
        ("dense", VGG_LAYERS[2:4]),
    ],
    ids=["tuple", "list", "set", "conv", "dense"],
)
def test_layers_are_selected_by_kind_in_any_iterable_or_as_one_word(
    layers: Any, expected: list[str], unchecked: Unchecked
) -> None:
    found = unchecked(survey)(small_vgg(), images(2, 16), layers=layers)
    assert [layer.name for layer in found if layer.site] == expected


def test_a_signature_admits_one_word_for_layers() -> None:
    assert names(find_sites(small_vgg(), images(2, 16), layers="conv")) == VGG_LAYERS[:2]


@pytest.mark.parametrize("layers", [(), ("conf",), "convolution", ("conv", "pool")], ids=str)
def test_layers_of_an_unknown_kind_are_a_graph_error(layers: Any, unchecked: Unchecked) -> None:
    with pytest.raises(GraphError, match=r"^layers must be one or both of conv, dense, not \("):
        unchecked(survey)(small_vgg(), images(2, 16), layers=layers)


def test_an_unknown_placement_is_a_graph_error(unchecked: Unchecked) -> None:
    with pytest.raises(
        GraphError, match=r"^placement must be one of before_activation, after_activation, not 'behind'$"
    ):
        unchecked(survey)(small_vgg(), images(2, 16), placement="behind")


@pytest.mark.parametrize(
    ("skip", "expected"),
    [
        (("features.0",), VGG_LAYERS[1:4]),
        (("features.*",), VGG_LAYERS[2:4]),
        (("*.0",), ["features.3", "classifier.3"]),
        (("features.[!0]", "classifier.?"), ["features.0"]),
        ("features.0", VGG_LAYERS[1:4]),
        (("*",), []),
    ],
    ids=str,
)
def test_skip_leaves_out_layers_whose_names_match_a_glob(skip: Any, expected: list[str]) -> None:
    layers = survey(small_vgg(), images(2, 16), skip=skip)
    assert [layer.name for layer in layers if layer.site] == expected
    skipped = {layer.name for layer in layers if layer.reason == "skipped by pattern"}
    assert skipped >= set(VGG_LAYERS[:4]) - set(expected)


@pytest.mark.parametrize("pattern", ["backbone.*", "features.1", "Features.0", "features"])
def test_a_skip_pattern_that_matches_no_layer_is_a_graph_error_that_lists_the_layers(pattern: str) -> None:
    with pytest.raises(GraphError) as caught:
        find_sites(small_vgg(), images(2, 16), skip=("features.0", pattern))
    assert str(caught.value) == (
        f"the skip pattern '{pattern}' matches no conv or dense layer; the layers are: {', '.join(VGG_LAYERS)}"
    )


def test_a_survey_has_every_layer_and_why_it_has_no_site() -> None:
    layers = survey(small_vgg(), images(2, 16), layers=("conv",), skip=("features.0",))
    assert reasons(layers) == {
        "features.0": "skipped by pattern",
        "features.3": "",
        "classifier.0": "dense layers are not selected",
        "classifier.3": "dense layers are not selected",
        "classifier.6": "dense layers are not selected",
    }
    first, last = layers[0], layers[-1]
    assert (first.kind, first.type_name, first.shape, first.parameters) == ("conv", "Conv2d", (2, 8, 16, 16), 224)
    assert (last.kind, last.type_name, last.shape, last.parameters) == ("dense", "Linear", (2, 10), 170)


def test_one_trace_has_the_layers_of_a_survey_with_any_options() -> None:
    model, x = small_vgg(), images(2, 16)
    trace = Trace.of(model, x)
    assert layers_in(trace, SiteOptions.checked(("conv", "dense"), False, (), "before_activation")) == survey(model, x)
    options = SiteOptions.checked("dense", True, "*.0", "after_activation")
    assert layers_in(trace, options) == survey(
        model, x, layers="dense", include_output=True, skip="*.0", placement="after_activation"
    )


def test_layers_come_in_the_order_in_which_a_forward_pass_completes_them() -> None:
    assert list(reasons(survey(RegisteredBackwards(), images(2, 8)))) == ["conv", "hidden", "head"]


def test_a_layer_that_is_never_called_comes_last_and_is_no_site() -> None:
    found = reasons(survey(WithUnusedLayer(), images(2, 8)))
    assert list(found) == ["conv", "head", "unused"]
    assert found["unused"] == "never called in a forward pass"


@pytest.mark.parametrize(
    ("between", "norm"),
    [
        ((), nn.BatchNorm2d(8)),
        ((nn.ReLU(inplace=True),), nn.BatchNorm2d(8)),
        ((nn.LeakyReLU(), nn.MaxPool2d(2)), nn.BatchNorm2d(8)),
        ((nn.Dropout2d(),), nn.BatchNorm2d(8)),
        ((nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.FeatureAlphaDropout()), nn.BatchNorm2d(8)),
        ((), nn.GroupNorm(2, 8)),
        ((nn.ReLU(),), nn.InstanceNorm2d(8)),
        ((), nn.LayerNorm((8, 6, 6))),
    ],
    ids=lambda value: "-".join(type(part).__name__ for part in value) if isinstance(value, tuple) else None,
)
@pytest.mark.parametrize("placement", ["before_activation", "after_activation"])
def test_a_layer_followed_by_a_normalization_has_no_site(
    between: tuple[nn.Module, ...], norm: nn.Module, placement: str
) -> None:
    model = sequential(nn.Conv2d(3, 8, 3), *between, norm, nn.ReLU(), nn.Conv2d(8, 4, 1))
    found = reasons(survey(model, images(2, 8), placement=placement))
    assert found["0"] == f"already followed by a normalization: {1 + len(between)}"


def test_in_torchvisions_batchnorm_vggs_the_dense_layers_alone_are_sites() -> None:
    with torch.device("meta"):
        model = torchvision.models.vgg11_bn(init_weights=False)
        found = find_sites(model, torch.zeros(2, 3, 32, 32))
    assert names(found) == ["classifier.0", "classifier.3"]


class Normalized(nn.Module):
    """A conv whose output is normalized once `moved` has put its channels on the last axis."""

    def __init__(self, moved: Callable[[Tensor], Tensor], features: int) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.LayerNorm(features), nn.Linear(features, 4)
        self.moved = moved

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.moved(self.conv(x))))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("moved", "features"),
    [
        (lambda x: x.permute(0, 2, 3, 1), 8),
        (lambda x: x.relu().movedim(1, -1), 8),
        (lambda x: x.moveaxis(1, -1).contiguous(), 8),
        (lambda x: x.flatten(2).transpose(1, 2), 8),
        (lambda x: x.flatten(-2).mT, 8),
        (lambda x: x.swapaxes(1, 3), 8),
        (lambda x: x.swapdims(1, 3), 8),
        (lambda x: x.permute(0, 3, 1, 2), 6),
        (lambda x: x.flatten(1), 288),
    ],
)
def test_a_normalization_counts_after_the_axes_have_moved(moved: Callable[[Tensor], Tensor], features: int) -> None:
    found = reasons(survey(Normalized(moved, features), images(2, 8)))
    assert found["conv"] == "already followed by a normalization: norm"


def test_a_normalization_of_all_images_together_does_not_count() -> None:
    model = Normalized(lambda x: x.flatten(0).view(2, -1), 288)
    assert names(find_sites(model, images(2, 8))) == ["conv"]


class Joined(nn.Module):
    """Two convs whose outputs meet before a normalization, as in a DenseNet."""

    def __init__(self, joined: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(8, 4, 1)
        self.joined = joined

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.joined(self.first(x), self.second(x)).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("joined", "normalized"),
    [
        (lambda x, y: F.instance_norm(torch.cat([x, y.relu()], 1)), ["first", "second"]),
        (lambda x, y: F.instance_norm(torch.concat([x, y], -3)) * y.mean(), ["first"]),
        (lambda x, y: torch.cat([*map(F.instance_norm, x.chunk(2, 1)), y], 1), ["first"]),
        (lambda x, y: torch.cat([F.instance_norm(x.split(2, 1)[0]), *x.split(2, 1)[1:], y], 1), []),
        (lambda x, y: F.instance_norm(torch.cat([x, y])).view(-1, 8, 6, 6), []),
    ],
    ids=["both", "one is read elsewhere", "in halves", "half of it", "along the batch"],
)
def test_a_normalization_counts_after_a_concatenation_if_nothing_else_reads_the_channels(
    joined: Callable[[Tensor, Tensor], Tensor], normalized: list[str]
) -> None:
    found = reasons(survey(Joined(joined), images(2, 8)))
    reason = "already followed by a normalization: instance_norm"
    assert [name for name in ("first", "second") if found[name] == reason] == normalized


def test_in_torchvisions_densenet_every_conv_is_normalized() -> None:
    model = torchvision.models.DenseNet(8, (2, 2), 8, num_classes=4)
    assert find_sites(model, images(2, 64)) == []


def test_layers_around_moved_axes_have_sites_without_a_normalization() -> None:
    hidden = sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 8), nn.ReLU(), nn.Linear(8, 4))
    assert names(find_sites(hidden, images(2, 8))) == ["0", "2"]
    model = Normalized(lambda x: x.permute(0, 2, 3, 1), 8)
    model.norm = nn.ReLU()
    assert names(find_sites(model, images(2, 8))) == ["conv"]


def test_a_normalization_after_another_layer_does_not_count() -> None:
    model = sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    assert names(find_sites(model, images(2, 8))) == ["0"]


@pytest.mark.parametrize(
    "ending",
    [
        (nn.Softmax(1),),
        (nn.LogSoftmax(1),),
        (nn.Sigmoid(),),
        (nn.Tanh(),),
        (nn.Dropout(), nn.Flatten()),
        (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Softmax(1)),
    ],
    ids=lambda modules: "-".join(type(module).__name__ for module in modules),
)
def test_the_layer_before_the_output_is_an_output_layer_whatever_squashes_it(
    ending: tuple[nn.Module, ...],
) -> None:
    model = sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), *ending)
    assert reasons(survey(model, images(2, 8))) == {"0": "", "2": "output layer"}
    assert names(find_sites(model, images(2, 8), include_output=True)) == ["0", "2"]


def test_a_layer_followed_by_a_hidden_activation_is_no_output_layer() -> None:
    model = sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU())
    assert names(find_sites(model, images(2, 8))) == ["0", "2"]


def test_every_head_of_a_model_with_several_outputs_is_an_output_layer() -> None:
    assert reasons(survey(SeveralOutputs(), images(2, 8))) == {
        "body.0": "",
        "auxiliary": "output layer",
        "classes": "output layer",
        "mask": "output layer",
    }


class WritesParts(nn.Module):
    """Heads whose outputs are written into parts of one tensor."""

    def __init__(self, begun: Callable[[Tensor], Tensor], finished: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.heads = nn.Linear(12, 8), nn.ModuleList(nn.Linear(8, 1) for _ in range(3))
        self.begun, self.finished = begun, finished

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x.flatten(1)).relu()
        result = self.begun(features)
        for number, head in enumerate(self.heads):
            result[:, number] = head(features)[:, 0]
        return self.finished(result)


@pytest.mark.parametrize(
    "begun",
    [
        lambda features: features.new_zeros(len(features), 3),
        lambda features: features.new_zeros(len(features), 3).fill_(2),
        lambda features: features[:, :3].relu(),
        lambda features: torch.zeros(3, len(features)).t(),
    ],
)
@pytest.mark.parametrize("finished", [lambda result: result, lambda result: result.softmax(1).clone()])
def test_a_layer_whose_values_are_written_into_a_part_of_the_output_is_an_output_layer(
    begun: Callable[[Tensor], Tensor], finished: Callable[[Tensor], Tensor]
) -> None:
    found = reasons(survey(WritesParts(begun, finished), images(2, 2)))
    assert found == {"body": ""} | dict.fromkeys(["heads.0", "heads.1", "heads.2"], "output layer")


def test_a_layer_whose_values_are_written_into_a_part_of_a_hidden_tensor_is_no_output_layer() -> None:
    model = WritesParts(lambda features: features.new_zeros(len(features), 3), torch.relu)
    assert names(find_sites(model, images(2, 2))) == ["body", "heads.0", "heads.1", "heads.2"]


def test_a_part_that_was_read_before_it_is_written_to_is_not_read_from() -> None:
    class ReadsFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            kept = x.clone()
            result = self.other(kept)
            kept[:, 1:] = self.conv(x)[:, 1:]
            return result  # type: ignore[no-any-return]

    assert reasons(survey(ReadsFirst(), images(2, 8))) == {"conv": "", "other": "output layer"}


def test_a_layer_whose_values_are_written_into_a_part_of_what_is_normalized_has_no_site() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.BatchNorm2d(16)

        def forward(self, x: Tensor) -> Tensor:
            halves = x.new_empty(len(x), 16, *x.shape[2:])
            halves[:, :8] = self.first(x)
            halves.narrow(1, 8, 8).copy_(self.second(x).relu())
            return self.norm(halves)  # type: ignore[no-any-return]

    reason = "already followed by a normalization: norm"
    assert reasons(survey(Halves(), images(2, 8))) == {"first": reason, "second": reason}


def test_a_layer_whose_values_are_also_returned_is_an_output_layer() -> None:
    class ReturnsFeatures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.conv(x)
            return self.head(x.relu()), x

    assert reasons(survey(ReturnsFeatures(), images(2, 8))) == {"conv": "output layer", "head": "output layer"}


def test_layers_held_as_attributes_are_sites_of_no_sequence() -> None:
    sites = find_sites(HeldAsAttributes(), images(2, 9))
    assert names(sites) == ["stem", "blocks.0", "blocks.1", "heads.hidden"]
    assert not any(site.in_sequence for site in sites)


@pytest.mark.parametrize("name", ["stem", "blocks.1", "heads.hidden"])
def test_after_activation_is_impossible_after_an_activation_function(name: str) -> None:
    found = reasons(survey(HeldAsAttributes(), images(2, 9), placement="after_activation"))
    assert found[name] == "not directly followed by an activation module"


@pytest.mark.parametrize(
    "between", [(nn.MaxPool2d(2),), (nn.Identity(), nn.Conv2d(8, 8, 1))], ids=["pool", "another-conv"]
)
def test_after_activation_is_impossible_where_the_activation_does_not_follow_at_once(
    between: tuple[nn.Module, ...],
) -> None:
    model = sequential(nn.Conv2d(3, 8, 3), *between, nn.ReLU(), nn.Conv2d(8, 4, 1))
    found = reasons(survey(model, images(2, 8), placement="after_activation"))
    assert found["0"] == "not directly followed by an activation module"


def test_after_activation_is_impossible_after_an_attribute_that_several_layers_share() -> None:
    class SharedActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.act(self.second(self.act(self.first(x)))))

    found = reasons(survey(SharedActivation(), images(2, 8), placement="after_activation"))
    assert found["first"] == found["second"] == "the activation act is shared with other layers"


def test_after_activation_is_impossible_after_one_activation_at_two_places_of_a_sequential() -> None:
    relu = nn.ReLU()
    model = sequential(nn.Conv2d(3, 8, 3), relu, nn.Conv2d(8, 8, 3), relu, nn.Conv2d(8, 4, 1))
    found = reasons(survey(model, images(2, 8), placement="after_activation"))
    assert found["0"] == found["2"] == "the activation 1 is shared with other layers"


def test_a_layer_called_twice_is_one_site_with_two_calls() -> None:
    assert find_sites(CalledTwice(), images(2, 8, channels=8)) == [
        Site("conv", "conv", "conv", channels=8, dims=2, calls=2, in_sequence=False)
    ]


def test_a_layer_and_its_activation_both_called_twice_are_one_site_after_activation() -> None:
    (site,) = find_sites(CalledTwice(), images(2, 8, channels=8), placement="after_activation")
    assert (site.name, site.anchor, site.calls) == ("conv", "relu", 2)


def test_a_layer_that_two_sequentials_hold_is_one_site_with_two_calls() -> None:
    (site,) = find_sites(CalledFromTwoSequentials(), images(2, 8, channels=8))
    assert (site.name, site.anchor, site.calls) == ("lower.0", "lower.0", 2)


def test_a_layer_at_two_places_of_one_sequential_is_one_site_with_two_calls() -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1)
    model = sequential(conv, nn.ReLU(), conv, nn.ReLU(), nn.Conv2d(8, 4, 1))
    assert find_sites(model, images(2, 8, channels=8)) == [
        Site("0", "conv", "0", channels=8, dims=2, calls=2, in_sequence=True)
    ]


def test_a_layer_under_two_names_is_a_site_whichever_name_is_called() -> None:
    (site,) = find_sites(TwoNames(), images(2, 8))
    assert (site.name, site.calls) == ("first", 1)


def test_layers_of_slices_held_as_attributes_are_sites() -> None:
    assert names(find_sites(SlicesAsAttributes(), images(2, 9))) == ["features.0", "features.2"]


def test_a_sequential_that_is_sliced_or_looped_over_runs_nothing_in_sequence() -> None:
    sites = find_sites(SlicedInForward(), images(2, 9))
    assert names(sites) == ["features.0", "features.2"]
    assert not any(site.in_sequence for site in sites)


def test_a_sequential_that_overrides_the_forward_runs_nothing_in_sequence() -> None:
    class Residual(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    model = sequential(Residual(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1)), nn.ReLU())
    assert [site.in_sequence for site in find_sites(model, images(2, 8))] == [False, False]


@pytest.mark.parametrize(
    ("model", "example", "channels", "dims"),
    [
        (nn.Conv1d(3, 8, 3), torch.zeros(2, 3, 9), 8, 1),
        (nn.Conv2d(3, 8, 3), torch.zeros(2, 3, 9, 9), 8, 2),
        (nn.Conv3d(3, 8, 3), torch.zeros(2, 3, 5, 5, 5), 8, 3),
        (nn.ConvTranspose1d(3, 8, 3), torch.zeros(2, 3, 9), 8, 1),
        (nn.ConvTranspose2d(3, 8, 3), torch.zeros(2, 3, 9, 9), 8, 2),
        (nn.Conv2d(4, 8, 3, groups=2, padding="same"), torch.zeros(2, 4, 9, 9), 8, 2),
        (nn.Linear(3, 8), torch.zeros(2, 3), 8, 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_channels_and_dims_are_those_of_the_layers_output(
    model: nn.Module, example: Tensor, channels: int, dims: int
) -> None:
    (site,) = find_sites(nn.Sequential(model, nn.ReLU()), example)
    assert (site.channels, site.dims) == (channels, dims)


def test_a_dense_layer_on_three_dimensional_inputs_is_no_site() -> None:
    found = reasons(survey(TokenMixer(), torch.zeros(2, 5, 6)))
    message = "the output, batch x 5 x 8, is not batch x channels: BatchNorm1d would normalize the wrong axis"
    assert found == {"embed": message, "mix": message, "head": "output layer"}


def test_a_dense_layer_that_is_called_on_three_dimensional_inputs_once_is_no_site_either() -> None:
    class Mixed(TokenMixer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.embed(x[:, 0]).relu().mean()

    assert "the output, batch x 5 x 8, is not" in reasons(survey(Mixed(), torch.zeros(2, 5, 6)))["embed"]


def test_a_dense_layer_that_returns_a_single_number_is_no_site() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
            self.scale = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Any:
            x = self.conv(x).relu().mean((2, 3))
            return self.head(x * self.scale(x.mean(0))[0].relu())

    assert reasons(survey(Single(), images(2, 8)))["scale"].startswith("the output, (1,), is not batch x channels")


def test_a_layer_of_complex_numbers_is_no_site() -> None:
    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.head = nn.Conv2d(3, 4, 1, dtype=torch.cfloat), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Any:
            return self.head(self.mix(torch.fft.fft2(x)).abs().relu().mean((2, 3)))

    found = reasons(survey(Spectrum(), images(2, 8)))
    assert found["mix"] == "complex output, which BatchNorm does not support"


def test_a_conv_that_receives_one_image_without_a_batch_axis_is_a_graph_error_that_names_it() -> None:
    model = sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with pytest.raises(GraphError, match="the layer 0 received one image without a batch axis"):
        find_sites(model, images(1, 9)[0])


def test_a_model_without_layers_has_no_sites() -> None:
    assert survey(nn.Sequential(nn.ReLU(), nn.Flatten()), images(2, 8)) == []


class Marked(Tensor):
    """A class of tensors."""


class OfAnotherClass(nn.Module):
    """A forward with tensors of a class of its own, which no trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.as_subclass(Marked))


def test_a_model_that_cannot_be_traced_is_a_graph_error_with_class_shape_and_way_out() -> None:
    with pytest.raises(GraphError) as caught:
        find_sites(OfAnotherClass(), images(2, 8))
    message = str(caught.value)
    assert message.startswith("torch.export cannot trace OfAnotherClass for an input of shape (2, 3, 8, 8): ")
    assert message.endswith(". Pass a submodule whose forward does not do this")
    assert "test_sites.py:" in message and "return self.conv(x.as_subclass(Marked))" in message
    assert "\n" not in message
    assert caught.value.__cause__ is not None


class OwnCall(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x) * 2


class Unfolding(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        columns = self.weight.flatten(1) @ F.unfold(x, self.kernel_size)
        return columns.unflatten(2, (x.shape[2] - 2, x.shape[3] - 2))


@pytest.mark.parametrize(
    ("layer", "run", "reason"),
    [
        (nn.Conv2d, lambda layer, x: layer.forward(x), "the weight is used, but not by a module call"),
        (nn.Conv2d, lambda layer, x: F.conv2d(x, layer.weight * 2), "the weight is used, but not by a module call"),
        (OwnCall, lambda layer, x: layer(x), "the weight is used, but not by a module call"),
        (Unfolding, lambda layer, x: layer(x), "called, but without a conv or dense operation in the trace"),
        (nn.Conv2d, lambda _, x: x[:, :, 1:-1, 1:-1], "never called in a forward pass"),
    ],
    ids=["forward", "function", "own __call__", "other operations", "never"],
)
def test_the_reason_for_a_layer_that_is_not_called_as_a_module_says_what_is_true(
    layer: type[nn.Conv2d], run: Callable[[nn.Module, Tensor], Tensor], reason: str
) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.conv, self.head = layer(3, 3, 3), nn.Conv2d(3, 3, 3), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.conv(F.relu(run(self.layer, x)))))

    found = reasons(survey(randomised(Network()), images(2, 8)))
    assert found["layer"].partition(":")[0] == reason
    assert found == found | {"conv": "", "head": "output layer"}


def test_a_layer_that_shares_the_weight_of_one_that_is_called_is_never_called() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.spare, self.head = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.Conv2d(3, 4, 1)
            self.spare.weight = self.conv.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.conv(x)))

    assert reasons(survey(randomised(Tied()), images(2, 8)))["spare"] == "never called in a forward pass"


@pytest.mark.parametrize(
    ("example", "further"),
    [
        (features(2, 5), ""),
        (images(1, 16)[0], ". If this is a single image without a batch axis, add one: image.unsqueeze(0)"),
        (images(2, 1), ""),
    ],
    ids=["wrong shape", "no batch axis", "too small"],
)
def test_an_input_that_the_model_cannot_run_on_is_a_graph_error_with_class_shape_and_way_out(
    example: Tensor, further: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(GraphError) as caught:
        find_sites(small_vgg(), example)
    message = str(caught.value)
    assert message.startswith(f"VGG cannot run on an input of shape {tuple(example.shape)}: ")
    assert message.endswith(f". Pass inputs of the shape that it expects{further}")
    assert "\n" not in message
    assert caught.value.__cause__ is not None
    assert capfd.readouterr().err == ""  # torch.export would print a traceback


@pytest.mark.parametrize(
    ("model", "example", "about_size"),
    [
        (small_vgg(), images(2, 1), True),
        (nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * 36, 2)), images(2, 9), True),
        (small_vgg(), images(2, 16)[:, :1], False),
        (Broken(), images(2, 16), False),
    ],
    ids=["too small", "other size", "other channels", "error in the forward"],
)
def test_an_input_of_a_size_that_the_model_cannot_take_names_the_options_that_set_it(
    model: nn.Module, example: Tensor, about_size: bool
) -> None:
    with messages_name_options(), pytest.raises(GraphError, match="cannot run on an input of shape") as caught:
        find_sites(model, example)
    options = " (--resize and --crop for image files, --size for inspect)" if about_size else ""
    assert str(caught.value).endswith(f". Pass inputs of the shape that it expects{options}")


def test_a_model_in_train_mode_has_the_same_sites_and_stays_in_train_mode() -> None:
    model = small_vgg()
    expected = find_sites(model, images(2, 16))
    model.train()
    assert find_sites(model, images(2, 16)) == expected
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("batch", [1, 5])
def test_sites_do_not_depend_on_the_batch_size(batch: int) -> None:
    assert find_sites(small_vgg(), images(batch, 16)) == find_sites(small_vgg(), images(2, 16))


class Measured(nn.Module):
    """A network that notes how many images it, or a copy of it, runs on."""

    ran_on: ClassVar[set[int]] = set()

    def __init__(self, size: int = -1) -> None:
        super().__init__()
        self.conv, self.norm, self.head, self.size = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), size

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Tensor:  # else it is being traced
            self.ran_on.add(len(x))
        return self.head(self.norm(self.conv(x.view(self.size, 3, 8, 8))).relu())  # type: ignore[no-any-return]


def test_of_a_large_example_a_few_images_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Measured, "ran_on", set())
    model, x = randomised(Measured()), images(40, 8)
    found = survey(model, x)
    find_edges(model, x, find_sites(model, x, skip="conv", include_output=True))
    dropouts_before_batchnorm(model, x)
    fold_batchnorm(model, x)
    assert found[0].shape == (7, 8, 6, 6) and max(Measured.ran_on) == 7


def test_a_large_example_is_traced_as_a_whole_where_a_few_images_cannot_run() -> None:
    model, x = randomised(Measured(40)), images(40, 8)
    assert reasons(survey(model, x))["conv"] == "already followed by a normalization: norm"
    assert fold(model, x).folded == ("norm",)


class DenseGate(nn.Module):
    """Channels weighted by dense layers, whose result is expanded to all positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        weights = torch.sigmoid(self.gate(x.mean((2, 3)))).view(-1, 8, 1, 1).expand_as(x)
        return self.head((x * weights).mean((2, 3)).relu())  # type: ignore[no-any-return]


def test_layers_that_compute_a_gate_have_no_site_and_those_whose_output_is_gated_do() -> None:
    assert reasons(survey(DenseGate(), images(2, 8))) == {"stem": "", "gate": GATE, "head": "output layer"}
    found = reasons(survey(SqueezeExcite(), images(2, 8)))
    assert found == {"stem": "", "reduce": GATE, "expand": GATE, "head": "output layer"}


class Gated(nn.Module):
    """A block whose gate multiplies its values in one of several ways."""

    def __init__(self, multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.gate, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)
        self.multiply = multiply

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        gated = self.multiply(x, self.gate(x.mean((2, 3), keepdim=True)).sigmoid())
        return self.head(gated.mean((2, 3)))  # type: ignore[no-any-return]


GATINGS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "repeat": (lambda x, gate: x * gate.repeat(1, 1, *x.shape[2:]), GATE),
    "interpolate": (lambda x, gate: x * F.interpolate(gate, size=x.shape[2:]), GATE),
    "einsum": (lambda x, gate: torch.einsum("nchw,nc->nchw", x, gate[:, :, 0, 0]), GATE),
    "scaled by a constant": (lambda x, code: x + F.interpolate(code, size=x.shape[2:]) * 0.5, ""),
    "an einsum over channels": (lambda x, code: torch.einsum("nchw,nd->ndhw", x, code[:, :, 0, 0]), ""),
    "concatenated": (lambda x, code: torch.cat([x, F.interpolate(code, size=x.shape[2:])], 1)[:, :4], ""),
}


@pytest.mark.parametrize("how", GATINGS)
def test_a_gate_is_found_however_it_is_spread_to_all_positions(how: str) -> None:
    multiply, reason = GATINGS[how]
    found = reasons(survey(Gated(multiply), images(2, 8)))
    assert found == {"stem": "", "gate": reason, "head": "output layer"}


class BroadcastCode(nn.Module):
    """A code expanded to all positions for a conv that decodes it: nothing is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.decode = nn.Linear(6, 4), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.code(x).relu().view(-1, 4, 1, 1).expand(-1, -1, 5, 5))  # type: ignore[no-any-return]


def test_a_layer_whose_output_is_only_expanded_to_all_positions_has_a_site() -> None:
    assert reasons(survey(BroadcastCode(), torch.rand(2, 6))) == {"code": "", "decode": "output layer"}


def test_every_layer_of_squeezenet_is_a_site() -> None:
    model = randomised(torchvision.models.squeezenet1_1())
    layers = survey(model, images(2, 64))
    assert len(layers) == 26
    assert {layer.reason for layer in layers} == {""}
