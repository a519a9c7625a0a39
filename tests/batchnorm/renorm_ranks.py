"""One of two processes that train with synchronized statistics; `forked_ranks` runs it: `renorm_ranks.py FOLDER`."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from bn_insert.batchnorm.batch_renorm import BatchRenorm1d, BatchRenorm2d

# Sizes of the two ranks' batches.
SPLITS = {"even": (4, 4), "uneven": (3, 5), "with an empty rank": (0, 8), "of one image each": (1, 1)}
LIMITS = {"unlimited": {}, "limited": {"r_max": 1.2, "d_max": 0.3}}


def network(dtype: torch.dtype, *, synchronize: bool, **limits: float) -> nn.Sequential:
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, dtype=dtype),
        BatchRenorm2d(6, dtype=dtype, synchronize=synchronize, **limits),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5, dtype=dtype),
        BatchRenorm1d(5, dtype=dtype, synchronize=synchronize, **limits),
    )
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 0.8 + 0.1)
    return model


def batch(size: int, dtype: torch.dtype, step: int) -> tuple[Tensor, Tensor]:
    """Return images, and what the outputs are multiplied by to be the loss."""
    generator = torch.Generator().manual_seed(10 + step)
    x = torch.randn(size, 3, 7, 7, generator=generator, dtype=torch.float64)
    weights = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    return x.to(dtype), weights.to(dtype)


def trained(model: nn.Module, batches: list[tuple[Tensor, Tensor]], *, checkpointed: bool = False) -> dict[str, Any]:
    """Return outputs, gradients summed over steps and ranks, and buffers, after one step a batch."""
    outputs, input_grads = [], []
    for inputs, weights in batches:
        x = inputs.clone().requires_grad_()
        output = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        (output * weights).sum().backward()
        outputs.append(output.detach())
        input_grads.append(x.grad)
    grads = [parameter.grad for parameter in model.parameters()]
    if distributed.is_initialized() and not isinstance(model, DistributedDataParallel):
        for grad in grads:
            distributed.all_reduce(grad)
    return {
        "outputs": outputs,
        "input_grads": input_grads,
        "grads": grads,
        "buffers": [buffer.clone() for buffer in model.buffers()],
    }


def main() -> None:
    folder = Path(sys.argv[1])
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    results = {}
    for dtype in (torch.float32, torch.float64):
        for limits, keywords in LIMITS.items():
            for split, sizes in SPLITS.items():
                batches = [batch(sum(sizes), dtype, step) for step in range(2)]
                parts = [(x.split(sizes)[rank], weights.split(sizes)[rank]) for x, weights in batches]
                results[dtype, limits, split] = trained(network(dtype, synchronize=True, **keywords), parts)
                if split == "even":
                    model = network(dtype, synchronize=True, **keywords)
                    results[dtype, limits, "checkpointed"] = trained(model, parts, checkpointed=True)
                    model = DistributedDataParallel(network(dtype, synchronize=True, **keywords))
                    results[dtype, limits, "parallel"] = trained(model, parts)
    torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
