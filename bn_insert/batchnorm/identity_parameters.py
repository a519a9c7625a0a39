"""Identity BatchNorms, whose outputs in eval mode equal their inputs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..errors import CalibrationError, as_passed
from ..graph.inputs import reference_tensor
from ..statistics.moments import Moments
from ..support.arguments import check_dtype, is_number
from ..support.text import with_article

BATCHNORMS: dict[int, type[nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d]] = {
    1: nn.BatchNorm1d,
    2: nn.BatchNorm2d,
    3: nn.BatchNorm3d,
}

# Float steps tried around the rounded values, nearest first.
_GAMMA_STEPS = (0, 1, -1, 2, -2, 3, -3)
_VAR_STEPS = (0, 1, -1, 2, -2, 3, -3, 4, 5, 6)


def identity_batchnorm(
    moments: Moments,
    dims: int,
    *,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    dtype: torch.dtype = torch.float32,
) -> nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d:
    """Return a BatchNorm with these moments as running statistics whose outputs in eval mode equal its inputs.

    running_mean = mean, running_var = unbiased variance, gamma (`weight`) = sqrt(running_var + eps), beta (`bias`) =
    mean. With PyTorch's CPU kernel the outputs equal the inputs bit for bit: gamma, and where that is not enough the
    variance, is moved by a few ulps, so that the kernel's own factor gamma / sqrt(var + eps) is exactly 1.

    Source of the formula: Ioffe and Szegedy, "Batch Normalization", 2015, section 3.

    Args:
        moments: Moments of the BatchNorm's input.
        dims: 1 for dense layers and Conv1d, 2 for Conv2d, 3 for Conv3d.
        eps: Added to the variance, as in PyTorch.
        momentum: Momentum of the running statistics, as in PyTorch; None for a cumulative average.
        dtype: Dtype of parameters and statistics.

    Raises:
        CalibrationError: If there are fewer than two values per channel, an argument is out of range or of the wrong
            type, or the moments are not finite in `dtype`.

    Examples:
        >>> moments = Moments(100, mean=torch.zeros(8).double(), m2=torch.full((8,), 99.0).double())
        >>> norm = identity_batchnorm(moments, 2).eval()
        >>> x = torch.randn(1, 8, 4, 4)
        >>> torch.equal(norm(x), x)
        True
    """
    check_eps(eps)
    check_momentum(momentum)
    check_dtype("dtype", dtype)
    if not isinstance(moments, Moments):
        raise CalibrationError(
            f"moments is {with_article(moments)}, not Moments; pass those of one layer from the dict that calibrate "
            "returns"
        )
    if dims not in list(BATCHNORMS):
        raise CalibrationError(f"dims must be 1, 2 or 3, as in BatchNorm1d, 2d, 3d, not {dims!r:.40}")
    if moments.count < 2:
        raise CalibrationError(
            f"a variance needs at least two values per channel and the calibration set has {moments.count}; "
            "calibrate on more images"
        )
    mean = moments.mean.to("cpu", dtype)
    rounded_var = moments.var.to("cpu", dtype)
    if not (mean.isfinite().all() and rounded_var.isfinite().all()):
        raise CalibrationError(f"mean or variance is not finite in {dtype}")
    var, gamma = _exact_factors(rounded_var, eps)
    norm = BATCHNORMS[dims](moments.channels, eps=eps, momentum=momentum, device="cpu", dtype=dtype)
    with torch.no_grad():
        norm.weight.copy_(gamma)
        norm.bias.copy_(mean)
    norm.running_mean = mean.clone()  # in float64, `mean` is the moments' own tensor
    norm.running_var = var
    return norm


def batchnorm_dtype(layer: nn.Module) -> torch.dtype:
    """Return the dtype of a BatchNorm that is inserted after a layer: float32, also in half precision, or float64."""
    weight = reference_tensor(layer)  # not always a parameter: it may be a buffer
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def check_eps(eps: float) -> None:
    """Check that eps is finite and a normal number in float32: kernels may round smaller ones to 0.

    Raises:
        CalibrationError: If it is not.
    """
    if not (is_number(eps) and torch.finfo(torch.float32).tiny <= eps < float("inf")):
        raise CalibrationError(
            f"{as_passed('eps')} must be a finite number of at least {torch.finfo(torch.float32).tiny:.2g}, such as "
            f"1e-5, not {eps!r:.40}: without it, constant channels would be divided by 0"
        )


def check_momentum(momentum: float | None) -> None:
    """Check that a momentum is from 0 to 1, or None.

    Raises:
        CalibrationError: If it is not.
    """
    if momentum is not None and not (is_number(momentum) and 0 <= momentum <= 1):
        raise CalibrationError(
            f"{as_passed('momentum')} must be a number from 0 to 1, or None for a cumulative average, not "
            f"{momentum!r:.40}"
        )


def kernel_factor(
    gamma: Float[Tensor, " channels"], var: Float[Tensor, " channels"], eps: float
) -> Float[Tensor, " channels"]:
    """Return the factor by which PyTorch's CPU kernel multiplies each channel in eval mode, as rounded by the kernel.

    Found by running the kernel on ones, since its formula differs between releases (1/sqrt or rsqrt).
    """
    zero = torch.zeros_like(var)
    return F.batch_norm(torch.ones_like(var)[None], zero, var, gamma, zero, training=False, eps=eps)[0]


def _exact_factors(var: Float[Tensor, " channels"], eps: float) -> tuple[Tensor, Tensor]:
    """Return (var, gamma), moved by as few float steps as are needed for the kernel's factor to be exactly 1."""
    best_var = var.clone()
    best_gamma = (var.double() + eps).sqrt().to(var.dtype)
    open_channels: Bool[Tensor, " channels"] = torch.ones_like(var, dtype=torch.bool)
    for candidate_var in _var_candidates(var, eps):
        nearest = (candidate_var.double() + eps).sqrt().to(var.dtype)
        for steps in _GAMMA_STEPS:
            gamma = _step(nearest, steps)
            exact = open_channels & (kernel_factor(gamma, candidate_var, eps) == 1)
            best_var[exact], best_gamma[exact] = candidate_var[exact], gamma[exact]
            open_channels &= ~exact
            if not open_channels.any():
                return best_var, best_gamma
    return best_var, best_gamma


def _var_candidates(var: Tensor, eps: float) -> Iterator[Tensor]:
    # One step of the sum var + eps: below eps, a step of var alone would be lost in the kernel's addition.
    total = var + eps
    step = torch.nextafter(total, torch.full_like(total, torch.inf)) - total
    for count in _VAR_STEPS:
        yield (var + count * step).clamp_min(0)


def _step(values: Tensor, steps: int) -> Tensor:
    towards = torch.full_like(values, torch.inf if steps > 0 else 0.0)
    for _ in range(abs(steps)):
        values = torch.nextafter(values, towards)
    return values
