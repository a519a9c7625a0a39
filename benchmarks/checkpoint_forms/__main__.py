"""What `load_checkpoint` makes of the forms in which people have their checkpoints: loaded, or which message.

    python -m benchmarks.checkpoint_forms --output benchmarks/checkpoint_forms/results/checkpoint_forms.md

The forms are those of `tests/support/checkpoint_forms.py`, all of one small VGG.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from bn_insert.report import versions
from tests.support.checkpoint_forms import FORMS, outcome


def main() -> None:
    """Print a row per form, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    outcomes = {}
    for name in FORMS:
        with tempfile.TemporaryDirectory() as folder:
            outcomes[name] = outcome(name, Path(folder)).replace("|", "\\|")
    loaded = sum(each == "loaded" for each in outcomes.values())
    lines = [
        "# Forms of checkpoints",
        "",
        f"{loaded} of {len(outcomes)} forms are loaded; for each of the others, the message is what a user reads.",
        "",
        "| form | outcome |",
        "|---|---|",
        *(f"| {name} | {text} |" for name, text in outcomes.items()),
        "",
        ", ".join(f"{name} {number}" for name, number in versions().items()),
        "",
    ]
    print("\n".join(lines))
    if options.output:
        options.output.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
