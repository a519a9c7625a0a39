"""mkdocs hook that leaves out what pages say only to those who read them in the repository.

Such pages get their content when the site is built. What stands between the two comments explains that, with links.
"""

from __future__ import annotations

import re
from typing import Any

NOTE = re.compile(r"<!-- in the repository -->\n.*?<!-- end -->\n*", re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the page without such notes."""
    return NOTE.sub("", markdown)
