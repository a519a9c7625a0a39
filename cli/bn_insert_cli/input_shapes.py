"""Find the shape of one input of a network, by running the network without memory for values."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from math import isqrt, prod
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import nn

Shape: TypeAlias = tuple[int, ...]

_COMMON_SIDES = (224, 32, 28, 64, 84, 96, 112, 128, 256, 299, 16)  # of images, where nothing says it
_FRAMES = 16
_INPUTS = 23  # as no other extent is: it shows which axis of an output has the inputs of a batch


def input_shape(
    model: nn.Module, side: int | None = None, *, image_side: int | None = None, stored: Shape = ()
) -> Shape:
    """Return the shape of one input of a network, without inputs that show it.

    Args:
        model: The network.
        side: Its sides if they are known. Otherwise they are those of a common size that it runs on.
        image_side: The side that the preprocessing gives to images, which is tried before the common sizes. Volumes are
            no images, and of such a side could take minutes: of them, the smallest is tried first.
        stored: The shape of the inputs that the network was calibrated on, if its checkpoint stores it.
    """
    sides = tuple(dict.fromkeys((side or image_side or _COMMON_SIDES[0], *_COMMON_SIDES)))
    shape = stored or next(filter(runs_on(model), _candidates(model, sides)), ()) or _declared(model, sides[0])
    return (shape[0], *[side] * (len(shape) - 1)) if side else shape


def image_shape(model: nn.Module, image_side: int | None) -> Shape:
    """Return the shape of one input of a network that image files are read for; of features, that of images in color.

    Args:
        model: The network.
        image_side: As for `input_shape`.
    """
    shape = input_shape(model, image_side=image_side)
    return shape if len(shape) > 1 else (3, *[image_side or _COMMON_SIDES[0]] * 2)


def runs_on(model: nn.Module) -> Callable[[Shape], bool]:
    """Return a function that returns whether a network runs on inputs of a shape, computing shapes alone.

    A network that takes several inputs, or whose forward decides by values, runs on none.
    """
    import torch  # noqa: PLC0415 - torch only when work begins
    from torch import Tensor  # noqa: PLC0415
    from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC0415
    from torch.utils._pytree import tree_leaves, tree_map_only  # noqa: PLC0415

    from bn_insert import forward_inputs  # noqa: PLC0415

    class WithoutValues(TorchDispatchMode):
        """Where tensors without values meet others, such as constants of a forward, takes none of the values."""

        def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = (args, kwargs or {})
            if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves(given)):
                given = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), given)
            return function(*given[0], **given[1])

    forward, network = forward_inputs(model), _without_values(model)
    dtypes = [tensor.dtype for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    dtype = dtypes[0] if dtypes else torch.float32

    def runs(shape: Shape) -> bool:
        if network is None or forward.several or forward.takes_dict:
            return False
        args, kwargs = forward.ordered([torch.empty(_INPUTS, *shape, dtype=dtype, device="meta")])
        try:
            with warnings.catch_warnings(), torch.no_grad(), WithoutValues():
                warnings.simplefilter("ignore")
                outputs = [leaf for leaf in tree_leaves(network(*args, **kwargs)) if isinstance(leaf, Tensor)]
        except Exception:  # noqa: BLE001 - a forward may raise anything
            return False
        # Otherwise a forward that begins with view(-1, 1, 28, 28) would run on any images, by cutting them up.
        return not outputs or any(_INPUTS in output.shape for output in outputs)

    return runs


def _without_values(model: nn.Module) -> nn.Module | None:
    """Return a copy of a network without values, None if it cannot be copied: a forward may store what it computes."""
    from torch import Tensor, nn  # noqa: PLC0415

    attributes = (value for module in model.modules() for value in vars(module).values())
    # weight_norm of torch.nn.utils leaves a tensor that is no parameter, and cannot be copied.
    computed = (value for value in attributes if isinstance(value, Tensor) and not value.is_leaf)
    with suppress(Exception):
        copies: dict[int, Any] = {id(each): each.detach().to("meta") for each in (*model.buffers(), *computed)}
        for each in model.parameters():
            copies[id(each)] = nn.Parameter(each.detach().to("meta"), each.requires_grad)
        return copy.deepcopy(model, copies).eval()
    return None


def _candidates(model: nn.Module, sides: Shape) -> Iterator[Shape]:
    """Yield shapes that inputs of a network may have, the most probable first.

    Images have 3 channels, or else 1, since a network may convert them before its first conv; for signals and volumes,
    that conv tells more. A network whose first layer is dense takes features, or images that it flattens.
    """
    layers, convs, dense = _layers(model)
    features = list(dict.fromkeys(layer.in_features for layer in dense))
    if dense and layers[0] is dense[0]:
        flat = ((channels, isqrt(features[0] // channels)) for channels in (3, 1))
        yield from ((channels, side, side) for channels, side in flat if channels * side**2 == features[0])
        yield from ((each,) for each in features)
    for dims in dict.fromkeys(len(conv.kernel_size) for conv in convs) or (2,):
        declared = [conv.in_channels for conv in convs if len(conv.kernel_size) == dims] or [3]
        likely = (declared[0], min(declared))
        extents = [(side,) * dims for side in sides]
        if dims == 3:
            # The smallest first, and next to cubes the clips of 16 frames that networks for videos take.
            extents = sorted({*extents, *((_FRAMES, *extent[1:]) for extent in extents)}, key=prod)
        for extent in extents:
            for channels in dict.fromkeys((3, 1, *likely) if dims == 2 else (*likely, 1, 3)):
                yield (channels, *extent)


def _declared(model: nn.Module, side: int) -> Shape:
    """Return the shape that the first conv layer of a network takes, for a network that runs on no candidate."""
    _, convs, _ = _layers(model)
    return (convs[0].in_channels, *[side] * len(convs[0].kernel_size)) if convs else (3, side, side)


def _layers(model: nn.Module) -> tuple[list[Any], list[Any], list[Any]]:
    """Return the conv and dense layers of a network in the order in which they are declared, and each kind alone."""
    from torch import nn  # noqa: PLC0415
    from torch.nn.modules.conv import _ConvNd  # noqa: PLC0415

    layers = [module for module in model.modules() if isinstance(module, _ConvNd | nn.Linear)]
    dense = [layer for layer in layers if isinstance(layer, nn.Linear)]
    return layers, [layer for layer in layers if not isinstance(layer, nn.Linear)], dense
