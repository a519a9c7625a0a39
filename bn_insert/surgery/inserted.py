"""Which BatchNorms of a network bn-insert inserted: they carry a mark, which copies keep."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..graph.copies import AnyModule, unwrapped

_MARK = "_bn_insert_inserted"


def marked(norm: AnyModule) -> AnyModule:
    """Mark a module as inserted, and return it."""
    vars(norm)[_MARK] = True
    return norm


def marked_modules(network: nn.Module) -> list[str]:
    """Return the qualified names of the marked modules."""
    return [name for name, module in network.named_modules() if _MARK in vars(module)]


def inserted_batchnorms(model: nn.Module) -> list[str]:
    """Return the qualified names of the BatchNorms that bn-insert inserted, and not those that a network had before.

    Those of a new head (`replace_head`) count too. A checkpoint stores the history of its network, so the names are
    known after loading it.

    Args:
        model: A network that bn-insert changed, or that `load_checkpoint` returned.

    Examples:
        >>> import torch
        >>> from bn_insert import fold, insert_batchnorm
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        >>> images = torch.rand(4, 3, 8, 8)
        >>> inserted = insert_batchnorm(model, [images])
        >>> inserted_batchnorms(inserted)
        ['4']
        >>> fold(inserted, images, names=inserted_batchnorms(inserted)).left
        ('1',)
    """
    network = unwrapped(model)
    return [name for name in marked_modules(network) if isinstance(network.get_submodule(name), _BatchNorm)]
