import gc
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from threading import Thread
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, PythonKeyTracer
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import VGG

from bn_insert import (
    CalibrationError,
    GraphError,
    Moments,
    Site,
    calibrate,
    find_sites,
    insert_at,
    insert_batchnorm,
    inserted_batchnorms,
)
from bn_insert.statistics.moments import moments_of
from bn_insert.statistics.recorder import Recorder
from support.networks import (
    CalledFromTwoSequentials,
    CalledTwice,
    HeldAsAttributes,
    RegisteredBackwards,
    ViewsActivations,
    features,
    images,
    randomised,
    sequential,
    small_vgg,
)
from support.references import activations, assert_moments


class Batch(NamedTuple):
    """A batch that knows which files its images come from."""

    images: Tensor
    paths: tuple[str, ...]


def sites_of(model: nn.Module, example: Tensor, **wishes: Any) -> list[Site]:
    return find_sites(model, example, include_output=True, **wishes)


def calibrated(model: nn.Module, *batches: Any, **wishes: Any) -> dict[str, Moments]:
    """Return the moments of every layer, the output layer included."""
    return calibrate(model, sites_of(model, images(2, 16), **wishes), batches)


def assert_equal(found: dict[str, Moments], expected: dict[str, Moments]) -> None:
    assert found.keys() == expected.keys()
    for name, moments in expected.items():
        assert found[name].count == moments.count
        assert torch.equal(found[name].mean, moments.mean), name
        assert torch.equal(found[name].m2, moments.m2), name


def poisoned(layer: str, value: float = torch.nan, kind: str = "weight") -> VGG:
    model = small_vgg()
    with torch.no_grad():
        getattr(model.get_submodule(layer), kind).view(-1)[-1] = value
    return model


def test_sites_may_be_an_iterator() -> None:
    model, batch = small_vgg(), images(2, 16)
    sites = find_sites(model, batch)
    assert calibrate(model, iter(sites), [batch]).keys() == {site.name for site in sites}
    assert inserted_batchnorms(insert_at(model, iter(sites), calibrate(model, sites, [batch])))


@pytest.mark.parametrize("batch_size", [1, 7, 40])
@pytest.mark.parametrize("placement", ["before_activation", "after_activation"])
def test_every_sites_moments_equal_a_float64_reference_over_the_whole_set(placement: str, batch_size: int) -> None:
    model, whole = small_vgg(), images(40, 16)
    sites = sites_of(model, whole, placement=placement)
    found = calibrate(model, sites, whole.split(batch_size))
    expected = activations(model, [site.anchor for site in sites], [whole])
    assert list(found) == ["features.0", "features.3", "classifier.0", "classifier.3", "classifier.6"]
    for site in sites:
        assert_moments(found[site.name], expected[site.anchor])


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_moments_are_exact_where_the_mean_is_a_thousand_times_the_std(batch_size: int) -> None:
    model = sequential(nn.Conv2d(8, 8, 1), nn.ReLU())
    with torch.no_grad():  # activations are the inputs, so that their own rounding is out of the question
        model[0].weight.copy_(torch.eye(8)[:, :, None, None])
        model[0].bias.zero_()
    whole = images(40, 8, channels=8)
    whole = whole - whole.mean((0, 2, 3), keepdim=True) + 1000 * whole.std((0, 2, 3), keepdim=True)
    assert_moments(calibrate(model, find_sites(model, whole), whole.split(batch_size))["0"], whole)


def test_all_images_count_the_same_whatever_the_batch_they_come_in() -> None:
    model, whole = small_vgg(), images(30, 16)
    whole[20:] += 5
    uneven = calibrated(model, *whole.split([1, 19, 2, 8]))
    even = calibrated(model, whole)
    for name, moments in even.items():
        alive = moments.m2 > 0
        assert uneven[name].count == moments.count
        assert (((uneven[name].mean - moments.mean) / moments.std)[alive].abs() <= 1e-5).all()
        assert ((uneven[name].var / moments.var)[alive] - 1 <= 1e-5).all()


def test_many_batches_give_the_moments_of_one() -> None:
    model = sequential(nn.Linear(6, 8), nn.ReLU())
    whole = features(300, 6)
    found = calibrate(model, find_sites(model, whole), whole.split(1))["0"]
    assert_moments(found, activations(model, ["0"], [whole])["0"])


def test_what_is_held_does_not_grow_with_the_number_of_batches() -> None:
    held: list[int] = []

    def batches(count: int) -> Iterator[Tensor]:
        for number in range(count):
            yield features(2, 6, seed=number)
        held.append(sum(type(value) is Moments for value in gc.get_objects()))

    model = sequential(nn.Linear(6, 8), nn.ReLU())
    calibrate(model, find_sites(model, features(2, 6)), batches(300))
    assert held[0] < 140


def test_an_in_place_activation_behind_the_layer_does_not_change_its_moments() -> None:
    whole = images(8, 16)
    found = {}
    for inplace in (True, False):
        model = sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace), nn.Conv2d(8, 4, 3))
        found[inplace] = calibrate(model, find_sites(model, whole), [whole])
    assert_equal(found[True], found[False])
    assert (found[True]["0"].mean < 0).any()


@pytest.mark.parametrize("placement", ["before_activation", "after_activation"])
def test_the_moments_of_a_layer_called_twice_are_those_of_both_calls(placement: str) -> None:
    model, whole = randomised(CalledTwice()), images(12, 8, channels=8)
    (site, head) = sites_of(model, whole, placement=placement)
    found = calibrate(model, [site, head], whole.split(5))
    assert_moments(found["conv"], activations(model, [site.anchor], [whole])[site.anchor])
    assert found["conv"].count == 2 * 12 * 8 * 8


@pytest.mark.parametrize("network", [CalledTwice, CalledFromTwoSequentials])
def test_both_calls_count_also_where_no_later_site_keeps_the_pass_going(network: type[nn.Module]) -> None:
    model, whole = randomised(network()), images(12, 8, channels=8)
    (site,) = find_sites(model, whole)
    found = calibrate(model, [site], whole.split(5))
    assert_moments(found[site.name], activations(model, [site.anchor], [whole])[site.anchor])


def test_a_forward_that_channels_last_breaks_gives_the_moments_of_its_ordinary_pass() -> None:
    model, whole = randomised(ViewsActivations()), images(12, 8)
    expected = activations(model, ["conv", "hidden"], [whole.clone()])
    found = calibrate(model, find_sites(model, whole), whole.split(5))
    for name in ("conv", "hidden"):
        assert_moments(found[name], expected[name])


@pytest.mark.parametrize("convs", [1, 2])
def test_activations_are_in_channels_last_where_convs_follow_each_other(convs: int) -> None:
    formats: list[bool] = []
    layers = [module for _ in range(convs) for module in (nn.Conv2d(3, 3, 3), nn.ReLU())]
    model, whole = sequential(*layers), images(12, 8)
    sites = find_sites(model, whole, include_output=True)
    model[0].register_forward_hook(lambda _module, _inputs, output: formats.append(output.is_contiguous()))
    calibrate(model, sites, [whole])
    assert formats == [convs == 1]


def test_dropout_is_inactive_in_a_model_that_trains() -> None:
    model, whole = small_vgg(dropout=0.9), images(12, 16)
    expected = calibrated(model, whole)
    assert_equal(calibrated(model.train(), whole), expected)


def test_batchnorm_that_is_there_already_uses_its_running_statistics_and_keeps_them() -> None:
    model = sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    whole = images(12, 16)
    expected = activations(model, ["3"], [whole])["3"]
    before = model[1].running_mean.clone()
    found = calibrate(model.train(), sites_of(model, whole), [whole])
    assert_moments(found["3"], expected)
    assert torch.equal(model[1].running_mean, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_under_autocast_the_statistics_of_the_narrow_activations_are_float32_accurate(dtype: torch.dtype) -> None:
    model, whole = small_vgg(), images(12, 16)
    sites = sites_of(model, whole)
    found = calibrate(model, sites, [whole], autocast=dtype)
    with torch.autocast("cpu", dtype):
        batch = whole.contiguous(memory_format=torch.channels_last)
        expected = activations(model, [site.anchor for site in sites], [batch])
    for site in sites:
        assert expected[site.anchor].dtype == dtype
        assert_moments(found[site.name], expected[site.anchor])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_inputs_take_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    model = small_vgg().to(dtype)
    whole = images(12, 16)
    found = calibrate(model, find_sites(model, whole.to(dtype)), [whole])
    batch = whole.to(dtype).contiguous(memory_format=torch.channels_last)
    assert_moments(found["features.0"], activations(model, ["features.0"], [batch])["features.0"])


def test_an_explicit_device_gives_the_same_moments() -> None:
    model, whole = small_vgg(), images(12, 16)
    sites = find_sites(model, whole)
    assert_equal(calibrate(model, sites, [whole], device="cpu"), calibrate(model, sites, [whole]))


@cache
def from_plain_tensors() -> dict[str, Moments]:
    return calibrated(small_vgg(), *images(12, 16).split(5))


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda x: (x, torch.zeros(len(x))),
        lambda x: [x, {"paths": ["a"]}],
        lambda x: {"pixel_values": x, "labels": torch.zeros(len(x))},
        lambda x: ((x, 1), 2),
        lambda x: [{"image": x}],
        lambda x: Batch(x, ("a",) * len(x)),
        lambda x: x.double(),
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.clone().requires_grad_(),
    ],
    ids=["tuple", "list", "dict", "nested tuple", "nested dict", "named tuple", "float64", "channels_last", "grad"],
)
def test_a_batch_is_a_tensor_or_holds_one_as_its_first_value(wrapped: Callable[[Tensor], Any]) -> None:
    found = calibrated(small_vgg(), *(wrapped(batch) for batch in images(12, 16).split(5)))
    assert_equal(found, from_plain_tensors())


def test_a_data_loader_is_taken_as_it_is() -> None:
    model, whole = small_vgg(), images(12, 16)
    loader = DataLoader(TensorDataset(whole, torch.arange(12)), batch_size=5)
    assert_equal(calibrate(model, sites_of(model, whole), loader), from_plain_tensors())


def test_batches_are_iterated_once() -> None:
    model, whole = small_vgg(), images(12, 16)
    assert_equal(calibrate(model, sites_of(model, whole), iter(whole.split(5))), from_plain_tensors())


def test_an_empty_batch_among_others_counts_for_nothing() -> None:
    model, whole = small_vgg(), images(12, 16)
    assert_equal(calibrated(model, whole, whole[:0]), calibrated(model, whole))


def test_progress_is_told_the_number_of_images_so_far() -> None:
    model, whole, told = small_vgg(), images(12, 16), list[int]()
    calibrate(model, find_sites(model, whole), whole.split(5), progress=told.append)
    assert told == [5, 10, 12]


def test_without_sites_there_is_nothing_to_calibrate() -> None:
    batches = iter(images(4, 16).split(2))
    assert calibrate(small_vgg(), [], batches) == {}
    assert len(list(batches)) == 2


class ImageByImage(nn.Module):
    """Calls its layers once for each image of a batch, or for each part of it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.conv, self.output, self.size = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1), size

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self.output(self.conv(part).relu()) for part in images.split(self.size)])


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("batches", [(2, 8, 8), (4,) * 40, (8, 2, 32, 4)], ids=["growing", "joined", "of all sizes"])
def test_a_layer_called_more_often_for_some_batches_is_measured_on_all_images(
    size: int, batches: Sequence[int]
) -> None:
    model, whole = ImageByImage(size).eval(), images(sum(batches), 12)
    split = whole.split(list(batches))
    found = calibrate(model, find_sites(model, split[0]), split)
    assert_moments(found["conv"], model.conv(whole))


def test_a_classifier_that_holds_nan_does_no_harm_behind_the_last_site() -> None:
    model, whole = poisoned("classifier.0"), images(12, 16)
    assert_equal(calibrated(model, whole, layers=("conv",)), calibrated(small_vgg(), whole, layers=("conv",)))


@pytest.mark.parametrize(
    ("layer", "kind", "value"),
    [
        ("features.0", "weight", torch.nan),
        ("features.0", "bias", torch.inf),
        ("features.3", "weight", -torch.inf),
        ("classifier.3", "weight", torch.inf),
        ("classifier.3", "bias", torch.nan),
    ],
)
def test_a_parameter_that_is_not_finite_is_named(layer: str, kind: str, value: float) -> None:
    with pytest.raises(CalibrationError) as caught:
        calibrated(poisoned(layer, value, kind), images(12, 16))
    assert str(caught.value) == (
        f"the activations of {layer} are not finite in torch.float32: the parameter {layer}.{kind} contains NaN or "
        "Inf; repair the checkpoint, or skip the layers downstream of it"
    )


def test_a_parameter_in_front_of_the_site_is_named_where_its_own_layer_is_no_site() -> None:
    with pytest.raises(CalibrationError, match=r"of classifier\.0 are not finite.*: the parameter features\.3\.weight"):
        calibrated(poisoned("features.3"), images(12, 16), layers=("dense",))


def test_a_parameter_is_named_also_where_layers_are_registered_in_another_order_than_called() -> None:
    model = randomised(RegisteredBackwards())
    with torch.no_grad():
        model.conv.weight[0] = torch.nan
    with pytest.raises(CalibrationError, match=r"of hidden are not finite.*: the parameter conv\.weight contains NaN"):
        calibrated(model, images(12, 16), layers=("dense",))


def test_an_input_that_is_not_finite_is_named_by_its_path() -> None:
    batch = Batch(images(4, 16), ("a.png", "b.png", "c.png", "d.png"))
    batch.images[2, 1, 4, 4] = torch.nan
    with pytest.raises(CalibrationError) as caught:
        calibrated(small_vgg(), images(4, 16), batch)
    assert str(caught.value) == (
        "the activations of features.0 are not finite in torch.float32, first in c.png; check that input"
    )


def test_an_input_that_is_not_finite_is_named_by_its_number_where_it_has_no_path() -> None:
    batch = images(4, 16)
    batch[1:, 1, 4, 4] = torch.inf
    with pytest.raises(CalibrationError, match=r"not finite in torch\.float32, first in image 1 of batch 0;"):
        calibrated(small_vgg(), batch)


def test_an_overflow_in_a_narrow_dtype_names_the_dtype() -> None:
    model = sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).half()
    with pytest.raises(
        CalibrationError,
        match=r"^the activations of 0 are not finite in torch\.float16, first .*; run in float32, or check that input$",
    ):
        calibrate(model, find_sites(model, images(2, 8).half()), [images(4, 8) * 60_000])


@pytest.mark.parametrize(
    ("batch", "described"),
    [
        ("images", "a str"),
        (7, "an int"),
        (None, "None"),
        ((), "an empty tuple"),
        ([], "an empty list"),
        ({}, "an empty dict"),
        (("label", images(2, 16)), "a tuple (str, Tensor)"),
    ],
    ids=repr,
)
def test_a_batch_without_a_tensor_is_described(batch: Any, described: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        calibrated(small_vgg(), images(2, 16), batch)
    assert str(caught.value) == (
        f"batch 1 is {described}; a batch is a tensor, or a tuple, list or dict whose first value is the input tensor"
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_where_a_network_cannot_run_on_integers_the_advice_is_to_convert_them(dtype: torch.dtype) -> None:
    advice = rf"\. The inputs are {dtype}: convert and scale images to floating point first, as for training, and put"
    with pytest.raises(CalibrationError, match=advice):
        calibrated(small_vgg(), images(2, 16).to(dtype))
    with pytest.raises(GraphError, match=advice):
        insert_batchnorm(small_vgg(), [images(2, 16).to(dtype)])


def test_a_model_that_fails_on_a_later_batch_names_it_and_keeps_the_cause() -> None:
    with pytest.raises(CalibrationError) as caught:
        calibrated(small_vgg(), images(3, 16), images(2, 16), images(4, 16, channels=5))
    assert str(caught.value).startswith("the model failed on batch 2 of shape (4, 5, 16, 16): ")
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("batches", [(), (images(0, 16),)], ids=["no batch", "an empty batch"])
def test_an_empty_calibration_set_is_refused(batches: tuple[Tensor, ...]) -> None:
    with pytest.raises(CalibrationError, match=r"^the calibration set is empty: the iterable yielded no batches$"):
        calibrated(small_vgg(), *batches)


def test_a_site_that_is_never_called_on_the_calibration_set_is_named() -> None:
    model = randomised(HeldAsAttributes())
    model.spare = nn.Conv2d(3, 8, 3)
    sites = find_sites(model, images(2, 9))
    sites[1] = Site("spare", "conv", "spare", channels=8, dims=2, calls=1, in_sequence=False)
    with pytest.raises(CalibrationError, match=r"^the layer spare was never called on the calibration set$"):
        calibrate(model, sites, [images(4, 9)])


def test_one_image_is_too_few_for_a_dense_site_which_is_named() -> None:
    with pytest.raises(CalibrationError) as caught:
        insert_batchnorm(small_vgg(), [images(1, 16)])
    assert str(caught.value) == (
        "dense layer classifier.0: a variance needs at least two values per channel and the calibration set has 1; "
        "calibrate on more images"
    )


def test_one_image_is_enough_for_conv_sites() -> None:
    insert_batchnorm(small_vgg(), [images(1, 16)], layers=("conv",))


@pytest.mark.parametrize(("scale", "dtype"), [(1e25, torch.float32), (1e30, torch.bfloat16)])
def test_finite_activations_whose_variance_overflows_are_not_called_infinite(scale: float, dtype: torch.dtype) -> None:
    model = sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(dtype)
    with pytest.raises(CalibrationError, match=r"^conv layer 0: mean or variance is not finite in torch\.float32$"):
        insert_batchnorm(model, [images(4, 8) * scale])


def test_recording_leaves_alone_what_another_thread_is_exporting(monkeypatch: pytest.MonkeyPatch) -> None:
    key = torch._C._TorchDispatchModeKey.PROXY
    mode = ProxyTorchDispatchMode(PythonKeyTracer(), "symbolic", pre_dispatch=True)
    seen: list[object] = []

    def watched(values: Tensor) -> Moments:
        seen.append(torch._ops._get_dispatch_mode_pre_dispatch(key))
        return moments_of(values)

    monkeypatch.setattr("bn_insert.statistics.recorder.moments_of", watched)
    torch._ops._set_mode_pre_dispatch(mode)  # as torch.export does, for all threads
    try:
        thread = Thread(target=lambda: Recorder().record("conv", torch.rand(4, 3)))
        thread.start()
        thread.join()
    finally:
        torch._ops.unset_mode_pre_dispatch(key)
    assert seen == [mode]


class WithMask(nn.Conv2d):
    """Returns a mask too, as partial convolutions do."""

    def forward(self, input: Tensor) -> Any:  # noqa: A002 - as in nn.Conv2d
        return super().forward(input), input > 0


def test_a_layer_that_returns_more_than_a_tensor_is_named_with_the_way_out() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = WithMask(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Any:
            return self.head(self.second(self.first(x)[0].relu()).relu().mean((2, 3)))

    with pytest.raises(
        CalibrationError, match=r"the layer first returns a tuple instead of a tensor.*skip=\['first'\]"
    ):
        insert_batchnorm(Masked().eval(), [images(4, 9)])
    assert inserted_batchnorms(insert_batchnorm(Masked().eval(), [images(4, 9)], skip=["first"])) == ["second.1"]
