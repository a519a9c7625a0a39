"""What a file may claim to contain, given its size: limits for files from untrusted sources."""

from __future__ import annotations

import os
from io import BufferedReader

# torch.save compresses nothing, so the tensors (counting shared ones twice) are about as large as their file.
MAX_EXPANSION = 10

# Each tensor takes time, however small it is; networks of a thousand layers have fewer.
MAX_TENSORS = 1 << 14


class RefusedError(ValueError):
    """The file requests more memory or time than its size can justify."""


def check_expansion(file: BufferedReader, claimed: int) -> None:
    """Raise RefusedError if a file claims to contain far more bytes than its size."""
    size = size_of(file)
    if claimed > MAX_EXPANSION * size:
        raise RefusedError(
            f"it claims to contain {claimed:,} bytes of tensors in a file of {size:,} bytes; it is damaged or made to "
            "exhaust memory"
        )


def size_of(file: BufferedReader) -> int:
    """Return the size of an open file in bytes."""
    return os.fstat(file.fileno()).st_size
