"""Bars on a terminal."""

import sys

from reprobe.progress import terminal


def test_a_description_that_goes_on_after_a_colon_keeps_its_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")  # only the last state of the bars is drawn
    with terminal() as progress:
        progress("train: loss 3.5", 1, 2)
        progress("train: loss 2.5", 2, 2)
        progress("score", 1, 1)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 2
    assert "loss 2.5" in lines[0]
    assert "100%" in lines[0]
    assert "score" in lines[1]
