"""Checkpoints of other architectures than VGG: the changes by bn-insert are stored, and replayed on load."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.feature_extraction import create_feature_extractor

from bn_insert import (
    CheckpointError,
    fold,
    fold_batchnorm,
    insert_batchnorm,
    inserted_batchnorms,
    load_checkpoint,
    recalibrate,
    replace_head,
    replace_output,
    save_checkpoint,
)
from bn_insert.graph.copies import unwrapped
from bn_insert.surgery.history import (
    AdaptedStatistics,
    FoldedBatchNorms,
    History,
    InsertedBatchNorms,
    ReplacedHead,
    ReplacedOutput,
)
from support.networks import AWKWARD, HeldAsAttributes, images, randomised, small_vgg
from support.vgg_specs import Conv, Dense, Spec, vgg_of

BOTH_FORMATS = pytest.mark.parametrize("name", ["network.pth", "network.safetensors"])


class WithoutBiases(nn.Module):
    """A conv without bias held as an attribute, one in a Sequential, and a BatchNorm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8, eps=1e-3), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x).relu()).mean((2, 3)))


def read_back(network: nn.Module, path: Path, make: Callable[[], nn.Module]) -> nn.Module:
    """Save a network and load it into what its function makes; the two are the same."""
    save_checkpoint(network, path, overwrite=True)
    result = load_checkpoint(path, model=make)
    assert repr(result) == repr(network)
    assert inserted_batchnorms(result) == inserted_batchnorms(network)
    expected, actual = network.state_dict(), result.state_dict()
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    assert all(parameter.requires_grad for parameter in result.parameters())
    return result


@pytest.mark.parametrize(
    "trace",
    [torch.fx.symbolic_trace, lambda network: create_feature_extractor(network, {"2": "features"})],
    ids=["torch.fx", "torchvision"],
)
def test_a_graph_module_keeps_its_history_in_every_copy(
    trace: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    def make() -> nn.Module:
        return trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)))

    x = images(4, 8)
    inserted = insert_batchnorm(make(), [x])
    for network in (recalibrate(inserted, [x]), copy.deepcopy(inserted), fold_batchnorm(copy.deepcopy(inserted), x)):
        assert History.of(network).changes
        save_checkpoint(network, tmp_path / "network.pth", overwrite=True)
        loaded = load_checkpoint(tmp_path / "network.pth", model=make)
        assert torch.equal(first(loaded(x)), first(copy.deepcopy(network).eval()(x)))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda network: torch.compile(network, backend="eager")])
def test_a_function_may_return_a_wrapped_network(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    def make() -> nn.Module:
        return wrap(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)))

    x = images(4, 8)
    inserted = insert_batchnorm(make(), [x])
    save_checkpoint(inserted, tmp_path / "network.pth")
    assert torch.equal(load_checkpoint(tmp_path / "network.pth", model=make)(x), inserted.eval()(x))
    given = make()
    assert load_checkpoint(tmp_path / "network.pth", model=given) is not unwrapped(given)


def first(output: Any) -> Tensor:
    return next(iter(output.values())) if isinstance(output, dict) else output


def refusal_of(action: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as refusal:
        action()
    return str(refusal.value)


@BOTH_FORMATS
@pytest.mark.parametrize("make", AWKWARD)
def test_an_inserted_network_comes_back_through_the_function_that_makes_it_without(
    make: Callable[[], nn.Module], name: str, tmp_path: Path
) -> None:
    original, x = randomised(make()), images(6, size=12)
    inserted = insert_batchnorm(original, [x], include_output=True, eps=1e-3, momentum=None)
    result = read_back(inserted, tmp_path / name, make)
    assert torch.equal(first(result(x)), first(original(x)))
    norms = [module for module in result.modules() if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d)]
    assert norms
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, None)}


def test_a_chain_of_changes_comes_back_at_every_step(tmp_path: Path) -> None:
    path, make, x = tmp_path / "network.pth", HeldAsAttributes, images(6, size=12)
    network = read_back(randomised(make()), path, make)
    network = read_back(insert_batchnorm(network, [x], layers="conv", placement="before_activation"), path, make)
    network = read_back(insert_batchnorm(network, [x], layers="dense", equalize=True), path, make)
    replace_output(network, 7)
    network = read_back(network, path, make)
    assert network(x).shape == (6, 7)
    folded = read_back(fold_batchnorm(network, x), path, make)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in folded.modules())
    replace_output(folded, 5)
    again = read_back(folded, path, make)
    # Keys and shapes are those that the function gives: nothing has to be done to it, and so nothing is recorded.
    assert History.of(again) == History()


def test_biases_that_folding_made_and_batchnorms_that_it_took_out_come_back(tmp_path: Path) -> None:
    path, x = tmp_path / "network.pth", images(6, size=12)
    inserted = insert_batchnorm(randomised(WithoutBiases()), [x])
    with torch.no_grad():
        inserted.stem[1].bias += 1
    folded = read_back(fold_batchnorm(inserted, x), path, WithoutBiases)
    assert folded.stem.bias is not None
    assert not isinstance(folded.body[1], nn.BatchNorm2d)
    torch.testing.assert_close(folded(x), inserted(x))


def test_an_architecture_that_has_the_batchnorms_already_is_filled_as_it_is(tmp_path: Path) -> None:
    x = images(6, size=12)
    inserted = insert_batchnorm(randomised(HeldAsAttributes()), [x])
    result = read_back(inserted, tmp_path / "network.pth", lambda: insert_batchnorm(HeldAsAttributes(), [x]))
    assert torch.equal(result(x), inserted(x))


def test_a_network_that_is_a_single_layer_comes_back(tmp_path: Path) -> None:
    x = images(6, size=12)
    inserted = insert_batchnorm(randomised(nn.Conv2d(3, 8, 3)), [x], include_output=True)
    result = read_back(inserted, tmp_path / "network.pth", lambda: nn.Conv2d(3, 8, 3))
    read_back(fold_batchnorm(result, x), tmp_path / "network.pth", lambda: nn.Conv2d(3, 8, 3))


def test_float64_comes_back(tmp_path: Path) -> None:
    x = images(6, size=12).double()
    inserted = insert_batchnorm(randomised(HeldAsAttributes()).double(), [x])
    read_back(inserted, tmp_path / "network.pth", lambda: HeldAsAttributes().double())


def test_a_vgg_is_still_read_without_a_function_and_keeps_what_was_done(tmp_path: Path) -> None:
    path, x = tmp_path / "vgg.pth", images(6, size=16)
    save_checkpoint(insert_batchnorm(small_vgg(), [x], layers="conv"), path)
    both = insert_batchnorm(load_checkpoint(path), [x], layers="dense")
    save_checkpoint(both, path, overwrite=True)
    assert torch.equal(load_checkpoint(path)(x), load_checkpoint(path, model=small_vgg)(x))


def test_what_was_inserted_in_a_vgg_with_some_batchnorm_is_known_after_every_change(tmp_path: Path) -> None:
    path, x = tmp_path / "vgg.pth", images(6, size=16)
    vgg = vgg_of(Spec((Conv(norm="before"), Conv(5, pool=True), Conv(6)), (Dense(), Dense(7, norm="before"))))
    own = [name for name, module in vgg.named_modules() if isinstance(module, _BatchNorm)]
    assert inserted_batchnorms(vgg) == []
    network: nn.Module = vgg
    for change in (
        lambda network: insert_batchnorm(network, [x], layers="dense"),
        lambda network: fold(network, x, names=own[:1]).model,
        lambda network: insert_batchnorm(network, [x], layers="conv"),
        replaced_head,
    ):
        network = change(network)
        save_checkpoint(network, path, overwrite=True)
        assert inserted_batchnorms(load_checkpoint(path)) == inserted_batchnorms(network) != []


def replaced_head(network: nn.Module) -> nn.Module:
    replace_head(network, 4, 3)
    return network


def test_mismatches_are_listed_after_the_changes(tmp_path: Path) -> None:
    path = tmp_path / "network.pth"
    save_checkpoint(insert_batchnorm(randomised(HeldAsAttributes()), [images(6, size=12)]), path)

    def other() -> nn.Module:
        network = HeldAsAttributes()
        network.heads["logits"] = nn.Linear(12, 6)
        return network

    message = refusal_of(lambda: load_checkpoint(path, model=other))
    assert "does not fit HeldAsAttributes with the changes recorded in its settings: heads.logits.weight" in message
    assert "(5, 12) in the file and (6, 12) in the model" in message
    message = refusal_of(lambda: load_checkpoint(path, model=WithoutBiases))
    assert "cannot be made to WithoutBiases: there is no layer 'blocks.0'" in message


# The function by its name


def test_a_function_s_name_is_imported_and_stored_and_never_imported_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nets_by_name.py").write_text(
        "from pathlib import Path\nfrom support.networks import HeldAsAttributes\n"
        "Path(__file__).with_name('imported').touch()\ndef make():\n    return HeldAsAttributes()\n"
    )
    path, x = tmp_path / "network.pth", images(6, size=12)
    torch.save(randomised(HeldAsAttributes()).state_dict(), path)
    monkeypatch.syspath_prepend(tmp_path)
    inserted = insert_batchnorm(load_checkpoint(path, model="nets_by_name:make"), [x])
    save_checkpoint(inserted, tmp_path / "bn.pth")
    (tmp_path / "imported").unlink()
    monkeypatch.delitem(__import__("sys").modules, "nets_by_name")
    message = refusal_of(lambda: load_checkpoint(tmp_path / "bn.pth"))
    assert "name the function that builds its network, nets_by_name:make" in message
    assert "pass model='nets_by_name:make'" in message
    assert not (tmp_path / "imported").exists()
    result = load_checkpoint(tmp_path / "bn.pth", model="nets_by_name:make")
    assert (tmp_path / "imported").exists()
    assert torch.equal(result(x), inserted(x))


@pytest.mark.parametrize(
    ("code", "name", "fragment"),
    [
        ("", "given_nets", "'given_nets' does not name a function; write package.module:function"),
        ("", "given_nets:", "does not name a function"),
        ("", "given_nets:make it", "does not name a function"),
        ("", "no.such:make", "no.such:make: there is no module no.such to import; run in the folder that contains it"),
        ("", "given_nets.py:make", "there is no module given_nets.py to import; write given_nets:make"),
        ("import no_such_thing", "given_nets:make", "raised ModuleNotFoundError: No module named 'no_such_thing'"),
        ("1 / 0", "given_nets:make", "importing given_nets for given_nets:make raised ZeroDivisionError: division by"),
        ("def make(:", "given_nets:make", "importing given_nets for given_nets:make raised SyntaxError"),
        ("raise SystemExit(3)", "given_nets:make", "raised SystemExit: 3"),
        ("", "given_nets:make", "the module given_nets has no make"),
        ("make = 3", "given_nets:make", "given_nets:make is an int, not a function that returns a network"),
        ("def make(classes): ...", "given_nets:make", "given_nets:make(classes) cannot be called without arguments"),
        ("def make(): raise ValueError('no weights')", "given_nets:make", "make raised ValueError: no weights"),
        ("def make(): return 'net'", "given_nets:make", "given_nets:make returned a str, not a torch.nn.Module"),
    ],
)
def test_a_name_that_gives_no_network_is_one_message(
    code: str, name: str, fragment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "given_nets.py").write_text(code)
    torch.save({"weight": torch.ones(2, 2)}, tmp_path / "network.pth")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "given_nets", raising=False)
    assert fragment in refusal_of(lambda: load_checkpoint(tmp_path / "network.pth", model=name))


# What a stranger's settings may say


HEAD = {"new_head": ["heads.logits", "heads.logits"], "width": 4, "classes": 3}
SITE = {
    "name": "stem",
    "kind": "conv",
    "anchor": "stem",
    "channels": 8,
    "dims": 2,
    "calls": 1,
    "in_sequence": False,
}


@pytest.mark.parametrize(
    ("architecture", "fragment"),
    [
        ([], "the field architecture is wrong: expected object, got array"),
        ({"function": "os:system; rm"}, "architecture.function is 'os:system; rm', not package.module:function"),
        ({"function": 3}, "architecture.function is wrong: expected str | null, got int"),
        ({"code": "x"}, "unknown field architecture.code"),
        ({"changes": {}}, "architecture.changes is wrong: expected array, got object"),
        ({"changes": [{"insert": []}] * 1001}, "architecture.changes is wrong: expected array of length <= 1000"),
        ({"changes": [{"exec": "x"}]}, "architecture.changes[0] is not a change that this version of bn-insert knows"),
        ({"changes": [3]}, "architecture.changes[0] is wrong: expected object, got int"),
        ({"changes": [{"insert": 3}]}, "architecture.changes[0].insert is wrong: expected array, got int"),
        ({"changes": [{"insert": [{}]}]}, "the field architecture.changes[0].insert[0].name is missing"),
        ({"changes": [{"insert": [SITE | {"dims": 9}]}]}, "insert[0].dims is wrong: expected int <= 3, got 9"),
        ({"changes": [{"insert": [SITE | {"kind": "x"}]}]}, "insert[0].kind is wrong: invalid enum value 'x'"),
        ({"changes": [{"insert": [SITE | {"channels": 2**40}]}]}, "insert[0].channels is wrong: expected int <= 21474"),
        ({"changes": [{"insert": [SITE | {"channels": True}]}]}, "insert[0].channels is wrong: expected int, got bool"),
        ({"changes": [{"insert": [SITE | {"x": 1}]}]}, "unknown field architecture.changes[0].insert[0].x"),
        ({"changes": [{"insert": [SITE, SITE]}]}, "inserts two BatchNorms at one place"),
        ({"changes": [{"fold": []}]}, "architecture.changes[0].fold is wrong: expected object, got array"),
        ({"changes": [{"fold": {}, "new_biases": [1]}]}, "new_biases[0] is wrong: expected str, got int"),
        (
            {"changes": [{"new_output": "fc", "classes": -1}]},
            "architecture.changes[0].classes is wrong: expected int >= 1, got -1",
        ),
        ({"changes": [HEAD | {"new_head": "heads.logits"}]}, "new_head is wrong: expected array, got str"),
        ({"changes": [HEAD | {"new_head": ["stem", "heads.logits"]}]}, "new_head names layers of two modules"),
        ({"changes": [HEAD | {"width": 1 << 17}]}, "width is wrong: expected int <= 65536, got 131072"),
        ({"changes": [HEAD | {"classes": 0}]}, "classes is wrong: expected int >= 1, got 0"),
        ({"changes": [{"adapt": -1}]}, "architecture.changes[0].adapt is wrong: expected int >= 0, got -1"),
        ({"changes": [HEAD | {"depth": 2}]}, "unknown field architecture.changes[0].depth"),
        ({"changes": [HEAD | {"new_head": ["stem", "stem"]}]}, "stem and stem are not both dense layers"),
        ({"changes": [HEAD | {"new_head": ["gone", "gone"]}]}, "there is no layer 'gone'"),
        ({"changes": [HEAD]}, "heads.logits.0.weight is not in the file"),
        ({"changes": [{"insert": [SITE | {"name": "gone"}]}]}, "there is no layer 'gone'"),
        ({"changes": [{"insert": [SITE | {"anchor": "gone"}]}]}, "there is no layer 'gone'"),
        ({"changes": [{"insert": [SITE | {"name": "blocks"}]}]}, "blocks is a ModuleList, not a conv or dense layer"),
        ({"changes": [{"insert": [SITE | {"channels": 2**30}]}]}, "stem.1.weight is not in the file"),
        ({"changes": [{"fold": {"stem": True}}]}, "stem is a Conv2d, not a BatchNorm"),
        ({"changes": [{"fold": {}, "new_biases": ["blocks"]}]}, "blocks is a ModuleList, not a conv or dense layer"),
        (
            {"changes": [{"new_output": "blocks", "classes": 3}]},
            "blocks is a ModuleList, not a dense layer or a Conv2d",
        ),
        ({"changes": [{"new_output": "heads.logits", "classes": 2**30}]}, "heads.logits.weight is not in the file"),
    ],
)
def test_changes_that_a_stranger_wrote_are_checked(architecture: object, fragment: str, tmp_path: Path) -> None:
    path = tmp_path / "network.pth"
    network = HeldAsAttributes()
    network.extra = nn.Linear(1, 1)  # so that the file does not fit before the changes
    save_checkpoint(network, path)
    state = torch.load(path)
    settings = json.loads(state._metadata[""]["bn_insert"])
    state._metadata[""]["bn_insert"] = json.dumps(settings | {"architecture": architecture})
    if "logits" in fragment:
        del state["heads.logits.weight"], state["heads.logits.bias"]
    torch.save(state, path)
    assert fragment in refusal_of(lambda: load_checkpoint(path, model=HeldAsAttributes))


@pytest.mark.parametrize(
    "change",
    [
        {"insert": [SITE | {"name": "features", "anchor": "features"}]},
        {"insert": [SITE | {"name": "features", "anchor": "features", "in_sequence": True}]},
        {"insert": [SITE | {"name": "features.0", "anchor": f"features.{n}", "in_sequence": True} for n in (0, 100)]},
    ],
)
def test_changes_that_do_not_fit_a_vgg_with_its_own_keys_mark_nothing(change: object, tmp_path: Path) -> None:
    path = tmp_path / "vgg.pth"
    save_checkpoint(insert_batchnorm(small_vgg(), [images(6, size=16)]), path)
    state = torch.load(path)
    settings = json.loads(state._metadata[""]["bn_insert"])
    state._metadata[""]["bn_insert"] = json.dumps(settings | {"architecture": {"changes": [change]}})
    torch.save(state, path)
    assert inserted_batchnorms(load_checkpoint(path)) == []


def test_the_history_that_is_stored_is_the_one_that_is_read() -> None:
    x = images(6, size=12)
    inserted = insert_batchnorm(randomised(HeldAsAttributes()), [x])
    replace_output(inserted, 3)
    replace_head(inserted, 4, 3)
    history = History.of(fold_batchnorm(inserted, x))
    assert [type(change) for change in history.changes] == [
        InsertedBatchNorms,
        ReplacedOutput,
        ReplacedHead,
        FoldedBatchNorms,
    ]
    named = History("some.nets:make", history.changes).with_change(AdaptedStatistics(12))
    assert History.from_document(json.loads(json.dumps(named.to_document()))) == named
