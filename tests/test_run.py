"""Runs: resuming, interruption, corruption, divergence, and that every setting acts."""
import hashlib
import json
import shlex
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from tiny import InterruptAt, digits, job, outcome, train_all

import minifqt
import models
import train
from data.loader import Loader
from minifqt import backend, checkpoint, optim, training
from minifqt.kernels.cpu import choice
from minifqt.run import interruptible

ROOT = Path(__file__).parents[1]


def hashes(arrays):
    """Short stand-ins for the bytes of arrays: pytest takes minutes to show how bytes differ."""
    return {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}


def contents(run):
    """Every array of the last checkpoint, its progress but for the clock, and the metrics."""
    arrays, meta = checkpoint.load(run.last)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    for values in (meta["progress"], *lines):
        for clock in ("seconds", "images_per_second", "test_seconds"):
            values.pop(clock, None)
    return hashes(arrays), meta["progress"], lines


@pytest.mark.parametrize("recipe", ["bhq5", "fp32"])
@pytest.mark.parametrize("number", [0, 4, 5, 6])          # 3 steps an epoch: inside, at the end
def test_a_run_interrupted_and_resumed_ends_bit_identical_to_an_unbroken_one(
        tmp_path, recipe, number):
    whole, loaders = job(tmp_path / "whole", recipe)
    whole.start()
    train_all(whole, loaders)
    first, (train_loader, test_loader) = job(tmp_path / "broken", recipe)
    first.start()
    assert train_all(first, (InterruptAt(train_loader, number), test_loader)) is None
    second, loaders = job(tmp_path / "broken", recipe)
    second.resume()
    assert second.progress.step == number + 1             # the step under way was finished
    assert train_all(second, loaders)["epoch"] == 3
    assert contents(second) == contents(whole)


def test_what_a_run_wrote_after_its_last_checkpoint_is_dropped_on_resume(tmp_path):
    run, loaders = job(tmp_path / "a")
    run.start()
    train_all(run, loaders, epochs=2)
    before = contents(run)
    with run.metrics.open("a") as file:
        file.write('{"epoch": 3, "step": 33, "test_acc": 1.0}\n{"epoch": 4, "te')
    (run.folder / "last.safetensors.1.tmp").write_bytes(b"half a checkpoint")
    again, _ = job(tmp_path / "a")
    again.resume()
    assert contents(again) == before
    assert not list(run.folder.glob("*.tmp"))


def test_long_epochs_are_saved_in_the_middle(tmp_path):
    run, (train_loader, test_loader) = job(tmp_path / "a", save_minutes=0)
    run.start()
    positions = []
    save = run.save
    run.save = lambda name="last": (positions.append(run.progress.position), save(name))
    train_all(run, (train_loader, test_loader), epochs=1)
    assert positions[:2] == [1, 2]


def test_a_kill_in_the_middle_of_a_save_loses_nothing(tmp_path):
    path = tmp_path / "last.safetensors"
    checkpoint.save(path, {"w": np.arange(1000.0)}, {"step": 1})
    before = path.read_bytes()
    for moment in ("fsync", "write"):
        code = f"""
import os, sys
import numpy as np
from minifqt import checkpoint
class Dies:
    def __getattr__(self, name): return getattr(os, name)
    def fsync(self, fd): os.kill(os.getpid(), 9)
if {moment!r} == "fsync":
    checkpoint.os = Dies()
else:
    original = checkpoint.Path.open
    def opened(self, *arguments):
        file = original(self, *arguments)
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), 9)
    checkpoint.Path.open = opened
checkpoint.save({str(path)!r}, {{"w": np.zeros(1000)}}, {{"step": 2}})
"""
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60)
        assert done.returncode == -9
        assert path.read_bytes() == before
    arrays, meta = checkpoint.load(path)
    assert meta == {"step": 1}
    np.testing.assert_array_equal(arrays["w"], np.arange(1000.0))


def test_a_failed_save_keeps_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, {"w": np.ones(3)}, {})
    before = path.read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, {"w": np.zeros(3)}, {})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_damaged_checkpoint_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, {"w": np.ones(300), "b": np.zeros(2)}, {"step": 7})
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"a\.safetensors is truncated or no checkpoint"):
        checkpoint.load(path)
    path.write_bytes(whole[:-20] + b"\x01" + whole[-19:])
    with pytest.raises(ValueError, match="is altered: its contents do not match its digest"):
        checkpoint.load(path)
    path.write_bytes(whole.replace(b"step\\\": 7", b"step\\\": 9"))
    with pytest.raises(ValueError, match="is altered"):
        checkpoint.load(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="truncated or no checkpoint"):
        checkpoint.load(path)
    with pytest.raises(FileNotFoundError, match="Give the folder of a run"):
        checkpoint.load(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("recipe", ["fp32", "bhq5"])
def test_a_diverging_run_stops_names_the_place_and_keeps_the_last_good_checkpoint(
        tmp_path, recipe):
    run, loaders = job(tmp_path / "a", recipe)
    run.start()
    train_all(run, loaders, epochs=1)
    before = run.last.read_bytes()
    with (np.errstate(all="ignore"),
          pytest.raises(training.DivergedError, match=r"step \d+, epoch \d.*First not finite: ")):
        run.train(*loaders, lambda epoch: 1e30, 3, say=lambda line: None)
    assert run.last.read_bytes() == before


def test_the_first_layer_that_is_not_finite_is_named():
    net = models.build("resnet8", 10, "fp32", channels=1)
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype("float32")
    net.layer2.layers[0].bn2.weight.data[3] = np.inf
    assert training.first_nonfinite(net, x) == "the parameter layer2.0.bn2.weight"
    net.layer2.layers[0].bn2.weight.data[3] = 3e38
    with np.errstate(all="ignore"):
        assert training.first_nonfinite(net, x) == "the output of layer2.0.bn2"
        progress = training.Progress()
        with pytest.raises(training.DivergedError, match=r"First not finite: the output of "
                           r"layer2\.0\.bn2\."):
            training.checked_step(net, minifqt.SGD(), x, np.arange(4), 0.1, progress, 0.0)
    assert "forward" not in vars(net.fc)                  # the instruments are gone


@pytest.mark.parametrize("recipe", ["fp32", "bhq5"])
def test_the_number_of_threads_changes_no_bit_of_a_run(recipe):
    x = np.random.default_rng(0).normal(size=(40, 16, 16, 3)).astype("float32")
    results, before = [], backend.threads()
    try:
        for count in (1, 2, 4):
            backend.set_threads(count)
            net, optimizer = models.build("resnet8", 10, recipe), minifqt.SGD()
            losses = [minifqt.train_step(net, optimizer, x, np.arange(40) % 10, 0.1, step)
                      for step in range(3)]
            results.append((losses, hashes(net.state())))
    finally:
        backend.set_threads(before)
    assert results[0] == results[1] == results[2]


def test_evaluation_is_per_image_and_changes_no_state():
    net = models.build("resnet8", 10, "bhq5", channels=1)
    train_set, test_set = digits()
    x, labels = next(Loader(train_set, 96, net.streams, train=True).epoch(0))
    minifqt.train_step(net, minifqt.SGD(), x, labels, 0.1, 0)
    before = {name: array.copy() for name, array in net.state().items()}
    results = [minifqt.evaluate(net, Loader(test_set, size, None, train=False))
               for size in (40, 16, 7)]                   # 7 leaves a last batch of 5
    assert {accuracy for _, accuracy in results} == {results[0][1]}
    np.testing.assert_allclose([loss for loss, _ in results], results[0][0],
                               rtol=1e-5)                 # float32 logits, other block sizes
    for name, array in net.state().items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)
    assert net.training


def test_signals_outside_the_main_thread_are_left_alone():
    from threading import Thread
    seen = []

    def body():
        with interruptible() as asked:
            seen.append(asked())

    thread = Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [False]


# ---- the command line ----------------------------------------------------------------------------


CHANGES = {
    "model": "resnet20", "recipe": "psq4", "epochs": "3", "batch_size": "32", "lr": "0.05",
    "schedule": "steps", "warmup": "1", "momentum": "0.5", "weight_decay": "0.01",
    "label_smoothing": "0.1", "seed": "1",
}


FIELDS = ("act=ptq4", "weight=sym4", "grad_w=ptq4", "grad_x=psq4", "eval_range=batch")


@pytest.mark.usefixtures("small")
def test_every_field_of_the_recipe_acts():
    base = ["--epochs", "1", "--out"]
    assert train.main([*base, "a"]) == 0
    for field in FIELDS:                                  # alpha: tests/test_autobits.py
        assert train.main([*base, field, "--recipe", f"bhq5,{field}"]) == 0
        assert outcome("a") != outcome(field), field
    assert {field.partition("=")[0] for field in FIELDS} | {"alpha"} == {
        field.name for field in fields(minifqt.Recipe)}


@pytest.mark.parametrize("flag", CHANGES)
@pytest.mark.usefixtures("small")
def test_every_flag_of_the_run_acts(flag):
    base = ["--epochs", "2", "--schedule", "cosine", "--out"]
    assert train.main([*base, "a"]) == 0
    assert train.main([*base, "b", f"--{flag.replace('_', '-')}", CHANGES[flag]]) == 0
    assert outcome("a") != outcome("b")


def test_the_other_flags_are_covered_by_name():
    flags = set(vars(train.parser().parse_args([])))
    elsewhere = {"dataset", "data_dir", "download", "device", "threads", "out", "resume", "kernels"}
    assert flags == set(CHANGES) | elsewhere
    assert len(flags) <= 20


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("recipe", ["bhq5", "fp32"])
def test_kernels_are_chosen_and_change_no_number(recipe, capsys):
    base = ["--epochs", "1", "--recipe", recipe, "--out"]
    try:
        for name in ("plain", *choice.supported()):
            assert train.main([*base, name, "--kernels", name]) == 0
            assert name == "plain" or choice.instructions() == name
            if (recipe, name) == ("fp32", "numpy"):       # BLAS sums floats in an order of its own
                (here, _), (there, _) = outcome(name)[1][0], outcome("plain")[1][0]
                assert here == pytest.approx(there, rel=1e-3)
            else:
                assert outcome(name) == outcome("plain")
    finally:
        choice.set_instructions("auto")
    assert "NumPy and BLAS, as asked" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_device_threads_out_and_data_flags_act(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(train.data, "load", lambda *given: asked.append(given) or digits(128))
    assert train.main(["--epochs", "1", "--threads", "1", "--out", "here", "--dataset", "cifar10",
                       "--model", "resnet8", "--data-dir", "there", "--download"]) == 0
    assert backend.threads() == 1
    assert asked == [("cifar10", "there", True)]
    assert {p.name for p in Path("here").iterdir()} == {
        "config.json", "metrics.jsonl", "last.safetensors", "best.safetensors"}
    assert "the curve is in here/metrics.jsonl" in capsys.readouterr().out
    if backend.cupy is None:
        assert train.main(["--device", "cuda"]) == 1
        assert "device cuda: CuPy is not installed" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_an_interrupted_command_says_how_to_go_on_and_does(monkeypatch, capsys):
    original = train.Loader
    monkeypatch.setattr(train, "Loader", lambda *a, **k: (
        InterruptAt(original(*a, **k), 1) if k["train"] else original(*a, **k)))
    assert train.main(["--epochs", "2", "--out", "a", "--kernels", "plain", "--data-dir",
                       "a folder"]) == 130
    *_, said = capsys.readouterr().out.splitlines()
    *_, again = said.partition("go on with: ")
    assert again == "python train.py --resume a --data-dir 'a folder' --kernels plain"
    monkeypatch.setattr(train, "Loader", original)
    assert train.main([*shlex.split(again)[2:], "--threads", "1"]) == 0
    assert train.main(["--epochs", "2", "--out", "b"]) == 0
    assert outcome("a") == outcome("b")


@pytest.mark.usefixtures("small")
def test_resume_uses_the_runs_settings_and_refuses_others(capsys):
    assert train.main(["--epochs", "1", "--recipe", "psq4", "--lr", "0.02", "--out", "a"]) == 0
    assert train.main(["--resume", "a", "--recipe", "bhq5"]) == 1
    assert "--recipe bhq5: the run in a has psq4" in capsys.readouterr().err
    assert train.main(["--resume", "a", "--recipe", "psq4"]) == 0        # the same: no objection
    config = json.loads(Path("a/config.json").read_text())
    assert (config["recipe"], config["lr"], config["recipe_fields"]["grad_x"]) == (
        "psq4", 0.02, "psq4")


@pytest.mark.usefixtures("small")
def test_a_run_of_a_recipe_that_means_something_else_today_is_not_resumed(capsys):
    assert train.main(["--epochs", "1", "--out", "a"]) == 0
    arrays, meta = checkpoint.load(Path("a/last.safetensors"))
    for field, value, status in (("alpha", None, 0), ("grad_w", "ptq7", 1)):
        recipe = {**meta["config"]["recipe_fields"], field: value}
        older = {key: value for key, value in recipe.items() if value is not None}
        checkpoint.save(Path("a/last.safetensors"), arrays,
                        {**meta, "config": {**meta["config"], "recipe_fields": older}})
        assert train.main(["--resume", "a"]) == status    # a field that is newer is no objection
    assert "'ptq7'" in (said := capsys.readouterr().err)
    assert "resume it with the version that began it" in said


@pytest.mark.usefixtures("small")
def test_a_folder_that_holds_a_run_is_not_overwritten(capsys):
    assert train.main(["--epochs", "1", "--out", "a"]) == 0
    before = Path("a/last.safetensors").read_bytes()
    assert train.main(["--epochs", "1", "--out", "a"]) == 1
    assert "a holds a run already. Continue it with --resume a" in capsys.readouterr().err
    assert Path("a/last.safetensors").read_bytes() == before
    assert train.main(["--epochs", "1"]) == 0
    assert train.main(["--epochs", "1"]) == 0             # without --out a free name is found
    assert sorted(p.name for p in Path("runs").iterdir()) == [
        "digits-resnet8-bhq5-seed0", "digits-resnet8-bhq5-seed0-2"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--recipe", "bhq9"], "bhq with bits 9: expected 2 to 8 bits"),
    (["--recipe", "nothing4"], "no quantizer is named 'nothing'"),
    (["--epochs", "0"], "--epochs 0: expected at least 1"),
    (["--batch-size", "4000"], "batch_size 4000 is more than the 128 images"),
    (["--lr", "-1"], "--lr -1.0"),
    (["--lr", "nan"], "--lr nan"),
    (["--lr", "inf"], "--lr inf"),
    (["--momentum", "1"], "momentum 1.0"),
    (["--label-smoothing", "1"], "smoothing in"),
    (["--threads", "0"], "--threads 0: expected at least 1"),
    (["--threads", "100000"], "100000 threads: expected 1 to 256"),
    (["--seed", "-1"], "--seed -1: expected at least 0"),
    (["--resume", "nowhere"], "there is no such checkpoint"),
    (["--lr", "1e30", "--epochs", "1"], "last.safetensors is the last good checkpoint"),
])
@pytest.mark.usefixtures("small")
def test_a_setting_that_cannot_work_is_one_clear_line(capsys, arguments, message):
    with np.errstate(all="ignore"):
        assert train.main(arguments) == (train.DIVERGED if "1e30" in arguments else 1)
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert error[0].startswith("error: ")
    assert message in error[0]


def test_the_paper_setting_is_the_preset_of_cifar():
    flags = train.settings(["--dataset", "cifar10", "--model", "resnet56", "--recipe", "bhq5"])
    assert (flags.epochs, flags.batch_size, flags.momentum, flags.weight_decay) == (
        200, 128, 0.9, 1e-4)
    assert train.PRESETS["cifar10"]["padding"] == 4
    assert train.PRESETS["cifar10"]["flip"] is True
    schedule = optim.SCHEDULES[flags.schedule](flags.lr, flags.epochs, flags.warmup)
    epochs = np.arange(200)
    np.testing.assert_allclose([schedule(e) for e in epochs],
                               0.05 * (1 + np.cos(np.pi * epochs / 200)), rtol=1e-12)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("name", "padding", "flip"), [("digits", 1, False), ("cifar10", 4, True),
                                                       ("cifar100", 4, True)])
def test_the_presets_augmentation_reaches_the_training_loader_alone(monkeypatch, name, padding,
                                                                    flip):
    made, original = [], train.Loader
    monkeypatch.setattr(train, "Loader", lambda *a, **k: made.append(original(*a, **k)) or made[-1])
    assert train.main(["--dataset", name, "--model", "resnet8", "--epochs", "1"]) == 0
    assert [(m.train, m.padding, m.flip) for m in made] == [
        (True, padding, flip), (False, 0, False)]


@pytest.mark.usefixtures("small")
def test_a_batch_of_one_is_refused_on_the_command_line(capsys):
    assert train.main(["--batch-size", "1"]) == 1
    assert "--batch-size 1: expected at least 2" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_resume_refuses_every_other_setting(capsys):
    assert train.main(["--epochs", "1", "--out", "a"]) == 0
    for flag, value in {"lr": "0.05", "epochs": "3", "batch-size": "32", "seed": "1",
                        "momentum": "0.5", "out": "b"}.items():
        assert train.main(["--resume", "a", f"--{flag}", value]) == 1
        assert f"--{flag} {value}: the run in a has" in capsys.readouterr().err
    assert train.main(["--resume", "a", "--out", "a/"]) == 0


@pytest.mark.slow
def test_the_digits_are_learnt_with_five_bit_gradients(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--epochs", "8", "--recipe", "bhq5"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "test accuracy" in line)
    assert float(line.split()[2].rstrip("%,")) > 95


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_saves_and_resumes(tmp_path):
    command = [sys.executable, "train.py", "--epochs", "3", "--out", str(tmp_path / "a")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("epoch   1"):
                break
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(60) == 130
    assert f"go on with: python train.py --resume {tmp_path / 'a'}" in rest
    again = [sys.executable, "train.py", "--resume", str(tmp_path / "a")]
    done = subprocess.run(again, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "epoch   3/3" in done.stdout
