"""Operations that write in place, and what reads the values afterwards under another name, such as a base of a view."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from .operator_rules import operation, writes_in_place


@dataclass(frozen=True)
class InPlaceWrites:
    """What the operations of a graph write to memory that several of its nodes share.

    Attributes:
        readers: By the node of a write, the operations after it that read the memory under any name.
        returned: The nodes of writes to memory that the model returns.
    """

    readers: Mapping[fx.Node, tuple[fx.Node, ...]]
    returned: frozenset[fx.Node]

    @classmethod
    def among(cls, nodes: Iterable[fx.Node], outputs: Iterable[fx.Node]) -> InPlaceWrites:
        """Find the writes among nodes, which are in the order in which they run."""
        position: dict[fx.Node, int] = {}
        owners: dict[fx.Node, fx.Node] = {}  # by view: the node whose memory it shows
        names: dict[fx.Node, list[fx.Node]] = {}  # by owner: all nodes that show its memory
        for node in nodes:
            position[node] = len(position)
            owner = node
            if (source := _shown_by(node)) is not None:
                owner = owners.get(source, source)
                names.setdefault(owner, [owner]).append(node)
            owners[node] = owner
        returned = {owners.get(node, node) for node in outputs}
        writes = [(node, owners.get(target, target)) for node in position for target in _written_by(node)]
        readers = {
            node: tuple(
                user
                for name in names.get(owner, [owner])
                for user in name.users
                if position.get(user, -1) > position[node]
            )
            for node, owner in writes
        }
        return cls(readers, frozenset(node for node, owner in writes if owner in returned))


def _shown_by(node: fx.Node) -> fx.Node | None:
    """Return the node whose memory a view shows; None for a node with memory of its own."""
    if operation(node) == "getitem":
        source = node.args[0]
        return source if isinstance(source, fx.Node) else None
    schema = getattr(node.target, "_schema", None)
    if schema is None or not any(each.alias_info for each in schema.returns):
        return None
    return next(_arguments(node, written=False), None)


def _written_by(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes whose memory an operation writes to."""
    if writes_in_place(node):
        yield from _arguments(node, written=True)


def _arguments(node: fx.Node, *, written: bool) -> Iterator[fx.Node]:
    """Yield the arguments whose memory an operation returns or writes to; of these, only those that it writes to."""
    for place, parameter in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        value = node.args[place] if place < len(node.args) else node.kwargs.get(parameter.name)
        info = parameter.alias_info
        if isinstance(value, fx.Node) and info is not None and (info.is_write or not written):
            yield value
