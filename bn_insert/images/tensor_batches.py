"""Images that stand ready in a tensor file: .pt, .pth, .npy or .safetensors."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Shaped
from safetensors import safe_open
from torch import Tensor

from ..errors import ImageError
from ..support.text import printable
from ..support.torch_file import load_torch_file
from .batches import Batch, Batches, Unreadable, check_at_least, dealt, pinned, sample

TENSOR_SUFFIXES = (".npy", ".pt", ".pth", ".safetensors")


def tensor_batches(
    path: str | Path, *, batch_size: int = 32, channels: int | None = None, pin_memory: bool = False
) -> TensorBatches:
    """Return the images of a tensor file, N x C x H x W, as batches; their values are taken as they are.

    path: a .pt or .pth file (read with weights_only=True) that holds a tensor, or a dict with exactly one; a .npy file
    (without pickles); a .safetensors file with one tensor.  It is mapped, not loaded, so it may be larger than memory.
    Every real dtype becomes float32 without scaling: uint8 pixels come out as 0..255, float64 is rounded.
    channels: what the network takes; None accepts any number.

    Raises ImageError that names the file and the shape found: for another shape, no images, another number of channels,
    a file that is damaged or would run code when read; and, during a pass, for NaN or Inf.
    """
    check_at_least(1, batch_size=batch_size)
    values = read_tensor(Path(path))
    _check_shape(Path(path), values, channels)
    return TensorBatches(Path(path), values, range(len(values)), batch_size, pin_memory)


@dataclass(frozen=True, eq=False)
class TensorBatches(Batches):
    """Rows of a tensor file as batches; `tensor_batches` makes one."""

    path: Path
    values: Shaped[Tensor, "rows channels height width"] = field(repr=False)
    rows: Sequence[int] = field(repr=False)
    batch_size: int
    pin_memory: bool

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.rows)

    @property
    def unreadable(self) -> list[Unreadable]:
        """Always empty: a tensor file is readable as a whole or not at all."""
        return []

    def __iter__(self) -> Iterator[Batch]:
        """Give the batches. Raises ImageError that names the first value that is NaN or Inf in float32."""
        for start in range(0, len(self.rows), self.batch_size):
            rows = self.rows[start : start + self.batch_size]
            # Row by row, because indexing with a list is missing for some dtypes; and a copy, because a consumer may
            # work in place.
            images = torch.stack([self.values[row].to(torch.float32) for row in rows]).contiguous()
            self._check_finite(images, rows)
            paths = tuple(Path(f"{self.path}[{row}]") for row in rows)
            yield Batch(pinned(images) if self.pin_memory else images, paths)

    def head(self, count: int) -> TensorBatches:
        """Return the first `count` images (all where there are fewer) as a set of their own."""
        check_at_least(1, images=count)
        return replace(self, rows=self.rows[:count])

    def part(self, rank: int, ranks: int) -> TensorBatches:
        """Return the share of one of several processes: every ranks-th whole batch, as a set of their own."""
        return replace(self, rows=dealt(self.rows, self.batch_size, rank, ranks))

    def with_pinned_memory(self) -> TensorBatches:
        """Return the same images in page-locked memory, from which a GPU copies while it computes."""
        return replace(self, pin_memory=True)

    def sample(self, count: int | None, seed: int) -> TensorBatches:
        """Return `count` images (None: all) drawn as by the function `sample`, as a set of their own."""
        return replace(self, rows=sample(self.rows, count, seed))

    def _check_finite(self, images: Float32[Tensor, "rows channels height width"], rows: Sequence[int]) -> None:
        finite = images.isfinite()
        if finite.all():
            return
        place = (~finite).nonzero()[0].tolist()
        index = ", ".join(map(str, [rows[place[0]], *place[1:]]))
        raise ImageError(
            f"{self.path} ({_shape(self.values)}) holds {float(images[tuple(place)])} at [{index}] (in float32); "
            "mend that image or leave it out"
        )


def read_tensor(path: Path) -> Tensor:
    """Return the one tensor of a file, mapped into memory where its format allows.

    Nothing in the file is run.  Raises ImageError for a file that cannot be read or holds not exactly one tensor.
    """
    readers = {".npy": _read_npy, ".safetensors": _read_safetensors}
    reader = readers.get(path.suffix.lower(), _read_torch)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PyTorch has to say on old formats is of no use to the reader here
            tensor = reader(path)
    except ImageError:
        raise
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise ImageError(
            f"{path} is damaged, or holds more than a tensor: reading it could run code, so it was not read; "
            "save the tensor alone, as torch.save(tensor, path)"
        ) from error
    except Exception as error:  # a damaged file makes the readers raise anything
        # The text of a KeyError and its like is the bare key, which says nothing.
        text = str(error) if " " in str(error) else type(error).__name__
        reason = printable(" ".join(text.splitlines()[0].split()))[:200]
        raise ImageError(
            f"{path} is damaged, or no {path.suffix} file ({reason}); write it again, as torch.save(tensor, path)"
        ) from error
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_complex():
        raise ImageError(f"{path} holds a tensor that is sparse, quantized, complex or without data; save a dense one")
    # A view may repeat its memory: a file of 1 kB then stands for terabytes.
    if tensor.numel() * tensor.element_size() > path.stat().st_size:
        raise ImageError(
            f"{path} of {path.stat().st_size} bytes claims the shape {_shape(tensor)}; save tensor.contiguous()"
        )
    return tensor


def _read_npy(path: Path) -> Tensor:
    # Unlike np.load it takes nothing but .npy, and has no way to a pickle. Copy on write ("c"), because PyTorch makes
    # tensors from a read-only array only under protest.
    array = np.lib.format.open_memmap(path, mode="c")
    return torch.from_numpy(array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("=")))


def _read_safetensors(path: Path) -> Tensor:
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        if len(names) != 1:
            raise _not_one_tensor(path, names)
        return file.get_tensor(names[0])


def _read_torch(path: Path) -> Tensor:
    with path.open("rb") as file:
        content = load_torch_file(file, mapped=True)
    if isinstance(content, Mapping):
        tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
        if len(tensors) != 1:
            raise _not_one_tensor(path, list(tensors))
        content = next(iter(tensors.values()))
    if not isinstance(content, Tensor):
        raise ImageError(f"{path} holds {type(content).__name__}, not a tensor; save the tensor alone")
    return content.detach()


def _not_one_tensor(path: Path, names: Sequence[Any]) -> ImageError:
    shown = ", ".join(f"{printable(name):.60}" for name in names[:4])
    found = f" ({shown}{', ...' if len(names) > 4 else ''})" if names else ""
    return ImageError(f"{path} holds {len(names)} tensors{found}; save the one with the images alone")


def _check_shape(path: Path, values: Tensor, channels: int | None) -> None:
    found = f"{path} has the shape {_shape(values)}"
    if values.ndim != 4:
        way_out = "; save one image as image[None]" if values.ndim == 3 else ""
        raise ImageError(f"{found}, but N x C x H x W is needed{way_out}")
    if values.numel() == 0:
        raise ImageError(f"{found}: it holds no image")
    if channels is not None and values.shape[1] != channels:
        way_out = "; save tensor.permute(0, 3, 1, 2)" if values.shape[3] == channels else ""
        raise ImageError(f"{found}, N x C x H x W, but the network takes C = {channels}{way_out}")


def _shape(values: Tensor) -> str:
    return " x ".join(map(str, values.shape)) or "()"
