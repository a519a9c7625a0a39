"""`bn-insert inspect`: what is in a checkpoint, and where BatchNorm would go."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options as opt
from .console import print_result, print_table
from .inputs import input_channels, layer_kinds, open_model
from .tables import layer_table


def inspect(  # noqa: PLR0917 - options are keyword-only on the command line
    checkpoint: opt.Checkpoint,
    model: opt.Model = None,
    layers: opt.Layers = "conv,dense",
    include_output: opt.IncludeOutput = False,
    skip: opt.Skip = None,
    placement: opt.Placement = "before_activation",
    size: Annotated[int, typer.Option(min=1, help="Side of the input images, for the output shapes.")] = 224,
) -> None:
    """Show every conv and dense layer, and whether a BatchNorm is there, would go there, or why not.

    Example: `bn-insert inspect vgg16.pth`

    No VGG: `bn-insert inspect alexnet.pth --model torchvision.models:alexnet`
    """
    import torch  # noqa: PLC0415 - only when work begins, so that --help is quick

    from bn_insert import survey  # noqa: PLC0415
    from bn_insert.graph.inputs import reference_tensor  # noqa: PLC0415

    network = open_model(checkpoint, model, mmap=True)
    dtype = reference_tensor(network).dtype
    example = torch.zeros(2, input_channels(network), size, size, dtype=dtype)
    found = survey(
        network,
        example,
        layers=layer_kinds(layers),
        include_output=include_output,
        skip=skip or (),
        placement=placement,
    )
    modules = dict(network.named_modules())
    print_table(layer_table(found, {layer.name: modules[layer.name].weight.shape for layer in found}))
    sites = sum(layer.site is not None for layer in found)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print_result(f"{len(found)} layers, {parameters:,} parameters, room for {sites} BatchNorm layers.")
