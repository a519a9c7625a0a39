"""Insert modules into a module tree and remove them, keeping its class, attribute names and keys.

Inserted modules carry a mark, which copies keep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MethodType

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from ..graph.closures import modules_held_elsewhere
from ..graph.copies import AnyModule, unwrapped
from ..graph.layers import (
    NormalizedConvTranspose,
    NormalizedLayer,
    NormalizedOwnLayer,
    layer_kind,
    takes_more_than_input,
)
from ..graph.sites import Site

_MARK = "_bn_insert_inserted"


def splice_after(model: nn.Module, norms: Mapping[Site, nn.Module]) -> nn.Module:
    """Insert each module after its site's anchor, in place, mark it as inserted, and return the model.

    In an nn.Sequential that runs its children itself, the new module becomes the next child, and children numbered from
    0 are renumbered; named children keep their names, and the new one is called NAME_bn. Anywhere else the anchor is
    replaced by `NormalizedLayer(anchor, module)`, an nn.Sequential. If several containers hold an anchor, this is done
    in each of them. An anchor that a forward may also reach in a plain list, a partial or the like becomes the
    NormalizedLayer itself.

    Args:
        model: The network to change.
        norms: The module to insert at each site.

    Returns:
        The model, or `NormalizedLayer(model, module)` if the model itself is an anchor.
    """
    for each in norms.values():
        marked(each)
    held_elsewhere = modules_held_elsewhere(model)
    siblings = {id(model.get_submodule(site.anchor)): norm for site, norm in norms.items() if site.in_sequence}
    wrapped = {id(model.get_submodule(site.anchor)): norm for site, norm in norms.items() if not site.in_sequence}
    pairs: dict[int, nn.Module] = {}  # by anchor: all containers of an anchor get the same one
    for container in list(model.modules()):
        children = _children(container)
        if isinstance(container, nn.Sequential) and any(id(child) in siblings for _, child in children):
            _insert_siblings(container, siblings)
        else:
            for name, child in children:
                if (norm := wrapped.get(id(child), siblings.get(id(child)))) and id(child) not in pairs:
                    in_place = id(child) in wrapped and id(child) in held_elsewhere and not _has_slots(child)
                    pairs[id(child)] = _become_pair(child, norm) if in_place else _pair(child, norm)
                if (pair := pairs.get(id(child))) is not None and pair is not child:
                    setattr(container, name, pair)
    root = wrapped.get(id(model))
    return model if root is None else _pair(model, root)


def splice_out(model: nn.Module, in_sequence: Mapping[str, bool]) -> nn.Module:
    """Remove modules, in place, and return the model: the inverse of `splice_after`.

    A Sequential that `splice_after` made around a layer is replaced by the layer, or becomes it; others stay, even with
    only one child left.

    Args:
        model: The network to change.
        in_sequence: For the qualified name of each module, whether its nn.Sequential runs it as a child. If so, the
            child is removed, and children numbered from 0 are renumbered; if not, it is replaced by nn.Identity, since
            a forward calls it by name.

    Returns:
        The model, or its layer if the model is a Sequential made by `splice_after`.
    """
    held_elsewhere = modules_held_elsewhere(model)
    flags = {id(model.get_submodule(name)): flag for name, flag in in_sequence.items()}
    for container in list(model.modules()):
        children = _children(container)
        removed = [(name, child) for name, child in children if id(child) in flags]
        if removed and isinstance(container, nn.Sequential) and all(flags[id(child)] for _, child in removed):
            _set_children(container, [each for each in children if each not in removed], _numbered(children))
        else:
            for name, child in removed:
                setattr(container, name, nn.Identity().train(child.training))
    for container in list(model.modules()):
        for name, child in _children(container):
            if (inner := _unwrapped(child)) is child:
                continue
            if id(child) in held_elsewhere:
                _become(child, inner)
            else:
                setattr(container, name, inner)
    return _unwrapped(model)


def splice_over(model: nn.Module, first: str, last: str, modules: Sequence[nn.Module]) -> list[str]:
    """Replace consecutive children of one module, in place, and return the names of the new modules.

    Children of an nn.Sequential that are numbered from 0 are renumbered. Anywhere else an nn.Sequential of the new
    modules gets the first one's name, and the other replaced modules go.

    Args:
        model: The network to change.
        first: Qualified name of the first child to replace.
        last: Qualified name of the last one, in the same module and not before the first.
        modules: What takes their place.
    """
    parent, _, start = first.rpartition(".")
    end = last.rpartition(".")[2]
    container = model.get_submodule(parent)
    children = _children(container)
    names = [name for name, _ in children]
    begin, stop = names.index(start), names.index(end)
    prefix = f"{parent}." if parent else ""
    if isinstance(container, nn.Sequential) and _numbered(children):
        new = [("", module) for module in modules]
        _set_children(container, [*children[:begin], *new, *children[stop + 1 :]], numbered=True)
        return [f"{prefix}{begin + number}" for number in range(len(modules))]
    setattr(container, start, nn.Sequential(*modules))
    for name in names[begin + 1 : stop + 1]:
        delattr(container, name)
    return [f"{first}.{number}" for number in range(len(modules))]


def marked(norm: AnyModule) -> AnyModule:
    """Mark a module as inserted, and return it."""
    vars(norm)[_MARK] = True
    return norm


def marked_modules(network: nn.Module) -> list[str]:
    """Return the qualified names of the marked modules."""
    return [name for name, module in network.named_modules() if _MARK in vars(module)]


def inserted_batchnorms(model: nn.Module) -> list[str]:
    """Return the qualified names of the BatchNorms that bn-insert inserted, not of those that the network already had.

    Those of a new head (`replace_head`) count too. A checkpoint stores the history of its network, so the names are
    known after loading it.

    Args:
        model: A network that bn-insert changed, or that `load_checkpoint` returned.

    Examples:
        >>> import torch
        >>> from bn_insert import fold, insert_batchnorm
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        >>> images = torch.rand(4, 3, 8, 8)
        >>> inserted = insert_batchnorm(model, [images])
        >>> inserted_batchnorms(inserted)
        ['4']
        >>> fold(inserted, images, names=inserted_batchnorms(inserted)).left
        ('1',)
    """
    network = unwrapped(model)
    return [name for name in marked_modules(network) if isinstance(network.get_submodule(name), _BatchNorm)]


def _children(container: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return (name, child) pairs; unlike named_children, this lists a child held under two names twice."""
    return [(name, child) for name, child in container._modules.items() if child is not None]


def _pair(anchor: nn.Module, norm: nn.Module) -> NormalizedLayer:
    cls = NormalizedLayer
    if type(anchor).forward.__module__.startswith("torch."):
        cls = NormalizedConvTranspose if isinstance(anchor, _ConvTransposeNd) else NormalizedLayer
    elif layer_kind(anchor) and takes_more_than_input(anchor):
        cls = NormalizedOwnLayer
    pair = cls(anchor, norm)
    pair.training = anchor.training  # only the new container's own flag: the children keep theirs
    return pair


def _unwrapped(module: nn.Module) -> nn.Module:
    return module[0] if isinstance(module, NormalizedLayer) and len(module) == 1 else module


def _has_slots(module: nn.Module) -> bool:
    """Return whether a module's class has slots, without which its objects cannot be of another class."""
    return any(vars(each).get("__slots__") for each in type(module).__mro__)


def _become_pair(anchor: nn.Module, norm: nn.Module) -> nn.Module:
    """Make a module the pair of itself and a norm: whatever refers to it, such as a plain list, then runs both."""
    layer = object.__new__(type(anchor))
    _become(layer, anchor)
    hooks = [each for name, each in vars(layer).items() if "_hooks" in name and isinstance(each, dict)]
    for values in (vars(layer), *hooks):
        for name, value in values.items():
            if isinstance(value, MethodType) and value.__self__ is anchor:
                values[name] = MethodType(value.__func__, layer)
    _become(anchor, _pair(layer, norm))
    return anchor


def _become(module: nn.Module, other: nn.Module) -> None:
    """Give a module the class and the attributes of another, which is not used any more."""
    object.__setattr__(module, "__class__", type(other))
    object.__setattr__(module, "__dict__", vars(other))


def _insert_siblings(container: nn.Sequential, siblings: Mapping[int, nn.Module]) -> None:
    children = _children(container)
    names = [name for name, _ in children]
    result: list[tuple[str, nn.Module]] = []
    for name, child in children:
        result.append((name, child))
        if norm := siblings.get(id(child)):
            result.append((_free_name(f"{name}_bn", names), norm))
    _set_children(container, result, _numbered(children))


def _numbered(children: Sequence[tuple[str, nn.Module]]) -> bool:
    return [name for name, _ in children] == [str(number) for number in range(len(children))]


def _set_children(container: nn.Sequential, children: Sequence[tuple[str, nn.Module]], numbered: bool) -> None:
    for name, _ in _children(container):
        delattr(container, name)
    for number, (name, child) in enumerate(children):
        container.add_module(str(number) if numbered else name, child)


def _free_name(name: str, taken: list[str]) -> str:
    while name in taken:
        name += "_"
    return name
