"""Preprocessed images in a tensor file: .pt, .pth, .npy or .safetensors."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Shaped
from safetensors import safe_open
from torch import Tensor

from ..errors import ImageError, out_of_memory
from ..support.safe_torch_load import load_torch_file
from ..support.text import listed, printable, with_article
from .batch_interface import Batch, Batches, Unreadable, check_at_least, dealt, pinned, sample

_LAYOUTS = {0: "N x C", 1: "N x C x L", 2: "N x C x H x W", 3: "N x C x D x H x W"}
_Names: TypeAlias = Sequence[str] | Literal["all"]
TENSOR_SUFFIXES = (".npy", ".pt", ".pth", ".safetensors")


def tensor_batches(
    path: str | Path,
    *,
    batch_size: int = 32,
    channels: int | None = None,
    dims: int = 2,
    takes: Callable[[tuple[int, ...]], bool] | None = None,
    pin_memory: bool = False,
) -> TensorBatches:
    """Return the images of a tensor file, N x C x H x W, as batches; their values are used unchanged.

    Every real dtype becomes float32 without scaling: uint8 pixels stay 0..255, and float64 is rounded. The file is
    mapped into memory, not loaded, so that it may be larger than memory.

    Args:
        path: A .pt or .pth file (read with weights_only=True) with a tensor, or with a dict that has exactly one; a
            .npy file without pickles; or a .safetensors file with one tensor.
        batch_size: Images per batch.
        channels: Channels that the network takes; None accepts any number.
        dims: Dimensions of an image: 0 for features, N x C; 1 for N x C x L, 3 for N x C x D x H x W.
        takes: Optional predicate on the shape of an image; where it is True, `channels` and `dims` are not checked.
        pin_memory: Put batches into page-locked memory where there is a GPU.

    Raises:
        ImageError: For any other shape, no images, another number of channels, and a file that is damaged or would run
            code when read; during a pass, for NaN or Inf. The message names the file and its shape.
    """
    check_at_least(1, batch_size=batch_size)
    if dims not in _LAYOUTS:
        raise ImageError(f"dims is {dims!r:.40}; pass the number of dimensions of an image after its channels, 0 to 3")
    (values,) = read_tensors(Path(path)).values()
    if not (values.numel() and takes and takes(tuple(values.shape[1:]))):
        _check_shape(Path(path), values, channels, _LAYOUTS[dims])
    return TensorBatches(Path(path), values, range(len(values)), batch_size, pin_memory)


@dataclass(frozen=True, eq=False)
class TensorBatches(Batches):
    """Rows of a tensor file as batches; created by `tensor_batches`.

    Args:
        path: The file.
        values: Its tensor, of any real dtype, mapped where the format allows.
        rows: Which rows to read, in the order of the batches.
        batch_size: Rows per batch.
        pin_memory: Put batches into page-locked memory where there is a GPU.
        dtype: Dtype of the batches.
    """

    path: Path
    values: Shaped[Tensor, " rows *shape"] = field(repr=False)
    rows: Sequence[int] = field(repr=False)
    batch_size: int
    pin_memory: bool
    dtype: torch.dtype = torch.float32

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.rows)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of an image."""
        return tuple(self.values.shape[1:])

    @property
    def unreadable(self) -> list[Unreadable]:
        """Always empty: a tensor file can be read completely or not at all."""
        return []

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches.

        Raises:
            ImageError: Naming the first value that is NaN or Inf in float32.
        """
        for start in range(0, len(self.rows), self.batch_size):
            rows = self.rows[start : start + self.batch_size]
            # Row by row, because some dtypes cannot be indexed with a list; and a copy, because a consumer may work in
            # place.
            images = torch.stack([self.values[row].to(self.dtype) for row in rows]).contiguous()
            self._check_finite(images, rows)
            paths = tuple(Path(f"{self.path}[{row}]") for row in rows)
            yield Batch(pinned(images) if self.pin_memory else images, paths)

    def head(self, count: int) -> TensorBatches:
        """Return the first `count` images (all of them if there are fewer) as a new set."""
        check_at_least(1, images=count)
        return replace(self, rows=self.rows[:count])

    def part(self, rank: int, ranks: int) -> TensorBatches:
        """Return the share of one of several processes, every ranks-th whole batch, as a new set."""
        return replace(self, rows=dealt(self.rows, self.batch_size, rank, ranks))

    def with_pinned_memory(self) -> TensorBatches:
        """Return the same images in page-locked memory, which a GPU can copy from while it computes."""
        return replace(self, pin_memory=True)

    def sample(self, count: int | None, seed: int) -> TensorBatches:
        """Return `count` images (None: all) drawn as by the function `sample`, as a new set."""
        return replace(self, rows=sample(self.rows, count, seed))

    def _check_finite(self, images: Shaped[Tensor, " rows *shape"], rows: Sequence[int]) -> None:
        finite = images.isfinite()
        if finite.all():
            return
        place = (~finite).nonzero()[0].tolist()
        index = ", ".join(map(str, [rows[place[0]], *place[1:]]))
        raise ImageError(
            f"{self.path} ({shape_text(self.values)}) contains {float(images[tuple(place)])} at [{index}] (in "
            "float32); repair or remove that image"
        )


def read_tensors(path: Path, names: _Names = ()) -> dict[str, Tensor]:
    """Return tensors of a file by name, mapped into memory where its format allows; no code from the file is run.

    Args:
        path: The file.
        names: Which tensors to read; "all" reads all that have a name, and without names the only one is read.

    Raises:
        ImageError: For a file that cannot be read or does not hold these tensors.
    """
    readers = {".npy": _read_npy, ".safetensors": _read_safetensors}
    reader = readers.get(path.suffix.lower(), _read_torch)
    saved, only = ("tensors", "a dict of tensors") if names else ("tensor", "a tensor")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about old formats do not help the user here
            tensors = reader(path, names)
    except ImageError:
        raise
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise ImageError(
            f"{path} is damaged, or contains more than {only}: reading it could run code, so it was not read; "
            f"save only the {saved}, with torch.save({saved}, path)"
        ) from error
    except Exception as error:  # on a damaged file the readers may raise anything
        if out_of_memory(error):
            raise
        # The text of a KeyError is the bare key, which explains nothing.
        text = str(error) if " " in str(error) else type(error).__name__
        reason = printable(" ".join(text.splitlines()[0].split()))[:200]
        raise ImageError(
            f"{path} is damaged, or not a {path.suffix} file ({reason}); write it again with torch.save({saved}, path)"
        ) from error
    for tensor in tensors.values():
        _check_tensor(path, tensor)
    return tensors


def _check_tensor(path: Path, tensor: Tensor) -> None:
    """Raise ImageError for a tensor without values of its own that can be converted."""
    plain = not (tensor.is_nested or tensor.is_quantized or tensor.is_complex()) and tensor.layout == torch.strided
    if not plain or tensor.device.type != "cpu":
        raise ImageError(
            f"{path} contains a tensor that is sparse, nested, quantized, complex or without data; save a dense one"
        )
    if not _has_numbers(tensor.dtype):
        raise ImageError(
            f"{path} contains a tensor of {tensor.dtype}, which has no values to convert; save it as float32"
        )
    # A view may repeat its memory: a file of 1 kB then stands for terabytes.
    if tensor.numel() * tensor.element_size() > path.stat().st_size:
        raise ImageError(
            f"{path} of {path.stat().st_size} bytes claims the shape {shape_text(tensor)}; save tensor.contiguous()"
        )


def _has_numbers(dtype: torch.dtype) -> bool:
    """Return whether a dtype can be converted to float32: packed and opaque ones cannot."""
    try:
        torch.empty(1, dtype=dtype).to(torch.float32)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _read_npy(path: Path, names: _Names) -> dict[str, Tensor]:
    # Unlike np.load this reads only .npy, and never a pickle. Copy on write ("c"), because PyTorch warns when a tensor
    # is made from a read-only array.
    array = np.lib.format.open_memmap(path, mode="c")
    tensor = torch.from_numpy(array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("=")))
    return dict.fromkeys(_chosen(path, [""], names), tensor)


def _read_safetensors(path: Path, names: _Names) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in _chosen(path, list(file.keys()), names)}


def _read_torch(path: Path, names: _Names) -> dict[str, Tensor]:
    with path.open("rb") as file:
        content = load_torch_file(file, mapped=True)
    if isinstance(content, Tensor):
        content = {"": content}
    if not isinstance(content, Mapping):
        needed = "a tensor; save only the tensor"
        if names:
            which = "tensors by their names" if names == "all" else f"the tensors {', '.join(names)}"
            needed = f"a dict of {which}; save one, with torch.save(tensors, path)"
        raise ImageError(f"{path} contains {with_article(content)}, not {needed}")
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    return {name: tensors[name].detach() for name in _chosen(path, list(tensors), names)}


def _chosen(path: Path, found: Sequence[Any], names: _Names) -> Sequence[Any]:
    """Return which of the tensors in a file to read: those named, or the only one; its name is empty if it has none."""
    if names == "all":
        if set(found) <= {""}:
            raise ImageError(
                f"{path} has no dict of tensors, and the network takes one; save a dict of its inputs by their names, "
                "with torch.save(tensors, path)"
            )
        return found
    if not names:
        if len(found) != 1:
            raise _not_one_tensor(path, found)
        return found
    if missing := [name for name in names if name not in found]:
        shown = listed([f"{printable(name):.60}" for name in found if name != ""], 4)
        raise ImageError(
            f"{path} has no tensor {missing[0]}{shown and f' (it has {shown})'}, and the network takes several inputs "
            f"({', '.join(names)}); save a dict of tensors with these names, with torch.save(tensors, path)"
        )
    return names


def _not_one_tensor(path: Path, names: Sequence[Any]) -> ImageError:
    shown = ", ".join(f"{printable(name):.60}" for name in names[:4])
    found = f" ({shown}{', ...' if len(names) > 4 else ''})" if names else ""
    if any(str(name).endswith((".weight", ".bias")) for name in names):
        advice = "it looks like a checkpoint, and images are expected: a folder of them, or a file with one tensor"
    else:
        advice = "save only the one with the images"
    return ImageError(f"{path} contains {len(names)} tensors{found}; {advice}")


def _check_shape(path: Path, values: Tensor, channels: int | None, layout: str) -> None:
    found, dimensions = f"{path} has the shape {shape_text(values)}", len(layout.split(" x "))
    if values.ndim != dimensions:
        advice = "; save one image as image[None]" if values.ndim == dimensions - 1 else ""
        raise ImageError(f"{found}, but {layout} is expected{advice}")
    if values.numel() == 0:
        raise ImageError(f"{found}: it contains no images")
    if channels is not None and values.shape[1] != channels:
        last_first = ", ".join(map(str, (0, dimensions - 1, *range(1, dimensions - 1))))
        advice = f"; save tensor.permute({last_first})" if values.shape[-1] == channels else ""
        raise ImageError(f"{found}, {layout}, but the network takes C = {channels}{advice}")


def shape_text(values: Tensor) -> str:
    """Return the shape of a tensor for messages."""
    return " x ".join(map(str, values.shape)) or "()"
