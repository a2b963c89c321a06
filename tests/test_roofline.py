"""The roofline and the scaling benchmark run, and their formulas count what they say.

Nothing is measured here: the runs are as small as they can be. Next: benchmarks/roofline_cpu.py.
"""
import importlib.util
import json
from itertools import product

import numpy as np
import pytest
from operands import codes
from test_benchmarks import ROOT, require_schema, run

from minifqt import Streams, quantizers
from minifqt.kernels import seen
from minifqt.kernels.cpu import choice
from minifqt.kernels.gemm import products
from minifqt.qtensor import as_floats

compiles = pytest.mark.skipif(choice.supported() == ["numpy"],
                              reason="needs numba, and VNNI or AVX2")


def quick(script, folder, *more, **environment):
    """(result, printed) of a quick run."""
    printed = run(f"benchmarks/{script}.py", "--quick", "--model", "resnet8", "--threads", 1,
                  "--out", folder, *more, **environment)
    path, = folder.glob("*.json")
    result = json.loads(path.read_text())
    require_schema(result)
    assert result["quick"]
    return result, printed


@pytest.fixture
def roofline(monkeypatch):
    """benchmarks/roofline_cpu.py as a module; it is no package."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("roofline_cpu")


@pytest.fixture
def limits(roofline):                                     # noqa: ARG001 - it extends the path
    """benchmarks/limits.py."""
    return importlib.import_module("limits")


@pytest.fixture
def work(roofline):                                       # noqa: ARG001
    """benchmarks/work.py."""
    return importlib.import_module("work")


@compiles
def test_the_roofline_has_a_limit_for_every_kernel_of_a_step(tmp_path):
    result, printed = quick("roofline_cpu", tmp_path, "--recipe", "bhq8")
    assert result["kind"] == "roofline"
    assert set(result["limits"]["products"]) == set(choice.supported()) - {"numpy"}
    assert all(value > 0 for value in result["limits"]["products"].values())
    for row in result["rows"]:
        assert row["bound"], f"{row['kernel']}: add it to benchmarks/work.py"
        assert row["calls"] >= 1
        assert row["total_ms"] > 0
    found = {row["kernel"] for row in result["rows"]}
    assert {"correlate_images", "correlate_gated", "wgrad_images", "round_rows"} <= found
    assert found & {"reflect", "reflect_and_round"}       # few images may be one group
    for sums in ("by_kernel", "rows"):
        total = sum(row["total_ms"] for row in result[sums])
        # abs: each row is rounded to 0.0001 ms
        assert total == pytest.approx(result["kernels_ms"], abs=1e-4 * len(result["rows"]))
    step = result["kernels_ms"] + result["python_ms"] - result["saved_ms"]
    assert step == pytest.approx(result["whole_ms"], abs=1e-3)
    assert result["python_ms"] > 0
    lines = {line[:33].strip(): float(line[33:]) for line in printed.splitlines()[-6:-1]}
    assert lines["= the step"] == pytest.approx(               # of what is printed, by 0.001
        lines["kernels, one at a time"] + lines["+ Python, NumPy"]
        - lines["− saved by wgrad beside them"], abs=0.003)


@compiles
def test_products_of_absent_taps_are_not_counted(work):
    for stride, spread, offset, side in product((1, 2), (1, 2), (0, 1), (4, 5)):
        outputs, taps = 3, 3
        there = [offset + spread * i for i in range(side)]
        met = sum(p * stride + r in there for p in range(outputs) for r in range(taps))
        assert work.meetings(outputs, taps, offset, side, spread, stride) == met


@compiles
def test_the_slowest_resource_is_the_limit(limits, work):
    rates = {"products": {"avx2": 4.0}, "floats": 2.0, "noise": 1.0, "doubles": 1.0,
             "memory": [{"bytes": 10, "read": 8.0, "copy": 4.0},
                        {"bytes": 99, "read": 1.0, "copy": 1.0}]}
    for needs, expected in (
            ({"products": 8, "noise": 1}, (2, "integer")), ({"floats": 6, "doubles": 2},
                                                            (3, "float32")),
            ({"read": 8}, (1, "memory")), ({"read": 5, "written": 5}, (2.5, "memory")),
            ({"read": 50, "written": 50}, (100, "memory"))):
        assert limits.allowed(work.Work("", **needs), rates, "avx2") == expected


@compiles
def test_a_kernel_without_a_formula_is_listed_without_a_limit(roofline, work):
    def unheard(counter, x):
        pass

    arguments = np.zeros((2, 3), np.float32),
    assert work.work_of(unheard, arguments).shape == "2·3"
    row, = roofline.rows_of([{("unheard", "2·3"): [(0.001, None)]}], {}, "avx2")
    assert (row["total_ms"], row["allowed_ms"], row["ratio"]) == (1, None, None)


@compiles
def test_the_instruments_see_a_kernel_and_are_gone_after_a_step(roofline):
    x, calls = np.ones((2, 3, 3, 4), np.float32), roofline.Calls()
    with roofline.watched(calls):
        seen.summary(x)
    assert list(calls) == [("summarize", "2·36")]
    (seconds, work), = calls["summarize", "2·36"]
    assert calls.seconds() == seconds > 0
    assert (work.read, work.written, work.doubles) == (4 * 72, 0, 72)
    with pytest.raises(ZeroDivisionError), roofline.watched(calls):
        1 / 0  # noqa: B018 - a step that fails
    seen.summary(x)
    assert len(calls["summarize", "2·36"]) == 1           # not watched any more


@compiles
@pytest.mark.parametrize("prepare", [lambda t: t, lambda t: as_floats(t, "float32")],
                         ids=["codes", "floats"])
def test_a_kernel_that_is_begun_ends_at_once_under_the_instruments(prepare, roofline):
    rng, calls = np.random.default_rng(0), roofline.Calls()
    g, x = (prepare(codes(rng, (2, 5, 6, channels))) for channels in (3, 4))
    with roofline.watched(calls):
        end = products.begin_wgrad(g, x, (3, 3), 1, 1)
        (name, _), = calls                                # before anybody has ended it
    assert name == "wgrad_images" if g.is_integer else "wgrad_parts"
    assert (end() == products.conv_wgrad(g, x, (3, 3), 1, 1)).all()
    (_, work), = calls[next(iter(calls))]
    met = (3 * 5 - 2) * (3 * 6 - 2)                       # pixels of g and x under each tap
    assert max(work.products, work.floats) == 2 * met * 3 * 4


@compiles
def test_reflections_are_counted_by_what_they_do(roofline):
    x, calls = np.random.default_rng(0).standard_normal((64, 50), "float32"), roofline.Calls()
    x[2] *= 2
    with roofline.watched(calls):
        t = quantizers.create("bhq", 5)(x, Streams(0).stream("x"))
        t.mix.undo(x)
    count = x.size * (1 + (t.mix.n > 1).mean())           # Σ and reflection, or one passage
    assert count > x.size
    found = {key: work._replace(shape="") for key, ((_, work),) in calls.items()
             if "reflect" in key[0]}
    expect = roofline.Work("", read=x.nbytes, doubles=round(count), floats=2 * x.size)
    assert found == {
        ("reflect_and_round", "64·50 → codes"): expect._replace(
            written=x.size, noise=x.size, floats=(2 + 9) * x.size),
        ("reflect", "64·50"): expect._replace(written=x.nbytes)}


def test_without_pytorch_the_scaling_benchmark_says_what_it_left_out(tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise ImportError('hidden by a test')")
    result, printed = quick("scaling", tmp_path, "--recipes", "bhq8", PYTHONPATH=str(hidden))
    assert result["kind"] == "scaling"
    assert [row["batch"] for row in result["batches_rows"]] == [2, 4]
    assert [row["threads"] for row in result["threads_rows"]] == [1, 2]
    assert all(row["ms_an_image"] > 0 for row in result["batches_rows"] + result["threads_rows"])
    row, = result["memory_rows"]
    assert row["mb"] == pytest.approx(row["peak_mb"] - row["before_mb"], abs=0.11)    # rounded
    assert [row["name"] for row in result["loader_rows"]] == ["loader alone", "step alone",
                                                              "step fed by the loader"]
    assert len(result["skipped"]) == 2
    assert printed.count("hidden by a test") == 2


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch==2.13.0")
def test_the_scaling_benchmark_measures_pytorch_beside(tmp_path):
    result, _ = quick("scaling", tmp_path, "--recipes", "fp32", "--parts", "batches")
    assert not result["skipped"]
    assert "memory_rows" not in result
    names = ["minifqt fp32", "PyTorch float32 channels_last", "PyTorch bfloat16 channels_last"]
    assert [row["name"] for row in result["batches_rows"][::2]] == names


def test_the_step_benchmark_says_which_instructions_it_used(tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise ImportError('hidden by a test')")
    result, printed = quick("step", tmp_path, "--recipes", "qat8", "--instructions", "numpy",
                            "--plain", PYTHONPATH=str(hidden))
    assert (result["instructions"], result["fused"]) == ("numpy", False)
    assert "NumPy and BLAS" in result["kernels"]
    assert f"{result['kernels']}; not fused" in printed
