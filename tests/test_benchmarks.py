"""The benchmarks and the walkthrough run, and what they stored fits what they promise.

Nothing is measured here: the runs are as small as they can be. Each is a process of its own, as
when a user types the command. Next: benchmarks/step.py.
"""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FACTS = {"schema", "kind", "machine", "date", "commit", "dirty", "command", "versions", "seed",
         "threads"}
KEYS = {
    "step": {"model", "batch", "repeats", "warmup", "quick", "rows", "skipped"},
    "digits": {"recipe", "epochs", "model", "test_acc", "best_acc", "train_loss", "seconds",
               "diverged"},
    "variance": {"dataset", "model", "recipe", "epochs", "batch", "train_loss", "formula", "rows"},
}
ROWS = {
    "step": {"name", "median_s", "p10_s", "p90_s", "ratio", "first_loss"},
    "variance": {"quantizer", "bits", "relative_variance", "layers"},
}


def run(*command, **environment):
    """What the command prints; its error is the test's."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True,
                          text=True, timeout=120,
                          env=os.environ | {"PYTHONIOENCODING": "utf-8"} | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def require_schema(result):
    assert result["schema"] == 1
    assert set(result) >= FACTS | KEYS.get(result["kind"], set())             # others may add kinds
    assert {"cpu", "cores", "features", "load"} == set(result["machine"])
    assert {"python", "numpy"} <= set(result["versions"])
    for row in result.get("rows", []):
        assert set(row) >= ROWS.get(result["kind"], set())


def stored():
    """Every JSON file and every line of a JSON lines file in benchmarks/results."""
    folder = ROOT / "benchmarks" / "results"
    for path in sorted(folder.glob("*.json")):
        yield pytest.param(path.read_text(), id=path.name)
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            yield pytest.param(line, id=f"{path.name}:{number}")


@pytest.mark.parametrize("text", list(stored()))
def test_every_stored_result_says_where_it_came_from(text):
    result = json.loads(text)
    require_schema(result)
    assert not result.get("quick"), "a --quick run measures nothing: do not store it"


def quick_step(folder, **environment):
    run("benchmarks/step.py", "--quick", "--model", "resnet8", "--recipes", "fp32,bhq8",
        "--threads", 1, "--out", folder, **environment)
    path = max(folder.glob("step-resnet8-*.json"), key=lambda path: path.stat().st_mtime_ns)
    result = json.loads(path.read_text())
    require_schema(result)
    assert result["kind"] == "step"
    assert result["quick"]
    assert [row["name"] for row in result["rows"]][:2] == ["minifqt fp32", "minifqt bhq8"]
    for row in result["rows"]:
        assert 0 < row["p10_s"] <= row["median_s"] <= row["p90_s"]
    return result


def test_without_pytorch_the_step_benchmark_says_what_it_left_out(tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise ImportError('hidden by a test')")
    for _ in range(2):
        result = quick_step(tmp_path, PYTHONPATH=str(hidden))
    assert len(list(tmp_path.glob("*.json"))) == 2        # the second overwrote nothing
    assert [row["ratio"] for row in result["rows"]] == [None, None]
    assert len(result["skipped"]) == 3
    assert all("hidden by a test" in entry["why"] for entry in result["skipped"])


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch==2.13.0")
def test_the_step_benchmark_compares_the_same_network(tmp_path):
    result = quick_step(tmp_path)
    assert not result["skipped"]
    assert all(row["ratio"] > 0 for row in result["rows"])
    losses = {row["name"]: row["first_loss"] for row in result["rows"]}
    # rel: float32 rounding in 8 layers, batch norm over four images included
    assert losses["minifqt fp32"] == pytest.approx(losses["PyTorch float32"], rel=1e-5)
    assert losses["minifqt fp32"] != losses["PyTorch bfloat16 channels_last"]


def test_the_digits_table_resumes_and_skips_what_is_done(tmp_path):
    def digits(*more):
        return run("benchmarks/digits.py", "--epochs", 1, "--workers", 1, "--recipes", "qat8",
                   "--out", tmp_path, *more)

    path = tmp_path / "digits.jsonl"
    assert "0 of 1 runs" in digits("--seeds", "0")
    first = path.read_text()
    assert "1 of 2 runs" in digits("--seeds", "0,1")
    both = path.read_text()
    assert both.startswith(first)
    runs = [json.loads(line) for line in both.splitlines()]
    assert [run["seed"] for run in runs] == [0, 1]
    for result in runs:
        require_schema(result)
        assert result["test_acc"] > 0.2                   # one epoch already beats one in ten
    table = digits("--seeds", "0,1", "--table")
    mean = 50 * (runs[0]["test_acc"] + runs[1]["test_acc"])
    assert f"| qat8 | {mean:.2f} ± " in table
    assert path.read_text() == both


def test_a_diverged_run_stands_in_the_table_as_diverged(tmp_path):
    line = {"recipe": "ptq2", "seed": 0, "epochs": 1, "test_acc": None, "diverged": "nan",
            "commit": None, "seconds": 1.0, "machine": {"cpu": "a test"}}
    lines = [line, line | {"recipe": "bhq2"},
             line | {"recipe": "bhq2", "seed": 1, "test_acc": 0.5, "diverged": None}]
    (tmp_path / "digits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = run("benchmarks/digits.py", "--epochs", 1, "--table", "--out", tmp_path)
    assert "| ptq |  | diverged |" in table
    assert "| bhq |  | 1 of 2 diverged, else 50.00 |" in table


def test_the_variance_study_writes_its_schema_and_ranks_the_quantizers(tmp_path):
    run("benchmarks/variance.py", "--epochs", 1, "--out", tmp_path,
        "--picture", tmp_path / "variance.png")
    result = json.loads((tmp_path / "variance-digits.json").read_text())
    require_schema(result)
    found = {(row["quantizer"], row["bits"]): row["relative_variance"] for row in result["rows"]}
    for bits in range(2, 9):
        assert found["bhq", bits] < found["psq", bits] < found["ptq", bits]
    if importlib.util.find_spec("matplotlib"):
        assert 0 < (tmp_path / "variance.png").stat().st_size < 60_000


def test_the_walkthrough_is_what_its_script_writes(tmp_path):
    run("docs/walkthrough.py", "--write", "--out", tmp_path / "page.md")
    fresh = (tmp_path / "page.md").read_text(encoding="utf-8")
    kept = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
    assert fresh == kept, "docs/walkthrough.md is old: run `python docs/walkthrough.py --write`"
