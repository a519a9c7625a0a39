"""Put modules into a module tree behind others, so that class, attribute names and keys stay what people know."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .sites import Site


def splice_behind(model: nn.Module, norms: Mapping[Site, nn.Module]) -> nn.Module:
    """Put each module behind its site's anchor, in place, and return the model (a new root if the anchor is the root).

    In an nn.Sequential that runs its children itself, the new module becomes the next child, and children numbered from
    0 are renumbered; named children keep their names, and the new one is called NAME_bn. Anywhere else the anchor is
    replaced by `nn.Sequential(anchor, module)`. An anchor that several containers hold is treated in each.
    """
    siblings = {id(model.get_submodule(site.anchor)): norm for site, norm in norms.items() if site.in_sequence}
    wrapped = {id(model.get_submodule(site.anchor)): norm for site, norm in norms.items() if not site.in_sequence}
    for container in list(model.modules()):
        children = _children(container)
        if isinstance(container, nn.Sequential) and any(id(child) in siblings for _, child in children):
            _insert_siblings(container, siblings)
        else:
            for name, child in children:
                if norm := wrapped.get(id(child), siblings.get(id(child))):
                    setattr(container, name, _pair(child, norm))
    root = wrapped.get(id(model))
    return model if root is None else _pair(model, root)


def _children(container: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return (name, child) pairs; unlike named_children, a child held twice comes twice."""
    return [(name, child) for name, child in container._modules.items() if child is not None]


def _pair(anchor: nn.Module, norm: nn.Module) -> nn.Sequential:
    pair = nn.Sequential(anchor, norm)
    pair.training = anchor.training  # only the new container's own flag: the children keep theirs
    return pair


def _insert_siblings(container: nn.Sequential, siblings: Mapping[int, nn.Module]) -> None:
    children = _children(container)
    names = [name for name, _ in children]
    numbered = names == [str(number) for number in range(len(names))]
    result: list[tuple[str, nn.Module]] = []
    for name, child in children:
        result.append((str(len(result)) if numbered else name, child))
        if norm := siblings.get(id(child)):
            result.append((str(len(result)) if numbered else _free_name(f"{name}_bn", names), norm))
    for name in names:
        delattr(container, name)
    for name, child in result:
        container.add_module(name, child)


def _free_name(name: str, taken: list[str]) -> str:
    while name in taken:
        name += "_"
    return name
