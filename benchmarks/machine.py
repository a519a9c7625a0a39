"""The machine and the versions that figures were measured with, as one line of text."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from bn_insert.report import versions


def machine() -> str:
    """Return the processor, the number of cores, the GPU if there is one, and the versions."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    hardware = ", ".join([models[0] if models else platform.machine(), f"{os.cpu_count()} cores", *gpu])
    return f"{hardware}; " + ", ".join(f"{name} {number}" for name, number in versions().items())
