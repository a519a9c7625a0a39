"""Runs and pages without charts."""

import pytest


def leave_out_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no charts, which take most of the time of a short run and of a page."""
    monkeypatch.setattr("bn_insert.training.results.write_curves", lambda _history, path: path.touch())
    monkeypatch.setattr("bn_insert.report.page.run_charts", lambda _runs: ())
    monkeypatch.setattr("bn_insert.report.page.insertion_charts", lambda _data, *, errors: ())  # noqa: ARG005
    monkeypatch.setattr("bn_insert.report.page.agreement_chart", lambda _agreements, _renorm: None)
