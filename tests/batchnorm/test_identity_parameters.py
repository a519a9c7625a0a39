import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bn_insert import CalibrationError, Moments, identity_batchnorm
from bn_insert.batchnorm.identity_parameters import kernel_factor
from bn_insert.statistics.moments import moments_of
from support.references import mean_and_var

ACTIVATIONS = {
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
    torch.float64: (torch.float64,),
}
"""Which activations PyTorch's CPU kernel takes beside parameters of a dtype."""

LAYOUTS = {
    "dense": (1, (), torch.contiguous_format),
    "sequence": (1, (19,), torch.contiguous_format),
    "images": (2, (5, 7), torch.contiguous_format),
    "images-channels-last": (2, (5, 7), torch.channels_last),
    "volume": (3, (3, 3, 2), torch.contiguous_format),
}


def drawn_moments(channels: int, seed: int, smallest: float = -20, largest: float = 10) -> Moments:
    """Return means of both signs and variances spread over the given powers of ten, every seventh of them 0."""
    generator = torch.Generator().manual_seed(seed)
    powers = torch.rand(channels, generator=generator, dtype=torch.float64) * (largest - smallest) + smallest
    var = 10**powers
    var[::7] = 0
    scales = 10 ** (torch.rand(channels, generator=generator, dtype=torch.float64) * 8 - 4)
    mean = torch.randn(channels, generator=generator, dtype=torch.float64) * scales
    return Moments(100, mean, var * 99)


@settings(deadline=None, max_examples=100)
@given(
    channels=st.integers(1, 300),
    seed=st.integers(0, 2**32),
    eps=st.floats(-12, 0).map(lambda power: 10**power),
    dtypes=st.sampled_from([(own, x) for own, inputs in ACTIVATIONS.items() for x in inputs]),
    layout=st.sampled_from(sorted(LAYOUTS)),
)
def test_an_identity_batchnorm_returns_its_input_bit_for_bit(
    channels: int, seed: int, eps: float, dtypes: tuple[torch.dtype, torch.dtype], layout: str
) -> None:
    dims, positions, memory_format = LAYOUTS[layout]
    moments = drawn_moments(channels, seed)
    norm = identity_batchnorm(moments, dims, eps=eps, dtype=dtypes[0]).eval()
    noise = torch.randn(3, *positions, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = (noise * moments.std + moments.mean).movedim(-1, 1).to(dtypes[1])
    x = x.contiguous(memory_format=memory_format)
    with torch.no_grad():
        assert torch.equal(norm(x), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [1e-12, 1e-8, 1e-5, 1e-3, 0.3])
def test_the_kernels_factor_is_one_for_all_of_20000_channels(eps: float, dtype: torch.dtype) -> None:
    norm = identity_batchnorm(drawn_moments(20_000, 5), 1, eps=eps, dtype=dtype)
    factor = kernel_factor(norm.weight.detach(), norm.running_var, eps)
    assert torch.equal(factor, torch.ones_like(factor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.3])
def test_gamma_is_the_root_of_running_var_plus_eps_and_beta_is_running_mean(eps: float, dtype: torch.dtype) -> None:
    norm = identity_batchnorm(drawn_moments(2_000, 6), 2, eps=eps, dtype=dtype)
    expected = (norm.running_var.double() + eps).sqrt()
    assert ((norm.weight.double() - expected).abs() <= 1e-6 * expected).all()
    assert torch.equal(norm.bias, norm.running_mean)


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.3])
def test_running_statistics_are_those_given_but_for_the_last_bits(eps: float) -> None:
    moments = drawn_moments(2_000, 7)
    norm = identity_batchnorm(moments, 2, eps=eps)
    assert torch.equal(norm.running_mean, moments.mean.float())
    moved = (norm.running_var.double() - moments.var).abs()
    assert (moved <= 1e-6 * (moments.var + eps)).all()
    assert (norm.running_var >= 0).all()


def test_running_var_is_the_unbiased_variance() -> None:
    values = torch.tensor([[1.0, 10], [3, 20], [5, 60]])
    norm = identity_batchnorm(moments_of(values), 1)
    torch.testing.assert_close(norm.running_var, torch.tensor([4.0, 700]), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("dims", "kind"), [(1, nn.BatchNorm1d), (2, nn.BatchNorm2d), (3, nn.BatchNorm3d)])
@pytest.mark.parametrize(("eps", "momentum"), [(1e-5, 0.1), (1e-3, 0.01), (1e-4, None)])
def test_it_is_an_ordinary_batchnorm_with_the_eps_and_momentum_asked_for(
    dims: int, kind: type[nn.Module], eps: float, momentum: float | None
) -> None:
    norm = identity_batchnorm(drawn_moments(4, 0), dims, eps=eps, momentum=momentum)
    assert type(norm) is kind
    assert (norm.eps, norm.momentum, norm.num_features) == (eps, momentum, 4)
    assert norm.affine and norm.track_running_stats
    assert norm.num_batches_tracked == 0
    assert list(norm.state_dict()) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert norm.weight.requires_grad and norm.bias.requires_grad


def test_the_defaults_are_those_of_pytorch() -> None:
    norm, ordinary = identity_batchnorm(drawn_moments(4, 0), 2), nn.BatchNorm2d(4)
    assert (norm.eps, norm.momentum) == (ordinary.eps, ordinary.momentum)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_and_statistics_have_the_dtype_asked_for(dtype: torch.dtype) -> None:
    state = identity_batchnorm(drawn_moments(4, 0), 2, dtype=dtype).state_dict()
    assert {tensor.dtype for name, tensor in state.items() if name != "num_batches_tracked"} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_it_leaves_the_moments_that_it_was_made_from_alone(dtype: torch.dtype) -> None:
    moments = drawn_moments(4, 0)
    mean, m2 = moments.mean.clone(), moments.m2.clone()
    norm = identity_batchnorm(moments, 1, dtype=dtype).train()
    norm(torch.ones(5, 4, dtype=dtype))
    assert torch.equal(moments.mean, mean)
    assert torch.equal(moments.m2, m2)


def test_in_train_mode_it_normalises_by_the_batch_and_its_running_statistics_move() -> None:
    norm = identity_batchnorm(drawn_moments(4, 1, smallest=-2, largest=2), 1, momentum=0.25).train()
    before = {name: tensor.double() for name, tensor in norm.state_dict().items()}
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1
    mean, var = mean_and_var(x)
    biased = var * (len(x) - 1) / len(x)
    expected = (x - mean) / (biased + norm.eps).sqrt() * before["weight"] + before["bias"]
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(norm(x).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.running_mean.double(), 0.75 * before["running_mean"] + 0.25 * mean, **close)
    torch.testing.assert_close(norm.running_var.double(), 0.75 * before["running_var"] + 0.25 * var, **close)


def test_a_channel_without_variance_stays_finite_in_both_modes() -> None:
    norm = identity_batchnorm(Moments(10, torch.full((2,), 3.0).double(), torch.zeros(2).double()), 1)
    x = torch.full((4, 2), 3.0)
    assert torch.equal(norm.eval()(x), x)
    assert norm.train()(x).isfinite().all()


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_values_per_channel_are_refused(count: int) -> None:
    message = (
        "^a variance needs at least two values per channel and the calibration set has "
        f"{count}; calibrate on more images$"
    )
    with pytest.raises(CalibrationError, match=message):
        identity_batchnorm(Moments(count, torch.zeros(3).double(), torch.zeros(3).double()), 1)


@pytest.mark.parametrize(
    ("mean", "m2"), [(torch.nan, 1.0), (torch.inf, 1.0), (0.0, torch.nan), (0.0, 1e300), (1e39, 1.0)]
)
def test_moments_that_float32_cannot_hold_are_refused(mean: float, m2: float) -> None:
    def channels(value: float) -> Tensor:
        return torch.tensor([1.0, value], dtype=torch.float64)

    with pytest.raises(CalibrationError, match=r"^mean or variance is not finite in torch\.float32$"):
        identity_batchnorm(Moments(10, channels(mean), channels(m2)), 1)
