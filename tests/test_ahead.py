"""The process that compiles ahead: what it compiles is what a training step then asks for."""
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

import minifqt
from minifqt import ahead
from minifqt.kernels.cpu import choice

pytestmark = pytest.mark.skipif(choice.isa() is None, reason="nothing is compiled here")
ROOT = Path(__file__).parents[1]
SIGNATURES = """
import importlib, json, pathlib, sys
sys.path[:0] = [{root!r}, {tests!r}]
{what}
import numba
found = dict()
for path in pathlib.Path({root!r}, "minifqt/kernels/cpu").glob("[a-z]*.py"):
    for name, value in vars(importlib.import_module("minifqt.kernels.cpu." + path.stem)).items():
        if isinstance(value, numba.core.dispatcher.Dispatcher) and value.signatures:
            found[name] = sorted(map(str, value.signatures))
print(json.dumps(found))
"""
AHEAD = """
import runpy
sys.argv[1:] = [{instructions!r}, {fields!r}]
runpy.run_module("minifqt.ahead", run_name="__main__")
"""
STEP = """
import minifqt, models, tiny
net = minifqt.fuse(models.build("resnet8", 10, {recipe!r}, seed=1, channels=1))
train_set, _ = tiny.digits(64)
x = train_set.images.astype("float32") / 255
minifqt.train_step(net, minifqt.SGD(), x, train_set.labels, 0.05, 0)
"""
BACKWARD = {                                              # kernels of the backward pass alone
    "bhq5": {"wgrad_images", "correlate_gated", "gradient", "gradient_sums", "slopes", "plan",
             "reflect_and_round", "reflect"},
    "psq8": {"wgrad_images", "correlate_gated", "gradient", "gradient_sums", "slopes"},
    "qat8": {"wgrad_parts", "correlate_gated", "gradient", "gradient_sums", "slopes"}}


def signatures(what):
    """Name → signatures of all that is compiled, or loaded, in a new process that does this."""
    script = SIGNATURES.format(root=str(ROOT), tests=str(ROOT / "tests"), what=what)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", BACKWARD)
def test_what_is_compiled_ahead_is_what_a_step_asks_for(recipe):
    fields = json.dumps(asdict(minifqt.recipe(recipe)))
    early = signatures(AHEAD.format(instructions=choice.instructions(), fields=fields))
    step = signatures(STEP.format(recipe=recipe))
    assert BACKWARD[recipe] <= set(step)
    for name in BACKWARD[recipe]:
        assert set(step[name]) <= set(early[name]), name
    assert "correlate_images" not in early                # what the forward pass compiles meanwhile


@pytest.fixture
def started(monkeypatch):
    """The commands that would have been started."""
    commands = []
    monkeypatch.setattr(ahead, "_started", [])
    monkeypatch.setattr(ahead.subprocess, "Popen",
                        lambda command, **options: commands.append((command, options)))
    return commands


def test_begin_starts_a_process_with_this_recipe_and_these_instructions(started, monkeypatch):
    monkeypatch.setattr(ahead, "_cold", lambda: True)
    monkeypatch.setattr(ahead, "threads", lambda: 2)
    assert ahead.begin(minifqt.recipe("psq4"))
    (command, options), = started
    assert command[:3] == [sys.executable, "-m", "minifqt.ahead"]
    assert command[3] == choice.instructions()
    assert minifqt.Recipe(**json.loads(command[4])) == minifqt.recipe("psq4")
    assert (options["cwd"] / "minifqt/ahead.py").exists()


@pytest.mark.parametrize(("threads", "cold", "instructions"), [
    (1, True, "auto"), (2, False, "auto"), (2, True, "numpy")])
def test_begin_starts_nothing_where_that_is_of_no_use(threads, cold, instructions, started,
                                                      monkeypatch, set_instructions):
    set_instructions(instructions)
    monkeypatch.setattr(ahead, "_cold", lambda: cold)
    monkeypatch.setattr(ahead, "threads", lambda: threads)
    assert not ahead.begin(minifqt.recipe("bhq5"))
    assert not started


def test_an_empty_cache_is_cold_and_a_full_one_is_not(tmp_path):
    ahead.compile_backward(minifqt.recipe("bhq5"))
    assert not ahead._cold()
    asked = "from minifqt import ahead; print(ahead._cold())"
    done = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True,
                          timeout=100, env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)})
    assert done.stdout == "True\n", done.stderr
