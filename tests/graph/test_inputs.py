"""What a model takes: the parameters of its forward, or of its class's own `__call__`."""

from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bn_insert import CalibrationError, GraphError, forward_inputs, insert
from support.idioms import traced_by_fx
from support.networks import images, randomised, small_vgg


class TwoConvs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mask, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(1, 8, 3), nn.Linear(8, 4)

    def run(self, image: Tensor, mask: Tensor) -> Tensor:
        return self.head((F.relu(self.conv(image)) + F.relu(self.mask(mask))).mean((2, 3)))


class CallTakesTwo(TwoConvs):
    """No forward at all."""

    def __call__(self, image: Tensor, mask: Tensor) -> Tensor:
        return self.run(image, mask)


class CallTakesMore(TwoConvs):
    """A forward that takes less than `__call__`."""

    def __call__(self, image: Tensor, mask: Tensor) -> Tensor:
        return self.run(image * 2, mask)

    def forward(self, image: Tensor) -> Tensor:
        return self.run(image, image[:, :1])


class ForwardIsNone(TwoConvs):
    forward = None

    def __call__(self, image: Tensor, mask: Tensor) -> Tensor:
        return self.run(image, mask)


class PassesOn(TwoConvs):
    def __call__(self, *args: Any, **options: Any) -> Any:
        return super().__call__(*args, **options)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return self.run(image, mask)


@pytest.mark.parametrize("kind", [CallTakesTwo, CallTakesMore, ForwardIsNone, PassesOn])
@pytest.mark.parametrize("named", [False, True], ids=["tuples", "dicts"])
def test_the_inputs_of_a_class_with_its_own_call_are_those_of_its_call(
    kind: Callable[[], nn.Module], named: bool
) -> None:
    model, pairs = (
        randomised(kind()),
        [(images(4, 8, seed=seed), images(4, 8, seed=seed, channels=1)) for seed in (1, 2)],
    )
    assert forward_inputs(model).names == ("image", "mask")
    batches = [dict(zip(("image", "mask"), pair, strict=True)) for pair in pairs] if named else pairs
    insertion = insert(model, batches)
    assert [site.name for site in insertion.sites] == ["conv", "mask"] and not insertion.fault
    assert torch.equal(insertion.model(*pairs[0]), model(*pairs[0]))


def test_a_call_that_passes_everything_on_has_the_inputs_of_the_forward() -> None:
    assert forward_inputs(traced_by_fx()).names == ("input",)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "the model is None"),
        ("vgg16.pth", "the model is a path, 'vgg16.pth'"),
        ({"weight": torch.ones(1)}, "the model is a dict, perhaps a state dict"),
        (nn.Linear, "the model is Linear, which is not a torch.nn.Module; if it builds one, call it"),
        (type("NoForward", (nn.Module,), {"forward": None})(), "NoForward has no forward, but None in its place"),
    ],
    ids=["None", "path", "dict", "class", "no forward"],
)
def test_what_is_no_model_is_a_graph_error_with_the_way_out(model: Any, message: str) -> None:
    with pytest.raises(GraphError, match=f"^{message}"):
        forward_inputs(model)


def test_a_dict_for_a_parameter_that_is_not_annotated_as_one_is_told_how_to_be_passed() -> None:
    class TakesDict(TwoConvs):
        def forward(self, batch: Any) -> Any:
            return super().forward(batch["image"])

    with pytest.raises(
        GraphError, match=r"and if its forward takes a dict, annotate that parameter as one \(batch: dict\)"
    ):
        insert(TakesDict(), [{"image": images(4, 16)}])


class TakesPairs(TwoConvs):
    def forward(self, batch: Any) -> Any:
        image, labels = batch
        return super().run(image, image[:, :1]) + labels.view(-1, 1)


def test_a_tuple_for_a_parameter_that_is_not_annotated_as_one_is_told_how_to_be_passed() -> None:
    class Annotated(TakesPairs):
        def forward(self, batch: tuple[Tensor, Tensor]) -> Any:
            return super().forward(batch)

    batch = (images(4, 16), torch.zeros(4))
    with pytest.raises(GraphError, match=r"if its forward takes a tuple, annotate that parameter .* \(batch: tuple\)"):
        insert(TakesPairs(), [batch])
    assert insert(Annotated(), [batch]).images == 4


class SeveralViews(TwoConvs):
    def forward(self, views: list[Tensor]) -> Any:
        return sum(self.head(F.relu(self.conv(view)).mean((2, 3))) for view in views)


class OneView(TwoConvs):
    def forward(self, view: Tensor) -> Any:
        return self.head(F.relu(self.conv(view)).mean((2, 3)))


@pytest.mark.parametrize("with_labels", [False, True])
def test_a_parameter_that_is_annotated_as_a_list_gets_all_tensors_of_a_batch(with_labels: bool) -> None:
    views = [images(4, 16), 5 * images(4, 16, seed=1)]
    model = randomised(SeveralViews()).eval()
    insertion = insert(model, [(views, torch.zeros(4))] if with_labels else [views])
    assert insertion.moments["conv"].count == 2 * 4 * 14**2
    assert not insertion.fault


@pytest.mark.parametrize(
    ("annotation", "kind"),
    [
        (list[Tensor], list),
        ("List", list),
        ("list[Tensor] | None", list),
        ("typing.Sequence[Tensor]", list),
        (tuple[Tensor, Tensor], tuple),
        (list[Tensor] | Tensor, None),
        ("Optional[Tensor]", None),
        (Tensor, None),
    ],
)
def test_only_an_annotation_as_a_sequence_alone_stands_for_one(annotation: Any, kind: type | None) -> None:
    class Annotated(TwoConvs):
        def forward(self, views: Any) -> Any:
            return super().forward(views)

    Annotated.forward.__annotations__["views"] = annotation
    assert forward_inputs(Annotated()).sequence is kind


def test_a_list_is_passed_by_name_where_a_parameter_is_keyword_only() -> None:
    class ByName(TwoConvs):
        def forward(self, *, views: tuple[Tensor, ...]) -> Any:
            assert isinstance(views, tuple)
            return sum(self.head(F.relu(self.conv(view)).mean((2, 3))) for view in views)

    assert insert(ByName().eval(), [[images(4, 16), images(4, 16)]]).moments["conv"].count == 2 * 4 * 14**2


def test_several_inputs_for_a_forward_that_takes_one_are_refused_instead_of_left_out() -> None:
    batch = ([images(4, 16), images(4, 16, seed=1)], torch.zeros(4))
    message = r"batch 0 has a list of 2 inputs, but OneView takes one: view; .* \(view: list\[Tensor\]\), and otherwise"
    with pytest.raises(CalibrationError, match=message):
        insert(OneView(), [batch])


ARRAY, IMAGE = np.zeros((3, 16, 16), np.float32), torch.zeros(3, 16, 16)


@pytest.mark.parametrize(
    ("batch", "described"),
    [
        ([[ARRAY, 1], [ARRAY, 2]], r"a list of 2 lists \(ndarray, int\)"),
        ([(IMAGE, 1), (IMAGE, 2)], r"a list of 2 tuples \(Tensor, int\)"),
        ([(IMAGE, torch.tensor(1)), (IMAGE, torch.tensor(2))], r"a list of 2 tuples \(Tensor, Tensor\)"),
        ([{"image": IMAGE, "label": "cat"}] * 3, r"a list of 3 dicts \(Tensor, str\)"),
        ([[0.0, 1.0]], r"a list of 1 list \(float, float\)"),
        ((ARRAY, 1), r"a tuple \(ndarray, int\)"),
        ((PIL.Image.new("RGB", (16, 16)), 1), r"a tuple \(Image, int\)"),
        ({"image": ARRAY}, r"a dict \(ndarray\)"),
        (ARRAY, "an ndarray"),
    ],
)
def test_what_is_no_batch_is_described_with_the_ways_to_make_batches_of_it(batch: Any, described: str) -> None:
    message = (
        rf"^batch 0 is {described}; a batch is a tensor, .*; to make batches, use DataLoader\(.* torch\.stack .*image$"
    )
    with pytest.raises(CalibrationError, match=message):
        insert(small_vgg(), [batch])


@pytest.mark.parametrize(
    ("batch", "described"),
    [
        ({"path": ["a", "b"], "image": images(2, 16)}, r"a dict \(list, Tensor\)"),
        ([None, images(2, 16)], r"a list \(NoneType, Tensor\)"),
        (["a.png", "b.png"], r"a list \(str, str\)"),
        ([[]], r"a list \(list\)"),
        (np.array(1), "an ndarray"),
    ],
)
def test_what_does_not_begin_with_a_tensor_is_described(batch: Any, described: str) -> None:
    with pytest.raises(CalibrationError, match=rf"^batch 0 is {described}; .* whose first value is the input tensor"):
        insert(small_vgg(), [batch])


@pytest.mark.parametrize("batch", [[(ARRAY, 1), (ARRAY, 2)], (ARRAY, ARRAY), {"image": ARRAY, "mask": ARRAY}])
def test_arrays_for_several_inputs_are_refused_with_the_ways_to_make_batches(batch: Any) -> None:
    message = (
        r"^batch 0 is a (list of 2 tuples|tuple|dict) \(ndarray, .* takes image, mask; .* torch\.from_numpy for an "
    )
    with pytest.raises(CalibrationError, match=message):
        insert(CallTakesTwo(), [batch])


@pytest.mark.parametrize("batch", [IMAGE, (IMAGE, 1), [IMAGE, IMAGE, IMAGE]], ids=["image", "sample", "list"])
def test_a_network_that_cannot_run_on_one_image_without_a_batch_axis_is_told_so(batch: Any) -> None:
    message = (
        r"cannot run on an input of shape \(3, 16, 16\): .* If this is a single image without a batch axis, add one"
    )
    with pytest.raises(GraphError, match=message):
        insert(small_vgg(), [batch])


def test_a_batch_of_inputs_and_labels_in_containers_is_no_list_of_samples() -> None:
    model, x = small_vgg(), images(4, 16)
    for batch in [((x, "path"), (torch.zeros(4),)), [[x, 1], torch.zeros(4)], [{"image": x, "epoch": 3}]]:
        assert insert(model, [batch]).images == 4


def test_containers_with_batches_and_numbers_are_no_samples_and_the_first_one_is_read() -> None:
    model, x = small_vgg(), images(4, 16)
    for batch in [[(x, 1), (x, 2)], ((x, "a"), (x, "b")), [{"image": x, "epoch": 3}] * 2]:
        assert insert(model, [batch]).images == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int8])
def test_inputs_get_the_dtype_of_the_first_weight_whatever_scale_is_before_it(dtype: torch.dtype) -> None:
    class Tempered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((1,), 2, dtype=dtype), requires_grad=False)
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Any:
            return self.head(F.relu(self.conv(x))) / self.scale

    model, x = Tempered().eval(), images(4, 8).double()
    result = insert(model, [x]).model
    assert torch.equal(result(x.float()), model(x.float()))
