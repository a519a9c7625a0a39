"""Insert BatchNorm into a pretrained network without changing its outputs.

The public names are those of `_public.py`. Reading images is in `bn_insert.images`, writing reports in
`bn_insert.report`, and the network that ships with the package in `bn_insert.demo`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._public import *  # noqa: F403 - it has __all__
    from ._public import __all__ as __all__
else:

    def __getattr__(name: str) -> Any:
        """Import all public names, and torch with them, at the first use of one.

        Python imports this package before it runs `__main__.py`, which handles signals, and errors such as too little
        memory for torch.
        """
        public = import_module("._public", __name__)
        globals().update({each: getattr(public, each) for each in ("__all__", *public.__all__)})
        if name not in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]


def __dir__() -> list[str]:
    """Return the public names alone, for completion in an interactive session."""
    return sorted(import_module("._public", __name__).__all__)
