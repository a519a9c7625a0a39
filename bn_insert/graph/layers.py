"""Which modules are conv or dense layers, and the pair of a layer and its norm."""

from __future__ import annotations

import inspect
from functools import wraps
from typing import Any, List, Literal, Optional  # noqa: UP035 - TorchScript

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

Kind = Literal["conv", "dense"]


def layer_kind(module: nn.Module) -> Kind | None:
    """Return "conv" for a convolution of any kind, "dense" for nn.Linear, and None for any other module."""
    if isinstance(module, _ConvNd):
        return "conv"
    return "dense" if isinstance(module, nn.Linear) else None


def outputs_of(layer: nn.Linear | _ConvNd) -> int:
    """Return the number of channels that a layer computes."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


class NormalizedLayer(nn.Sequential):
    """A layer and the norm after it, in place of the layer: attributes of the layer are also its own.

    A forward may read them, as in `self.conv1.weight.dtype` or `self.conv.kernel_size`. Setting the weight, the stride
    or any other attribute of the layer sets that of the layer. Pruning and parametrizations, which replace a parameter,
    apply to the layer itself, `pair[0]`.

    Examples:
        >>> pair = NormalizedLayer(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> pair.kernel_size, pair.weight is pair[0].weight, list(pair.state_dict())[:2]
        ((3, 3), True, ['0.weight', '0.bias'])
    """

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the layer that the Sequential itself does not have."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            layer = self.__dict__.get("_modules", {}).get("0")  # absent while it is being copied or unpickled
            if layer is None or (name.startswith("__") and name.endswith("__")):
                raise
            return getattr(layer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the layer, if it has one of this name that the Sequential does not have."""
        modules = self.__dict__.get("_modules", {})
        layer = modules.get("0")
        own = {*self.__dict__, *modules, *self.__dict__.get("_parameters", ()), *self.__dict__.get("_buffers", ())}
        if layer is not None and name not in own and not hasattr(type(self), name) and hasattr(layer, name):
            setattr(layer, name, value)
        else:
            super().__setattr__(name, value)


class NormalizedConvTranspose(NormalizedLayer):
    """A transposed conv and the norm after it: a forward may pass an output size, as in `self.up(x, size)`."""

    def forward(self, input: Tensor, output_size: Optional[List[int]] = None) -> Tensor:  # noqa: A002, UP006, UP045 - TorchScript
        """Return the outputs of the conv, normalized."""
        return self[1](self[0](input, output_size))


class NormalizedOwnLayer(NormalizedLayer):
    """A layer whose class takes more than one input, and the norm after it."""

    # TorchScript, which has no variable arguments, compiles what a function wraps: here, for an input alone.
    @wraps(nn.Sequential.forward, assigned=(), updated=())
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Return the outputs of the layer, normalized."""
        return self[1](self[0](*args, **kwargs))


def takes_more_than_input(layer: nn.Module) -> bool:
    """Return whether the class of a layer has a forward with other parameters than those of PyTorch's layers."""
    kinds = {name: each.kind for name, each in inspect.signature(layer.forward).parameters.items()}
    return len(kinds) > 1 or inspect.Parameter.VAR_POSITIONAL in kinds.values()


def is_sequence(module: nn.Module) -> bool:
    """Return whether a module runs its children one after the other: an nn.Sequential with its own forward."""
    pairs = (NormalizedConvTranspose.forward, NormalizedOwnLayer.forward)
    return type(module).forward in (nn.Sequential.forward, *pairs)
