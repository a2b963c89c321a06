"""The benchmarks and the walkthrough run, and what they stored fits what they promise.

Nothing is measured here: the runs are as small as they can be. Each is a process of its own, as
when a user types the command. Next: benchmarks/step.py.
"""
import fcntl
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FACTS = {"schema", "kind", "machine", "date", "commit", "dirty", "command", "versions", "seed",
         "threads"}
KEYS = {
    "step": {"model", "batch", "repeats", "warmup", "quick", "rows", "skipped"},
    "accuracy": {"dataset", "model", "epochs", "recipe", "test_acc", "best_acc", "train_loss",
                 "seconds", "diverged", "commits", "curve"},
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


def quick_step(folder, *more, **environment):
    run("benchmarks/step.py", "--quick", "--model", "resnet8", "--recipes", "fp32,bhq8",
        "--threads", 1, "--out", folder, *more, **environment)
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
    (hidden / "torch.py").write_text(
        "import os\n"
        "names = 'ATEN_CPU_CAPABILITY', 'ONEDNN_MAX_CPU_ISA', 'MKL_ENABLE_INSTRUCTIONS'\n"
        "raise ImportError('hidden by a test ' + ','.join(os.environ.get(n, '') for n in names))")
    for more, told in (((), ",ALL,"), (("--torch-avx2",), "avx2,AVX2,AVX2")):
        result = quick_step(tmp_path, *more, PYTHONPATH=str(hidden), ONEDNN_MAX_CPU_ISA="ALL")
        assert [row["ratio"] for row in result["rows"]] == [None, None]
        assert len(result["skipped"]) == 3
        assert all(f"hidden by a test {told};" in entry["why"] for entry in result["skipped"])
    assert len(list(tmp_path.glob("*.json"))) == 2        # the second overwrote nothing


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch==2.13.0")
def test_the_step_benchmark_compares_the_same_network(tmp_path):
    result = quick_step(tmp_path)
    assert not result["skipped"]
    assert all(row["ratio"] > 0 for row in result["rows"])
    losses = {row["name"]: row["first_loss"] for row in result["rows"]}
    # rel: float32 rounding in 8 layers, batch norm over four images included
    assert losses["minifqt fp32"] == pytest.approx(losses["PyTorch float32"], rel=1e-5)
    assert losses["minifqt fp32"] != losses["PyTorch bfloat16 channels_last"]


# ---- accuracy.py ---------------------------------------------------------------------------------


def accuracy(folder, *more):
    """What the queue prints; a tiny one on the digits, with everything it writes in this folder."""
    return run(*tiny_queue(folder), *more)


def tiny_queue(folder):
    return "benchmarks/accuracy.py", "--out", folder, "--runs", folder / "runs", "--epochs", 1


def results(folder):
    return [json.loads(line) for line in
            (folder / "accuracy-digits.jsonl").read_text().splitlines()]


def refused(*command):
    """The error of a command that must fail, one line."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_the_queue_trains_what_is_missing_in_the_order_asked_for(tmp_path):
    assert "0 of 1 runs" in accuracy(tmp_path, "--recipes", "qat8", "--seeds", "0", "--threads", 2)
    folder, = tmp_path.glob("runs/*qat8*")
    assert " 2 threads; " in (folder / "log.txt").read_text()
    first = (tmp_path / "accuracy-digits.jsonl").read_text()
    said = accuracy(tmp_path, "--recipes", "qat8,fp32", "--seeds", "0,1")
    assert "1 of 4 runs" in said
    starts = [line.split()[:3] for line in said.splitlines() if line.endswith("started")]
    assert starts == [["fp32", "seed", "0"], ["qat8", "seed", "1"], ["fp32", "seed", "1"]]
    assert (tmp_path / "accuracy-digits.jsonl").read_text().startswith(first)
    found = {(result["recipe"], result["seed"]): result for result in results(tmp_path)}
    assert set(found) == {("qat8", 0), ("fp32", 0), ("qat8", 1), ("fp32", 1)}
    for key, result in found.items():
        require_schema(result)
        assert result["threads"] == 1 + (key == ("qat8", 0))
        assert result["test_acc"] > 0.2                   # one epoch already beats one in ten
        assert result["curve"] == {"train_loss": [result["train_loss"]],
                                   "test_acc": [result["test_acc"]]}
        assert result["commits"] == [result["commit"]]
    mean = 50 * (found["qat8", 0]["test_acc"] + found["qat8", 1]["test_acc"])
    assert f"| qat8 | {mean:.2f} ± " in accuracy(tmp_path, "--table")
    if importlib.util.find_spec("matplotlib"):
        accuracy(tmp_path, "--plot", tmp_path / "curves.png")
        assert 0 < (tmp_path / "curves.png").stat().st_size < 60_000


def interrupted(command, number, whole_group):
    """Send the queue a signal after its first epoch, as `kill` does or a terminal."""
    with subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, start_new_session=True) as queue:
        for line in queue.stdout:
            if " loss " in line:
                break
        (os.killpg if whole_group else os.kill)(queue.pid, number)
        rest = queue.stdout.read()
        assert queue.wait(60) == 130
    assert "the same command goes on" in rest


@pytest.mark.slow
def test_an_interrupted_queue_goes_on_to_the_same_numbers(tmp_path):
    settings = ("--epochs", 10, "--recipes", "bhq3", "--seeds", 7)
    accuracy(tmp_path / "whole", *settings)
    broken, name = tmp_path / "broken", "digits-resnet8-10epochs-bhq3-seed7"
    for number, whole_group in ((signal.SIGTERM, False), (signal.SIGINT, True)):
        interrupted((*tiny_queue(broken), *settings), number, whole_group)
        log = (broken / "runs" / name / "log.txt").read_text().splitlines()
        assert log[-1].startswith("interrupted and saved")
    assert "bhq3 seed 7  resumed after epoch" in accuracy(broken, *settings)
    (whole,), (result,) = results(tmp_path / "whole"), results(broken)
    clocks = {"date", "command", "machine", "seconds"}
    assert ({key: value for key, value in result.items() if key not in clocks}
            == {key: value for key, value in whole.items() if key not in clocks})
    assert len((broken / "runs" / name / "starts.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
def test_a_run_begun_by_hand_is_adopted_and_a_diverged_one_is_a_result(tmp_path):
    runs = tmp_path / "runs"
    for recipe, lr, status in (("qat8", 1e30, 3), ("fp32", 0.05, 0)):
        done = subprocess.run(
            [sys.executable, "train.py", "--recipe", recipe, "--lr", str(lr), "--epochs", "1",
             "--threads", "1", "--out", str(runs / recipe)], cwd=ROOT, timeout=120,
            capture_output=True)
        assert done.returncode == status
        (runs / recipe).rename(runs / f"digits-resnet8-1epochs-{recipe}-seed0")
    said = accuracy(tmp_path, "--recipes", "qat8,fp32", "--seeds", 0)
    assert "fp32 seed 0  resumed after epoch 1" in said
    assert "| qat8 | diverged |" in said
    assert "unknown" in said.splitlines()[-1]             # the commit
    found = {result["recipe"]: result for result in results(tmp_path)}
    for result in found.values():
        require_schema(result)
    assert re.fullmatch(r"step \d, epoch 1: .*First not finite: .*\.", found["qat8"]["diverged"])
    assert "checkpoint" not in found["qat8"]["diverged"]  # what to do is no result
    assert found["qat8"]["test_acc"] is None
    assert [result["commits"][0] for result in found.values()] == [None, None]
    starts = {recipe: len((runs / f"digits-resnet8-1epochs-{recipe}-seed0" / "starts.jsonl")
                          .read_text().splitlines()) for recipe in found}
    assert starts == {"qat8": 2, "fp32": 1}               # of fp32 nothing was left to train
    assert "2 of 2 runs" in accuracy(tmp_path, "--recipes", "qat8,fp32", "--seeds", 0)


def test_a_run_that_fails_is_no_result_and_says_why(tmp_path):
    folder = tmp_path / "runs" / "digits-resnet8-1epochs-fp32-seed0"
    folder.mkdir(parents=True)
    (folder / "last.safetensors").write_text("damaged")
    command = (*tiny_queue(tmp_path), "--recipes", "fp32", "--seeds", 0)
    assert "1 runs came to no result" in refused(*command)
    assert not (tmp_path / "accuracy-digits.jsonl").exists()
    assert "is truncated or no checkpoint" in (folder / "log.txt").read_text()


def test_what_the_queue_cannot_do_is_one_clear_line(tmp_path):
    command = tiny_queue(tmp_path)
    assert "has no finished run of resnet8, 1 epochs" in refused(*command, "--table")
    assert "no quantizer is named 'bqh'" in refused(*command, "--recipes", "fp32,bqh5")
    assert "--download" in refused(*command, "--dataset", "cifar10", "--data-dir", tmp_path)
    assert "--epochs 0" in refused(*command, "--epochs", 0)
    (tmp_path / "runs").mkdir()
    with (tmp_path / "runs" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "runs is in use by another queue" in refused(*command)
    (tmp_path / "accuracy-digits.jsonl").write_text('{"recipe": "fp32"}\n{"recipe": "ba\n')
    assert "accuracy-digits.jsonl, line 2 is damaged" in refused(*command)


def table_of(folder, lines):
    """The table of these results."""
    (folder / "accuracy-digits.jsonl").write_text("".join(json.dumps(each) + "\n"
                                                          for each in lines))
    return accuracy(folder, "--table")


def test_a_diverged_run_stands_in_the_table_as_diverged(tmp_path):
    line = {"model": "resnet8", "recipe": "ptq2", "seed": 0, "epochs": 1, "test_acc": None,
            "diverged": "nan", "commits": [None], "seconds": 1.0, "threads": 1,
            "machine": {"cpu": "a test"}}
    lines = [line, line | {"recipe": "bhq2"},
             line | {"recipe": "bhq2", "seed": 1, "test_acc": 0.5, "diverged": None},
             line | {"recipe": "bhq2", "epochs": 2}, line | {"recipe": "bhq2", "model": "resnet20"}]
    table = table_of(tmp_path, lines)
    assert "| ptq |  | diverged |" in table
    assert "| bhq |  | 1 of 2 diverged, else 50.00 |" in table
    assert "over the seeds 0 (bhq2: 0, 1); 3 runs" in table


def test_automatic_runs_stand_in_a_column_of_their_own_with_their_bits(tmp_path):
    line = {"model": "resnet8", "recipe": "bhq-auto", "seed": 0, "epochs": 1, "test_acc": 0.5,
            "diverged": None, "commits": [None], "seconds": 1.0, "threads": 1,
            "machine": {"cpu": "a test"}, "average_bits": 3.25}
    lines = [line, line | {"recipe": "bhq4", "average_bits": None}]
    table = table_of(tmp_path, lines)
    assert "| gradients | float32 | 4 bits | automatic |" in table
    assert "| 50.00 | 50.00 (3.25 bits) |" in table


def test_a_recipe_with_fields_is_one_recipe_with_a_row_of_its_own(tmp_path):
    said = run("-c", "import sys; sys.path.insert(0, sys.argv[1]); import accuracy; "
               "print(*accuracy.recipes('fp32,bhq-auto,alpha=0.05,grad_w=ptq4,psq4'), sep=';')",
               ROOT / "benchmarks")
    names = ["fp32", "bhq-auto,alpha=0.05,grad_w=ptq4", "psq4"]
    assert said.strip().split(";") == names
    line = {"model": "resnet8", "seed": 0, "epochs": 1, "test_acc": 0.5, "diverged": None,
            "threads": 1, "commits": [None], "seconds": 1.0, "machine": {"cpu": "a test"}}
    names += ["bhq4", "fp32,eval_range=batch"]
    table = table_of(tmp_path, [line | {"recipe": name} for name in names]).splitlines()
    assert table[:7] == [
        "| gradients | float32 | 4 bits | automatic |", "|---|---|---|---|",
        "| fp32 | 50.00 |  |  |", "| fp32,eval_range=batch | 50.00 |  |  |",
        "| psq |  | 50.00 |  |", "| bhq |  | 50.00 |  |",
        "| bhq,alpha=0.05,grad_w=ptq4 |  |  | 50.00 |"]


def test_the_average_bits_of_a_run_are_those_of_its_finished_steps(tmp_path):
    code = """if True:
        import sys, json; sys.path.insert(0, sys.argv[1])
        from pathlib import Path
        from accuracy import average_bits
        log = Path(sys.argv[2]) / "bits.jsonl"
        log.write_text("".join(json.dumps({"step": s, "average": a}) + chr(10)
                               for s, a in ((0, 8), (32, 4), (64, 2))))
        print(average_bits(log, [{"step": 22}, {"step": 44}]), average_bits(log, []),
              average_bits(log, [{"step": 128}]))"""
    said = run("-c", code, ROOT / "benchmarks", tmp_path)
    assert said.split() == [str(round((32 * 8 + 12 * 4) / 44, 3)), "None", "4.0"]


@pytest.mark.parametrize("dataset", ["digits", "cifar10"])
def test_the_documents_show_the_table_of_the_stored_results(dataset):
    table = run("benchmarks/accuracy.py", "--dataset", dataset, "--table")
    assert table in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


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
