"""A verdict: the form in which every report says what it concludes from its figures."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Verdict(NamedTuple):
    """A conclusion: whether it is good, to be checked, bad or open; what it is about; one or two sentences."""

    state: Literal["good", "check", "bad", "open"]
    subject: str
    text: str
