"""State dicts: the tensors and metadata in the content of a file, memory of their own, prefixes of their keys."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, UnneededKeyError, as_passed
from ..support.safe_torch_load import MAX_TENSORS
from ..support.text import printable

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

# What wrappers add to all keys. A file of a part of a VGG may begin with other names, so these alone are removed where
# nothing is known of the architecture.
_PREFIX = re.compile(r"(module|model|_orig_mod|net|network|backbone|vgg|encoder|timm_model|base_model|cnn|student)\.")
_PARALLEL = re.compile(r"(features|classifier)\.module\.")  # DataParallel around the features, as in PyTorch's examples

_NEXT_NAME = re.compile(r"[^.]+\.(?=.*\.)")  # of a module, not of a tensor
_KEYS_SHOWN = 12


def unwrapped_state_dict(path: Path, content: object, key: str | None = None) -> dict[Any, Any]:
    """Return the dict in the content of a file that torch.save wrote, taken out of its wrapper; its values unchecked.

    Args:
        path: The file, for messages.
        content: What it contains.
        key: The key that has the state dict; by default one of WRAPPERS, if it is there.

    Raises:
        UnneededKeyError: There is a key, and the content is a dict of nothing but tensors: the state dict itself.
        CheckpointError: The content is not a dict, has no dict under that key, or is the state of a training run.
    """
    found_format = dict.get(content, "format") if isinstance(content, dict) else None
    if isinstance(found_format, str) and found_format.startswith(TRAINING_STATE):
        raise CheckpointError(
            f"{path} is the state of a training run, for {as_passed('resume', True)}; after the first epoch, best.pth "
            "and last.pth beside it are checkpoints"
        )
    if key is not None:
        if _is_state_dict(content):
            raise unneeded_key(path)
        found = dict.get(content, key) if isinstance(content, dict) else None
        if not isinstance(found, dict):
            raise CheckpointError(f"{path} has no dict under the key {key!r:.60}{_keys_of(content)}")
        content = found
    # A pickle can contain a dict that contains itself: no real checkpoint has more than two layers of wrapping.
    for _ in range(3):
        if not isinstance(content, dict):
            break
        wrapper = next((name for name in WRAPPERS if _has_tensors(dict.get(content, name))), None)
        if wrapper is None:
            break
        _warn_of_others(path, content, wrapper)
        content = dict.__getitem__(content, wrapper)
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} contains {_described(content)}, not a state dict; save one with "
            "torch.save(model.state_dict(), path)"
        )
    return content


def _warn_of_others(path: Path, content: dict[Any, Any], wrapper: str) -> None:
    """Warn if there is another state dict beside the one that is read: moving averages of the weights, mostly."""
    others = [name for name in WRAPPERS if name != wrapper and _is_state_dict(dict.get(content, name))]
    if others:
        warnings.warn(
            f"reading {wrapper!r} of {path}, which also has {others[0]!r}; to read that instead, pass "
            f"{as_passed('key', others[0])}",
            stacklevel=2,
        )


def unneeded_key(path: Path) -> UnneededKeyError:
    """Return the error for a key that was passed for a file that is a state dict itself."""
    return UnneededKeyError(f"{path} is a state dict itself; leave out {as_passed('key')}")


def _way_to_tensors(key: str, content: dict[Any, Any]) -> str:
    """Return what to do about a dict that has something other than tensors under this key."""
    if "_packed_params" in key:
        return "the layer is quantized: save the network as it was before that"
    inner = (name for name, value in dict.items(content) if isinstance(name, str) and _has_tensors(value))
    example = as_passed("key", printable(next(inner, "state_dict"))[:40])
    return f"if the state dict is inside a larger dict, name its key, as in {example}"


def checked_tensors(path: Path, content: dict[Any, Any]) -> dict[str, Tensor]:
    """Return the content of a state dict if every value is an ordinary dense tensor on the CPU.

    Raises:
        CheckpointError: A key is not a string or a value is not such a tensor; the message names the key.
    """
    tensors: dict[str, Tensor] = {}
    if dict.__len__(content) > MAX_TENSORS:
        raise CheckpointError(f"{path} has {dict.__len__(content):,} keys; more than {MAX_TENSORS:,} are not read")
    # The methods of dict itself: the pickle of an OrderedDict can set attributes that hide them.
    for key, value in dict.items(content):
        if not isinstance(key, str):
            raise CheckpointError(f"{path} has a key that is not a string, {key!r:.60}: this is not a state dict")
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path} has {_described(value)} under {key!r:.60}, where a state dict has a tensor; "
                f"{_way_to_tensors(key, content)}{_keys_of(content)}"
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

    Tensors that are so already are returned as they are: copying the weights of a VGG takes a second.
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
    tensors: Mapping[str, Tensor], wanted: Set[str] = frozenset(), *, others: bool = False
) -> tuple[str, dict[str, Tensor]]:
    """Remove the prefix, or several, that wrappers such as torch.compile add to all keys.

    Args:
        tensors: Tensors by key.
        wanted: Keys of the architecture that the tensors are for. Its own names may begin like a prefix, so keys that
            fit the architecture already are left as they are.
        others: Whether there may be other tensors beside those of the network, such as weights of a loss. Those
            without the prefix that is most common are left out.

    Returns:
        The prefix, and the tensors by their keys without it.

    Examples:
        >>> tensors = {"module._orig_mod.0.weight": torch.ones(2, 2), "module._orig_mod.0.bias": torch.ones(2)}
        >>> prefix, stripped = without_prefix(tensors)
        >>> prefix, list(stripped)
        ('module._orig_mod.', ['0.weight', '0.bias'])
    """
    keys = [key for key in tensors if key != AVERAGED]
    common = ""
    while keys and not any(key.removeprefix(common) in wanted for key in tensors):
        key = _with_most_common_name(keys, len(common)) if others else keys[0]
        found = _PREFIX.match(key, len(common)) if not wanted else _NEXT_NAME.match(key, len(common))
        if found is None:
            break
        with_prefix = [each for each in keys if each.startswith(key[: found.end()])]
        if len(with_prefix) < len(keys) and not others:
            break
        common, keys = key[: found.end()], with_prefix
    if wanted and not any(key.removeprefix(common) in wanted for key in keys):
        common = ""  # the names are those of another architecture
    stripped = {key.removeprefix(common): tensors[key] for key in keys} if common else dict(tensors)
    if not any(key in wanted for key in stripped if _PARALLEL.match(key)):
        stripped = {_PARALLEL.sub(r"\1.", key): tensor for key, tensor in stripped.items()}
    return common, stripped


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
        and all(isinstance(value, Tensor) for value in dict.values(content))
    )


def _has_tensors(value: object) -> bool:
    """Return whether a value is a dict with tensors or with dicts that may have them; a configuration has neither."""
    return isinstance(value, dict) and any(isinstance(inner, Tensor | dict) for inner in dict.values(value))


def _described(value: object) -> str:
    kind = type(value)
    return f"{'an' if kind.__name__[0] in 'aeiou' else 'a'} {kind.__name__}"
