"""State dicts: the tensors and metadata in the content of a file, memory of their own, prefixes of their keys."""

from __future__ import annotations

import re
import shlex
import warnings
from collections import Counter, deque
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, UnneededKeyError, as_passed
from ..support.file_limits import MAX_TENSORS
from ..support.safe_torch_load import IgnoredArray
from ..support.text import listed, printable, with_article

# AveragedModel of PyTorch, which keeps moving averages of weights, has this key besides "module.*".
AVERAGED = "n_averaged"
WRAPPERS = (
    "state_dict",
    "model",
    "model_state_dict",
    "model_ema",
    "state_dict_ema",
    "ema_state_dict",
    "net",
    "params",
    "params_ema",
    "weights",
    "ema",
    "network",
    "network_weights",
    "module",
)
"""Keys under which a larger dict may have the state dict; of several, the first."""

TRAINING_STATE = "bn-insert training state"
"""How the format of a run's state begins, in every version: it has the network without its settings."""

LAYER_KEY = re.compile(
    r"(?P<section>features|classifier)\.(?P<index>0|[1-9][0-9]{0,8})\."
    r"(?P<tensor>weight|bias|running_mean|running_var|num_batches_tracked)"
)
"""Key of a tensor of a VGG in torchvision's layout."""

_PREFIXED = re.compile(rf"(?P<prefix>(?:.*\.)?){LAYER_KEY.pattern}")
# DataParallel or torch.compile around the features, as in PyTorch's examples.
_WRAPPED_SECTION = re.compile(r"(^|\.)(features|classifier)\.(module|_orig_mod)\.")

_NEXT_NAME = re.compile(r"[^.]+\.(?=.*\.)")  # of a module, not of a tensor
_KEYS_SHOWN = 12
_NETWORKS_SHOWN = 4
_MAX_KEY = 100  # characters; messages do not suggest longer keys
_MAX_DEPTH = 4  # levels of nested dicts that are searched for a state dict
_MAX_ENTRIES = 500_000  # in all of these dicts together


class Found(NamedTuple):
    """A state dict in the content of a file.

    Attributes:
        content: The whole content.
        state_dict: The state dict, with unchecked keys and values.
        path: The keys that lead to it, one for each dict around it.
        prefix: What the keys of its network begin with, if a key chose one of several networks.
    """

    content: object
    state_dict: dict[Any, Any]
    path: tuple[str, ...] = ()
    prefix: str = ""

    @property
    def key(self) -> str:
        """The key that `unwrapped_state_dict` finds it by."""
        return ".".join((*self.path, *[self.prefix.removesuffix(".")] * bool(self.prefix)))


def unwrapped_state_dict(path: Path, content: object, key: str | None = None) -> Found:
    """Return the state dict in the content of a file, taken out of its wrapper.

    Args:
        path: The file, for messages.
        content: What it contains.
        key: The key that has the state dict, or the keys joined by dots if it is nested, or the prefix of the keys of
            one of several networks in it; by default one of WRAPPERS, if it is there.

    Raises:
        UnneededKeyError: There is a key, and the content is a dict of nothing but tensors: the state dict itself,
            with one network.
        CheckpointError: The content is not a dict, has no dict under that key, or is the state of a training run.
    """
    found_format = dict.get(content, "format") if isinstance(content, dict) else None
    if isinstance(found_format, str) and found_format.startswith(TRAINING_STATE):
        raise CheckpointError(
            f"{path} is the state of a training run, for {as_passed('resume', True)}; after the first epoch, best.pth "
            "and last.pth beside it are checkpoints"
        )
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} contains {with_article(content)}, not a state dict; save one with "
            "torch.save(model.state_dict(), path)"
        )
    found = Found(content, content)
    if key is not None:
        if (chosen := _under_key(content, key)) is None:
            if _is_state_dict(content):
                raise UnneededKeyError(f"{path} is a state dict itself; leave out {as_passed('key')}")
            other = f"; {_way_to_largest(content)}" if _largest(content) else ""
            raise CheckpointError(f"{path} has no dict under the key {key!r:.60}{_keys_of(content)}{other}")
        found = Found(content, *chosen)
    if found.prefix:
        return found
    ways = [way for way, _ in _tensor_dicts(found.state_dict)]
    # A pickle can contain a dict that contains itself: no real checkpoint has more than two layers of wrapping.
    for level in range(3):
        wrapper = next((name for name in WRAPPERS if any(way[level : level + 1] == (name,) for way in ways)), None)
        if wrapper is None:
            break
        _warn_of_others(path, found, wrapper)
        found = Found(content, dict.__getitem__(found.state_dict, wrapper), (*found.path, wrapper))
        ways = [way for way in ways if way[level : level + 1] == (wrapper,)]
    return found


def _under_key(content: dict[Any, Any], key: str) -> tuple[dict[Any, Any], tuple[str, ...], str] | None:
    """Return the dict under a key, the keys that lead there, and the prefix that the key is instead of the last."""
    if isinstance(found := dict.get(content, key), dict):
        return found, (key,), ""
    for dot in re.finditer(r"\.", key):
        outer, inner = key[: dot.start()], key[dot.end() :]
        if isinstance(found := dict.get(content, outer), dict) and (deeper := _under_key(found, inner)):
            return deeper[0], (outer, *deeper[1]), deeper[2]
    prefix = f"{key.removesuffix('.')}."
    return (content, (), prefix) if _has_another_network(content, prefix) else None


def _has_another_network(content: dict[Any, Any], prefix: str) -> bool:
    """Return whether some keys of a state dict begin with a prefix, that of a network in it, and some do not."""
    names = [name for name in dict.keys(content) if isinstance(name, str) and name != AVERAGED]
    chosen = [name for name in names if name.startswith(prefix)]
    layers = filter(None, map(_PREFIXED.fullmatch, chosen))
    is_section = any(len(layer["prefix"]) < len(prefix) for layer in layers)  # "features." of one VGG
    return 0 < len(chosen) < len(names) and not is_section


def _warn_of_others(path: Path, found: Found, wrapper: str) -> None:
    """Warn if there is another state dict next to the one that is read, mostly moving averages of the weights."""
    others = [name for name in WRAPPERS if name != wrapper and _is_state_dict(dict.get(found.state_dict, name))]
    if others:
        warnings.warn(
            f"reading {wrapper!r} of {path}, which also has {others[0]!r}; to read that instead, pass "
            f"{_key_as_passed(*found.path, others[0])}",
            stacklevel=2,
        )


def _key_as_passed(*path: str) -> str:
    """Return for a message the key that leads to a dict, as the user passes it."""
    key = ".".join(path)
    return as_passed("key", key, f"--key {shlex.quote(key)}")


def _tensor_dicts(content: object) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield the way to each dict in the content of a file that has tensors or arrays, and how many; the outer first."""
    queue: deque[tuple[tuple[str, ...], dict[Any, Any]]] = deque([((), content)] if isinstance(content, dict) else [])
    entries = 0
    while queue and entries < _MAX_ENTRIES:  # dicts of an untrusted file may contain each other
        path, found = queue.popleft()
        entries += dict.__len__(found) + 1
        if tensors := sum(isinstance(value, Tensor | IgnoredArray) for value in dict.values(found)):
            yield path, tensors
        if len(path) == _MAX_DEPTH:
            continue
        # The usual keys first, before other dicts use up the limit.
        for key, value in sorted(dict.items(found), key=lambda item: item[0] not in WRAPPERS):
            if isinstance(value, dict) and isinstance(key, str) and len(key) <= _MAX_KEY and key.isprintable():
                queue.append(((*path, key), value))


def _largest(content: object) -> tuple[str, ...]:
    """Return the way to the dict that has the most tensors."""
    return max(_tensor_dicts(content), key=itemgetter(1), default=((), 0))[0]


def _way_to_largest(content: object) -> str:
    if path := _largest(content):
        return f"if the state dict is inside a larger dict, name its key, as in {_key_as_passed(*path)}"
    return f"leave out {as_passed('key')}"


def _way_to_tensors(key: str, found: Found) -> str:
    """Return what to do about a state dict that has something other than tensors under this key."""
    if "_packed_params" in key:
        return "the layer is quantized: save the network as it was before that"
    if not any(_tensor_dicts(found.content)):
        return "save the weights as a state dict: torch.save(model.state_dict(), path)"
    if _largest(found.content) != found.path:
        return _way_to_largest(found.content)
    # With weights_only=True, torch.load would refuse objects that are ignored here.
    loaded = f"torch.load(path, weights_only=False){''.join(f'[{each!r}]' for each in found.path)}"
    if any(isinstance(value, IgnoredArray) for value in dict.values(found.state_dict)):
        advice, items = "convert the arrays", f"{{key: torch.as_tensor(value) for key, value in {loaded}.items()}}"
    else:
        condition = "isinstance(value, torch.Tensor)"
        advice, items = "leave it out", f"{{key: value for key, value in {loaded}.items() if {condition}}}"
    return f"{advice}; if you trust the file, since this could run code from it: torch.save({items}, other_path)"


def checked_tensors(path: Path, found: Found) -> dict[str, Tensor]:
    """Return the content of a state dict if every value is an ordinary dense tensor on the CPU.

    Raises:
        CheckpointError: A key is not a string or a value is not such a tensor; the message names the key.
    """
    tensors: dict[str, Tensor] = {}
    content = found.state_dict
    if dict.__len__(content) > MAX_TENSORS:
        raise CheckpointError(f"{path} has {dict.__len__(content):,} keys; more than {MAX_TENSORS:,} are not read")
    # The methods of dict itself: the pickle of an OrderedDict can set attributes that hide them.
    for key, value in dict.items(content):
        if not isinstance(key, str):
            raise CheckpointError(f"{path} has a key that is not a string, {key!r:.60}: this is not a state dict")
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path} has {with_article(value)} under {key!r:.60}, where a state dict has a tensor; "
                f"{_way_to_tensors(key, found)}{_keys_of(content)}"
            )
        if type(value) not in (Tensor, nn.Parameter) or not is_plain(value) or value.device.type != "cpu":
            raise CheckpointError(
                f"{path} has a tensor under {key!r:.60} that is not an ordinary dense tensor (it is sparse, quantized, "
                "without values, or of a subclass); save it as one"
            )
        tensors[key] = value.detach()
    if not tensors:
        raise CheckpointError(f"{path} contains no tensors")
    return tensors


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is dense and has values: it is not sparse, quantized or on the meta device."""
    return tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_meta or tensor.is_nested)


def independent(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors on the CPU, each with memory that belongs to it alone and has exactly its size.

    Tensors that already meet these conditions are returned unchanged: copying the weights of a VGG takes a second.
    """
    found: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, value in tensors.items():
        tensor = value.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage()
        # A view would keep its whole storage.
        if storage.nbytes() != tensor.numel() * tensor.element_size() or storage.data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        found[key] = tensor
    return found


def without_prefix(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Any] | None = None, *, others: bool = False, key: str = ""
) -> tuple[str, dict[str, Tensor]]:
    """Remove the prefix or prefixes that wrappers such as torch.compile and larger modules add to all keys.

    Args:
        tensors: Tensors by key.
        wanted: The state dict of the architecture that the tensors are for; by default it is a VGG. Its own names may
            begin like a prefix, so keys that already fit the architecture are left unchanged.
        others: Whether there may be tensors other than those of the network, such as weights of a loss. Those without
            the prefix of the network are left out.
        key: Where the tensors are in their file, for messages.

    Returns:
        The prefix, and the tensors by their keys without it.

    Raises:
        CheckpointError: There are several networks, each with a prefix.

    Examples:
        >>> tensors = {"module._orig_mod.features.0.weight": torch.ones(2, 3, 3, 3)}
        >>> prefix, stripped = without_prefix(tensors)
        >>> prefix, list(stripped)
        ('module._orig_mod.', ['features.0.weight'])
    """
    if not any(_WRAPPED_SECTION.search(each) for each in wanted or ()):
        plain = {_WRAPPED_SECTION.sub(r"\1\2.", each): tensor for each, tensor in tensors.items()}
        if len(plain) == len(tensors):  # if two keys become one, neither is right
            tensors = plain
    prefixes = _prefixes_of_vggs(tensors) if wanted is None else _prefixes_that_fit(tensors, wanted)
    if len(prefixes) > 1 and "" not in prefixes:
        names = [each[:_MAX_KEY] for each in prefixes]
        choices = [_key_as_passed(*[key] * bool(key), name.removesuffix(".")) for name in names[:_NETWORKS_SHOWN]]
        raise CheckpointError(
            f"it has {len(names)} networks, whose keys begin with {listed(names, _NETWORKS_SHOWN)}; choose one: "
            f"{' or '.join(choices)}"
        )
    prefix = next(iter(prefixes), "")
    if wanted is not None and not prefixes:
        prefix = _common_prefix(tensors, wanted, others=others)
    if "" in prefixes or not prefix:
        return "", dict(tensors)
    beside = [each for each in tensors if not each.startswith(prefix) and each != AVERAGED]
    if not beside or others:
        return prefix, {each.removeprefix(prefix): tensors[each] for each in tensors if each.startswith(prefix)}
    if wanted is None:
        raise CheckpointError(
            f"the key {beside[0]!r:.80} does not begin with {prefix!r:.80}, as those of its VGG do; for other "
            f"architectures pass {as_passed('model', option='--model package.module:function')}"
        )
    # Those that do not belong to the network keep their names, by which they are refused.
    renamed = {prefix + each: each for each in wanted if each not in tensors}
    return prefix, {renamed.get(each, each): tensor for each, tensor in tensors.items()}


def _prefixes_of_vggs(tensors: Iterable[str]) -> list[str]:
    """Return what the keys of each VGG begin with."""
    found = [match for match in map(_PREFIXED.fullmatch, tensors) if match]
    features = [match for match in found if match["section"] == "features"]
    return list(dict.fromkeys(match["prefix"] for match in features or found))


def _prefixes_that_fit(tensors: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> list[str]:
    """Return each prefix with which all keys of an architecture are there, with its shapes."""
    # PyTorch itself loads a BatchNorm without its counter.
    counter = "num_batches_tracked"
    shapes = {
        key: value.shape for key, value in wanted.items() if isinstance(value, Tensor) and not key.endswith(counter)
    }
    first = next(iter(shapes), None)
    prefixes = [key.removesuffix(first) for key in tensors if key.endswith(first)] if first else []
    return [
        prefix
        for prefix in prefixes
        if (not prefix or prefix.endswith("."))
        and all(prefix + key in tensors and tensors[prefix + key].shape == shape for key, shape in shapes.items())
    ]


def _common_prefix(tensors: Iterable[str], wanted: Container[str], *, others: bool) -> str:
    """Return the names that all keys, or most of them, begin with before one of an architecture follows."""
    keys = [key for key in tensors if key != AVERAGED]
    common = ""
    while keys and not any(key.removeprefix(common) in wanted for key in keys):
        key = _with_most_common_name(keys, len(common)) if others else keys[0]
        found = _NEXT_NAME.match(key, len(common))
        if found is None or found.end() > _MAX_KEY:
            return ""  # the names are those of another architecture
        with_prefix = [each for each in keys if each.startswith(found[0], len(common))]
        if len(with_prefix) < len(keys) and not others:
            return ""
        common, keys = key[: found.end()], with_prefix
    return common


def _with_most_common_name(keys: Sequence[str], start: int) -> str:
    """Return one of the keys that have the most common name at a position, up to the next dot."""
    names = Counter(key[start:].partition(".")[0] for key in keys)
    return max(keys, key=lambda key: names[key[start:].partition(".")[0]])


def _keys_of(content: object) -> str:
    """Return for a message which keys a dict has, and the types of their values."""
    if not isinstance(content, dict):
        return ""
    shown = [
        f"{printable(key)[:40]} ({type(value).__name__})" for key, value in list(dict.items(content))[:_KEYS_SHOWN]
    ]
    more = ", ..." if dict.__len__(content) > _KEYS_SHOWN else ""
    return f"; its keys are {', '.join(shown)}{more}"


def _is_state_dict(content: object) -> bool:
    return (
        isinstance(content, dict)
        and dict.__len__(content) > 0
        and all(isinstance(value, Tensor | IgnoredArray) for value in dict.values(content))
    )
