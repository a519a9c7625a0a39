"""Why torch.export cannot trace a model, as a message that says what to do."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..errors import GraphError, as_passed, gradients_advice, out_of_memory
from ..support.text import first_line, listed
from .copies import check_values, working_copy
from .inputs import Inputs

_CHILDREN_SHOWN = 5

# In messages of PyTorch and torchvision on inputs of a height and width that a network cannot take.
_ABOUT_SIZE = re.compile(
    "too small|greater than actual input size|shapes cannot be multiplied|sizes? of tensors? .*must match"
    "|invalid for input of size|less than the corresponding input dimension|(image|input) (height|width|size)",
    re.IGNORECASE,
)
# In messages of PyTorch on a forward that reads values of tensors on the meta device, which have none.
_ON_VALUES = re.compile(r"meta|Tensor\.__format__", re.IGNORECASE)

# What messages of torch.export mean, and what to do about it, in place of the default. Each matches a whole first line,
# with the place in the user's own code if there is one: there, an AttributeError on `meta` is not torch.export's.
_CAUSES = (
    (
        r"Could not (guard on|extract specialized integer from) data-dependent expression .*"
        r"|\.numpy\(\) is not supported for tensor subclasses\..*"
        r"|unsupported format string passed to FakeTensor\.__format__.*",
        "its forward depends on tensor values, which are not available during tracing",
        "",
    ),
    (
        r"Found <class '(?:.*\.)?(?P<name>\w+)'> in output, which is not a known type\..*"
        r"|'(?P<other>\w+)' object has no attribute 'meta'",
        "its forward returns an object of the class {}",
        "Let it return tensors, alone or in a tuple, list or dict; dataclasses need torch.export.register_dataclass",
    ),
    (
        r"State dict entry for parameter (?P<name>\S+) is not an instance of torch\.nn\.Parameter\..*",
        "its parameter {} is not an nn.Parameter, as in TorchScript modules",
        "Replace TorchScript modules with the torch.nn modules they were made from",
    ),
)
# What follows is about PyTorch's internals.
_FOR_PYTORCH = re.compile(
    r"[.;]\s+(see |please |if you |for more |you may have run into |this error ).*|[\s,:;(]*(\bsee:? )?https?://.*",
    re.I,
)


def why_not_traced(model: nn.Module, inputs: Inputs, error: Exception) -> str:
    """Return the message for an exception that torch.export raised.

    Args:
        model: The model.
        inputs: What it was to be traced for.
        error: The exception.
    """
    name = type(model).__name__
    try:
        _run_once(model, inputs)
    except GraphError as own:
        return str(own)
    except Exception as own:  # usually the same cause, in clearer words than torch.export's
        if out_of_memory(own):
            raise
        if isinstance(own, NotImplementedError) and 'required "forward"' in str(own):
            inside = [f"model.{child} ({type(module).__name__})" for child, module in model.named_children()]
            return f"{name} has no forward (a LightningModule that wraps a network?); pass the wrapped network" + (
                f": {listed(inside, _CHILDREN_SHOWN)}" if inside else ""
            )
        advice = gradients_advice(own) or inputs.conversion or "Pass inputs of the shape that it expects"
        if inputs.only_tensor is not None and (kind := _container_expected(own)):
            advice += (
                f", and if its forward takes a {kind}, annotate that parameter as one (batch: {kind}) to get all values"
            )
        if _ABOUT_SIZE.search(str(own)):
            advice = as_passed(advice, option=f"{advice} (--resize and --crop for image files, --size for inspect)")
        if _lacks_batch_axis(model, inputs):
            advice += ". If this is a single image without a batch axis, add one: image.unsqueeze(0)"
        return f"{name} cannot run on an input of shape {inputs.shapes}: {first_line(own).rstrip('.')}. {advice}"
    place = _place(error)
    cause, advice = _cause(error, place)
    return f"torch.export cannot trace {name} for an input of shape {inputs.shapes}: {cause}{place}. {advice}"


def _container_expected(error: Exception) -> str:
    """Return "dict" or "tuple" for the errors of a forward that takes a tensor for one; empty for others."""
    if "too many indices" in str(error):  # as PyTorch says for tensor["image"]
        return "dict"
    return "tuple" if "values to unpack" in str(error) else ""


def _run_once(model: nn.Module, inputs: Inputs) -> None:
    """Run a model without torch.export; raises what its forward raises, or GraphError for a lack of values."""
    network = working_copy(model, to_trace=True)
    try:
        with torch.random.fork_rng(devices=()), torch.no_grad():
            inputs.run(network)
    except Exception as error:
        if _ON_VALUES.search(str(error)):
            check_values(model)
        raise


def _cause(error: Exception, place: str) -> tuple[str, str]:
    """Return why torch.export cannot trace a model, and what to do, in plain words where its message is known."""
    advice = "Pass a submodule whose forward does not do this"
    for pattern, cause, own_advice in _CAUSES:
        if found := re.fullmatch(pattern, first_line(error) + place):
            name = next(filter(None, found.groupdict().values()), "")
            return cause.format(name), own_advice or advice
    return _FOR_PYTORCH.sub("", first_line(error)).rstrip(".:"), advice


def _lacks_batch_axis(model: nn.Module, inputs: Inputs) -> bool:
    """Return whether the first conv of a model takes inputs with one axis more."""
    tensor, conv = inputs.only_tensor, next((each for each in model.modules() if isinstance(each, _ConvNd)), None)
    return tensor is not None and conv is not None and tensor.ndim == len(conv.kernel_size) + 1


def _place(error: Exception) -> str:
    """Return where in the user's own code an exception was raised, for a message; empty if nowhere."""
    libraries = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(libraries)]
    if not frames or not frames[-1].line:
        return ""
    return f" ({frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})"
