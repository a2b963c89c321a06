"""The statistical laboratory: every claim of the paper, looked at on a real network.

It looks in from outside: layers know nothing of it. probe.py runs one batch forward once and then
backward as often as wanted, with quantizers and noise of one's choice; terms.py takes the noise of
a backward pass apart, site by site; theorems.py is the two theorems as statistics of these parts,
variance.py the variance against bits. setting.py finds a run and a step, replay.py changes its
quantizers, audit.py its integers. `python -m minifqt.study` (__main__.py) runs all of it through
claims.py and tools.py; page.py makes the report. Mathematics: docs/theory.md.
"""
from minifqt.study.probe import Probe
from minifqt.study.terms import Terms, measure

__all__ = ["Probe", "Terms", "measure"]
