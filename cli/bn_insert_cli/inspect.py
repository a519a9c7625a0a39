"""`bn-insert inspect`: the layers and settings of a checkpoint, and where BatchNorm would be inserted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bn_insert.support.text import counted, listed

from . import shared_options as opt
from .console import plain, print_json, print_line, print_result, print_table, stdout, table
from .input_shapes import input_shape
from .inputs import check_one_input
from .named_checkpoints import print_assumptions, read_named_checkpoint
from .option_values import layer_kinds
from .output_checks import note_recording
from .tables import NARROW, keep_whole

if TYPE_CHECKING:
    from rich.table import Table

    from bn_insert import Layer, Settings


_CLASSES_SHOWN = 10


def inspect(  # noqa: PLR0917 - options are keyword-only on the command line
    checkpoint: opt.Checkpoint,
    model: opt.Model = None,
    key: opt.Key = None,
    ignore_unexpected: opt.IgnoreUnexpected = False,
    layers: opt.Layers = "conv,dense",
    include_output: opt.IncludeOutput = False,
    skip: opt.Skip = None,
    placement: opt.Placement = "before-activation",
    size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Side of the input images, which determines output shapes. [default: the checkpoint's, or 224, or "
            "another common size if the network does not run on that]",
        ),
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """Show every conv and dense layer, whether BatchNorm can be inserted after it, and the settings in the file.

    Example: `bn-insert inspect vgg16.pth`

    Other architectures: `bn-insert inspect alexnet.pth --model torchvision.models:alexnet`
    """
    import torch  # noqa: PLC0415 - only when work begins, so that --help is quick
    from torch.nn.modules.batchnorm import _BatchNorm  # noqa: PLC0415

    from bn_insert import build_network, survey  # noqa: PLC0415

    content = read_named_checkpoint(checkpoint, model, mmap=True, key=key)
    network = build_network(content, model, ignore_unexpected=ignore_unexpected)
    transform = (content.settings.transform if content.settings else None) or {}
    stored = next((side for side in map(transform.get, ("crop", "resize")) if isinstance(side, int)), None)
    check_one_input(network, "no file says which shapes they have; use bn_insert.survey(model, example) in Python")
    stored_shape = content.settings.input_shape if content.settings else ()
    example = torch.zeros(2, *input_shape(network, size, image_side=stored, stored=stored_shape))
    found = survey(
        network,
        example,
        layers=layer_kinds(layers),
        include_output=include_output,
        skip=skip or (),
        placement=opt.placement(placement),
    )
    modules = dict(network.named_modules())
    weights = {layer.name: modules[layer.name].weight.shape for layer in found}
    sites = sum(layer.site is not None for layer in found)
    batchnorms = sum(isinstance(module, _BatchNorm) for module in modules.values())
    parameters = sum(parameter.numel() for parameter in network.parameters())
    if as_json:
        settings = content.settings and json.loads(content.settings.to_json())
        print_json(
            {"layers": _layer_rows(found, weights), "settings": settings, "parameters": parameters}
            | {"batchnorms": batchnorms, "sites": sites}
        )
        return
    print_table(_layer_table(found, weights, example.shape[1:]))
    note_recording(layer.site for layer in found if layer.site)
    print_assumptions(network, content.settings, checkpoint, model)
    if content.settings is None:
        print_line("The file stores no settings (eps, momentum, dropout, preprocessing, classes, history of changes).")
    else:
        print_table(_settings_table(content.settings, content.settings_place))
    insertable = f"BatchNorm can be inserted after {sites}" if sites else "no BatchNorm can be inserted"
    print_result(f"{counted(len(found), 'conv or dense layer')}, {parameters:,} parameters; {insertable}.")


def _layer_table(layers: Sequence[Layer], weights: Mapping[str, Sequence[int]], inputs: Sequence[int]) -> Table:
    """Return one row per conv or dense layer, and whether a BatchNorm can be inserted after it.

    Args:
        layers: One for each row.
        weights: Shapes of their weights, by name.
        inputs: Shape of the input that the outputs are for.
    """
    wide = stdout().width >= NARROW
    result = table(
        "Conv and dense layers",
        *("layer", *["type"] * wide, "weight", "output", "parameters", "BatchNorm"),
        right=("parameters",),
    )
    keep_whole(result, (layer.name for layer in layers))
    for layer in layers:
        result.add_row(
            layer.name,
            *[layer.type_name] * wide,
            _dimensions(weights[layer.name]),
            _dimensions(layer.shape[1:]) or "-",
            f"{layer.parameters:,}",
            plain(f"after {layer.site.anchor}", style="green") if layer.site else _reason(layer, wide=wide),
        )
    result.caption = f"output: for an input of {_dimensions(inputs)} (see --size)"
    return result


def _reason(layer: Layer, *, wide: bool) -> str:
    """Return why a layer has no site; in a narrow table, in fewer words."""
    return layer.reason if wide else layer.reason.replace("already followed by a normalization: ", "normalized by ")


def _layer_rows(layers: Sequence[Layer], weights: Mapping[str, Sequence[int]]) -> list[dict[str, object]]:
    """Return the contents of `_layer_table` as JSON-ready data."""
    return [
        {
            "name": layer.name,
            "type": layer.type_name,
            "weight": list(weights[layer.name]),
            "output": list(layer.shape[1:]),
            "parameters": layer.parameters,
            "batchnorm_after": layer.site.anchor if layer.site else None,
            "reason": layer.reason,
        }
        for layer in layers
    ]


def _settings_table(settings: Settings, place: str) -> Table:
    """Return a table of what a checkpoint stores besides its tensors, with equal layers counted together."""
    result = table("Settings", "setting", "value")
    result.add_row("stored in", plain(place))
    norms = Counter((norm.eps, norm.momentum) for norm in settings.batchnorm.values())
    for (eps, momentum), count in norms.items():
        result.add_row("BatchNorm", f"eps {eps:g}, momentum {momentum} ({counted(count, 'layer')})")
    for p, count in Counter(settings.dropout.values()).items():
        result.add_row("dropout", f"p {p:g} ({counted(count, 'layer')})")
    if settings.transform is None:
        result.add_row("preprocessing", "not stored; ImageNet's by default")
    else:
        result.add_row("preprocessing", plain(_preprocessing(settings.transform)))
    if settings.input_shape:
        result.add_row("input", f"{_dimensions(settings.input_shape)}, as in the tensor file it was calibrated on")
    if settings.classes:
        result.add_row("classes", f"{len(settings.classes):,}: {listed(settings.classes, _CLASSES_SHOWN)}")
    else:
        result.add_row("classes", "names not stored")
    if settings.history.function:
        result.add_row("built by", plain(settings.history.function))
    changes = "; ".join(change.description for change in settings.history.changes)
    result.add_row("changes", plain(changes) if changes else "none by bn-insert")
    return result


def _preprocessing(transform: Mapping[str, Any]) -> str:
    """Return the preprocessing in words, as other commands print it; one that cannot be used, as it is in the file."""
    from bn_insert import ImageError  # noqa: PLC0415
    from bn_insert.images import Transform  # noqa: PLC0415
    from bn_insert.report import preprocessing_text  # noqa: PLC0415

    try:
        return preprocessing_text(Transform.from_dict(transform).to_dict())
    except ImageError:
        return ", ".join(f"{name} {_value(value)}" for name, value in transform.items())


def _value(value: object) -> str:
    return "none" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _dimensions(shape: Sequence[int]) -> str:
    return "x".join(str(extent) for extent in shape)
