"""Find the shape of one input of a network, by running a copy of the network on inputs of probable shapes.

Two kinds of tensors serve as inputs, since neither fits all networks:

- Tensors without values ("meta") take no time and no memory. But a forward may keep what it computes outside of its
  modules, such as in a dict of its file, a class attribute or `functools.lru_cache`, which no copy protects: kept
  tensors without values would fail with every later input. They serve networks of PyTorch's and torchvision's own
  modules, which keep nothing there.
- Zeros serve all other networks, since what is kept of them is of use later. Volumes of zeros could take minutes and
  all memory: volumes are always without values.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import cache, partial
from math import isqrt, prod
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor, nn

Shape: TypeAlias = tuple[int, ...]

_COMMON_SIDES = (224, 32, 28, 64, 84, 96, 112, 128, 256, 299, 16)  # of images, tried in this order
_FRAMES = 16
_IMAGE_DIMS = 3  # channels, height and width; volumes have more
_BATCH_SIZES = (2, 4)  # an output axis that has both sizes is the batch axis; even, since some networks need that
_WITHOUT_CACHES = {"torch", "torchvision", "bn_insert"}  # packages whose modules keep nothing outside of themselves


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
    """Return a function that returns whether a network runs on inputs of a shape.

    A network that takes several inputs, or returns no tensor that can be found, runs on none; on inputs without values,
    nor does one whose forward decides by values.
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

    forward, copied = forward_inputs(model), cache(partial(_copy, model))
    dtypes = [tensor.dtype for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    dtype = dtypes[0] if dtypes else torch.float32
    may_cache = any(type(module).__module__.partition(".")[0] not in _WITHOUT_CACHES for module in model.modules())

    def axes(shape: Shape, inputs: int, *, values: bool) -> set[tuple[int, int]]:
        """Return each output and axis with as many entries as there are inputs."""
        network = copied(values)
        if network is None:
            return set()
        args, kwargs = forward.ordered([torch.zeros(inputs, *shape, dtype=dtype, device="cpu" if values else "meta")])
        with warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng(devices=()):
            warnings.simplefilter("ignore")
            with nullcontext() if values else WithoutValues():
                outputs = _tensors(network(*args, **kwargs))
        return {(n, axis) for n, each in enumerate(outputs) for axis, size in enumerate(each.shape) if size == inputs}

    def runs(shape: Shape) -> bool:
        if forward.several or forward.takes_dict:
            return False
        with suppress(Exception):  # a forward may raise anything
            # A forward that begins with view(-1, 1, 28, 28) would run on any images, by cutting them up: its outputs
            # do not follow the inputs.
            values = may_cache and len(shape) <= _IMAGE_DIMS
            found = axes(shape, _BATCH_SIZES[0], values=values)
            return bool(found and found & axes(shape, _BATCH_SIZES[1], values=values))
        return False

    return runs


def _tensors(outputs: Any) -> list[Tensor]:
    """Return the tensors in what a network returns: in containers, and in attributes of an object."""
    from torch import Tensor  # noqa: PLC0415
    from torch.utils._pytree import tree_leaves  # noqa: PLC0415

    leaves = tree_leaves(outputs)
    held = [vars(leaf) for leaf in leaves if not isinstance(leaf, Tensor) and hasattr(leaf, "__dict__")]
    return [leaf for leaf in (*leaves, *tree_leaves(held)) if isinstance(leaf, Tensor)]


def _copy(model: nn.Module, values: bool) -> nn.Module | None:
    """Return a copy with or without values, since a forward may store what it computes; None if there can be none."""
    from torch import Tensor, nn  # noqa: PLC0415

    attributes = (value for module in model.modules() for value in vars(module).values())
    # weight_norm of torch.nn.utils leaves a tensor that is not a parameter, and cannot be copied.
    computed = [value for value in attributes if isinstance(value, Tensor) and not value.is_leaf]
    with suppress(Exception):
        copies: dict[int, Any] = {id(each): each.detach().clone() for each in computed}
        if not values:
            copies = {id(each): each.detach().to("meta") for each in (*model.buffers(), *computed)}
            for each in model.parameters():
                copies[id(each)] = nn.Parameter(each.detach().to("meta"), each.requires_grad)
        result = copy.deepcopy(model, copies)
        result.eval()
        return result
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
            # The smallest first; besides cubes, the clips of 16 frames that video networks take.
            extents = sorted({*extents, *((_FRAMES, *extent[1:]) for extent in extents)}, key=prod)
        for extent in extents:
            for channels in dict.fromkeys((3, 1, *likely) if dims == 2 else (*likely, 1, 3)):
                yield (channels, *extent)


def _declared(model: nn.Module, side: int) -> Shape:
    """Return the shape that the first conv layer of a network takes, for a network that runs on no candidate."""
    _, convs, _ = _layers(model)
    return (convs[0].in_channels, *[side] * len(convs[0].kernel_size)) if convs else (3, side, side)


def _layers(model: nn.Module) -> tuple[list[Any], list[Any], list[Any]]:
    """Return the conv and dense layers of a network in the order of their declaration, and each kind by itself."""
    from torch import nn  # noqa: PLC0415
    from torch.nn.modules.conv import _ConvNd  # noqa: PLC0415

    layers = [module for module in model.modules() if isinstance(module, _ConvNd | nn.Linear)]
    dense = [layer for layer in layers if isinstance(layer, nn.Linear)]
    return layers, [layer for layer in layers if not isinstance(layer, nn.Linear)], dense
