"""What inserting, equalizing and folding make of the writings of VGGs and their relatives: a table.

    python -m benchmarks.architectures --output benchmarks/architectures/results/architectures.md

The networks are those that `tests/support/architectures.py` holds the tool to, small, with random weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_insert import GraphError, compare_outputs, find_edges, find_sites, fold_batchnorm, insert_batchnorm
from bn_insert.graph.copies import unwrapped
from bn_insert.report import versions
from tests.support.architectures import ARCHITECTURES, made


def row(name: str) -> list[str]:
    """Return what came out for one network."""
    batch, model = ARCHITECTURES[name].batch(), made(name)
    sites = find_sites(model, batch)
    inserted, equalized = (insert_batchnorm(model, [batch], equalize=equalize) for equalize in (False, True))
    edges = find_edges(model, batch, sites)
    done = sum(not edge.reason for edge in edges)
    before = sum(isinstance(module, _BatchNorm) for module in model.modules())
    return [
        name,
        f"{len(sites)}" + (f" (and {before} there already)" if before else ""),
        _same(compare_outputs(model, inserted, [batch]).bit_identical),
        _same(compare_outputs(model, equalized, [batch]).bit_identical),
        f"{done} of {len(edges)}",
        _folded(model, inserted, equalized, batch),
        ARCHITECTURES[name].note,
    ]


def _same(identical: bool) -> str:
    return "bit for bit" if identical else "no"


def _folded(model: nn.Module, inserted: nn.Module, equalized: nn.Module, batch: object) -> str:
    try:
        folded, of_equalized = fold_batchnorm(inserted, batch), fold_batchnorm(equalized, batch)
    except GraphError:
        return "refused"
    original, tensors = unwrapped(model).state_dict(), folded.state_dict()
    same = original.keys() == tensors.keys() and all(torch.equal(original[key], tensors[key]) for key in original)
    outputs = compare_outputs(model, of_equalized, [batch])
    if same and outputs.bit_identical:
        return "exact"
    return f"outputs to {max(outputs.max_rel, compare_outputs(model, folded, [batch]).max_rel):.0e}"


def main() -> None:
    """Print a row a network, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--networks", nargs="+", choices=ARCHITECTURES, default=tuple(ARCHITECTURES), metavar="NAME")
    options = parser.parse_args()
    lines = [
        "# Tested networks",
        "",
        "Outputs are compared with those of the original network, in eval mode on CPU. Fold back, exact: the original",
        "tensors are restored bit for bit; after equalization, the outputs are.",
        "",
        "| network | BatchNorms inserted | outputs | with `equalize` | equalized layers | fold back | |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in options.networks:
        lines.append("| " + " | ".join(row(name)) + " |")
        print(lines[-1], flush=True)
    lines += ["", ", ".join(f"{name} {number}" for name, number in versions().items()), ""]
    if options.output:
        options.output.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
