"""The statistical laboratory: every claim of the paper, looked at on a real network.

It looks in from outside: layers know nothing of it. probe.py runs one batch forward once and then
backward as often as wanted, with quantizers and noise of one's choice; terms.py takes the noise of
a backward pass apart, site by site; layers.py and unbiased.py are the two theorems as statistics
of these parts. `python -m minifqt.study` runs them (__main__.py). Mathematics: docs/theory.md.
"""
from minifqt.study.probe import Probe
from minifqt.study.terms import Terms, measure

__all__ = ["Probe", "Terms", "measure"]
