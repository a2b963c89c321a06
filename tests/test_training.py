"""Epochs, metrics, signals and dtypes: what surrounds the training step."""
import inspect
import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import digits, job, train_all

import minifqt
import models
from data.loader import Loader
from minifqt import checkpoint, layers, optim, quantizers, training
from minifqt.qtensor import QTensor, as_floats, common_dtype
from minifqt.run import interruptible
from minifqt.training import Progress


class Known:
    """A network whose logits are given, with no parameters."""

    training, streams = True, SimpleNamespace(step=0, device=np, raise_pending=lambda: None)

    def __init__(self, logits):
        self.logits, self.first = logits, 0

    def train(self, mode=True):
        self.training = mode
        return self

    def eval(self):
        return self.train(False)

    def walk(self):
        return [("", self)]

    def forward(self, x):
        return self.logits[x[:, 0].astype(int)]

    def backward(self, dy):
        return dy

    def params(self):
        return {}


class Batches:
    """Batches of unequal sizes; x is the index of the image."""

    def __init__(self, labels, cuts):
        self.labels, self.cuts = labels, cuts

    def __len__(self):
        return len(self.cuts) - 1

    def epoch(self, e, start=0):
        for a, b in zip(self.cuts[start:-1], self.cuts[start + 1:], strict=True):
            yield np.arange(a, b)[:, None].astype("float32"), self.labels[a:b]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_metrics_are_means_over_images_also_where_batches_differ_in_size(smoothing):
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((12, 5)), rng.integers(0, 5, 12)
    loss, _ = minifqt.cross_entropy(logits, labels, smoothing)
    right = int((logits.argmax(axis=1) == labels).sum())
    assert 0 < right < 12
    net, batches, p = Known(logits), Batches(labels, [0, 5, 10, 12]), Progress()
    assert training.train_epoch(net, minifqt.SGD(), batches, 0.1, p, smoothing)
    assert (p.step, p.position, p.images, p.correct) == (3, 3, 12, right)
    np.testing.assert_allclose(p.loss_sum / 12, loss, rtol=1e-12)      # float64 sums
    test_loss, accuracy = training.evaluate(net, batches, smoothing)
    assert accuracy == right / 12
    np.testing.assert_allclose(test_loss, loss, rtol=1e-12)


def test_an_epoch_trains_in_training_mode_whatever_came_before():
    net = models.build("resnet8", 10, "fp32", channels=1)
    train_set, _ = digits(32)
    before = net.state()["bn.running_mean"].copy()
    training.train_epoch(net.eval(), minifqt.SGD(), Loader(train_set, 32, net.streams, train=True),
                         0.1, Progress())
    assert (net.state()["bn.running_mean"] != before).any()


def test_after_step_is_called_after_every_step_but_the_last():
    net, calls = models.build("resnet8", 10, "fp32", channels=1), []
    loader = Loader(digits(96)[0], 32, net.streams, train=True)
    p = Progress()
    assert training.train_epoch(net, minifqt.SGD(), loader, 0.1, p,
                                after_step=lambda: calls.append(p.position))
    assert calls == [1, 2]


def test_an_infinite_loss_stops_the_run(monkeypatch):
    monkeypatch.setattr(training, "cross_entropy", lambda *a: (np.inf, np.zeros((2, 3))))
    with pytest.raises(training.DivergedError, match="the loss is inf"):
        training.checked_step(layers.build(layers.Sequential(layers.Linear(4, 3)), "fp32"),
                              minifqt.SGD(), np.ones((2, 4), "float32"), np.zeros(2, int), 0.1,
                              Progress(), 0.0)


def test_the_metrics_of_an_epoch_and_the_best_checkpoint(tmp_path, monkeypatch):
    accuracies = iter([0.5, 0.75, 0.75, 0.25])
    monkeypatch.setattr("minifqt.run.evaluate", lambda *a: (1.0, next(accuracies)))
    run, (train_loader, test_loader) = job(tmp_path / "a")
    run.start()
    schedule = optim.steps(0.1, 4)
    run.train(train_loader, test_loader, schedule, 4, say=lambda line: None)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["lr"] for line in lines] == [schedule(e) for e in range(4)]
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert all(0 <= line["train_acc"] <= 1 for line in lines)
    assert lines[-1]["train_acc"] > 0.2                    # of 1, after 4 epochs
    assert run.progress.best_acc == 0.75
    _, meta = checkpoint.load(run.folder / "best.safetensors")
    assert meta["progress"]["epoch"] == 2                  # the first of two equals, not the last
    assert meta["progress"]["best_acc"] == 0.75


def test_save_minutes_are_minutes(tmp_path, monkeypatch):
    run, loaders = job(tmp_path / "a", save_minutes=2)
    run.start()
    now, positions, save = [run._saved_at], [], run.save
    monkeypatch.setattr("minifqt.run.time.monotonic", lambda: now[0])

    def saved(name="last"):
        positions.append((name, run.progress.position))
        save(name)

    run.save = saved
    original = training.checked_step

    def slow(*arguments):
        now[0] += 61                                      # seconds a step
        return original(*arguments)

    monkeypatch.setattr(training, "checked_step", slow)
    train_all(run, loaders, epochs=1)
    assert positions == [("last", 2), ("best", 0), ("last", 0)]


def test_the_seconds_of_an_epoch_go_on_after_a_resume(tmp_path):
    run, loaders = job(tmp_path / "a")
    run.start()
    run.progress.seconds = 1000.0                         # as if resumed inside the epoch
    assert train_all(run, loaders, epochs=1)["seconds"] > 1000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_a_second_interrupts_and_afterwards_all_is_as_before(number):
    before = signal.getsignal(number)
    with interruptible() as asked:
        assert not asked()
        os.kill(os.getpid(), number)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_an_interrupt_in_the_last_epochs_last_step_ends_a_complete_run(tmp_path):
    run, (train_loader, test_loader) = job(tmp_path / "a")
    run.start()

    class Ctrl:
        def __len__(self):
            return len(test_loader)

        def epoch(self, e):
            os.kill(os.getpid(), signal.SIGINT)
            return test_loader.epoch(e)

    assert run.train(train_loader, Ctrl(), optim.cosine(0.1, 1), 1,
                     say=lambda line: None)["epoch"] == 1


def test_ranges_move_in_training_also_when_evaluation_uses_the_batchs():
    recipe = minifqt.recipe("bhq5").replace(eval_range="batch")
    layer = layers.Linear(4, 2, recipe=recipe)
    layer.forward(np.arange(8, dtype="float32").reshape(2, 4))
    np.testing.assert_array_equal(layer.state()["act_range"], [0, 7])


def test_evaluation_over_a_running_range_refuses_what_is_not_finite():
    layer = layers.Linear(4, 2, recipe="bhq5")
    x = np.arange(8, dtype="float32").reshape(2, 4)
    layer.forward(x)
    x[1, 2] = np.nan
    with pytest.raises(minifqt.NonFiniteError, match=r"linear\.act: NaN or infinity"):
        layer.eval().forward(x)
    x[1, 2] = np.inf                                      # a clip would hide it
    with pytest.raises(minifqt.NonFiniteError, match=r"linear\.act"):
        layer.forward(x)


def test_the_wider_float_decides_beside_an_identity_operand():
    def t(dtype):
        return QTensor(np.ones((2, 3), dtype), np.ones((1, 1), "f"), np.zeros((1, 1), "f"),
                       name="x")

    assert common_dtype(t("float32"), t("float64")) == "float64"
    assert common_dtype(t("uint8"), t("float64")) == "float64"
    assert common_dtype(t("uint8"), t("float32")) == "float32"
    assert as_floats(t("uint8"), "float32").name == "x"


def test_a_built_network_is_in_training_mode_whatever_its_layers_were():
    net = layers.Sequential(layers.Linear(4, 2)).eval()
    layers.build(net, "bhq5")
    assert net.training
    assert net.layers[0].training
    assert net.layers[0].q.act.training


def test_an_empty_batch_has_no_loss():
    with pytest.raises(ValueError, match="at least one row"):
        minifqt.cross_entropy(np.zeros((0, 3)), np.zeros(0, int))


def test_a_step_asks_the_device_for_what_was_not_finite():
    net = layers.build(layers.Sequential(layers.Linear(4, 3)), "fp32")
    net.streams._pending = {"0.act": np.True_}
    with pytest.raises(training.DivergedError, match=r"0\.act: NaN or infinity entered"):
        training.checked_step(net, minifqt.SGD(), np.ones((2, 4), "float32"), np.zeros(2, int),
                              0.1, Progress(), 0.0)


def test_the_digest_covers_dtypes_and_shapes():
    x = np.zeros((2, 3), "float32")
    others = [x.T, x.view("int32"), x.reshape(6)]
    assert checkpoint.digest({"x": x}, "") not in [checkpoint.digest({"x": o}, "") for o in others]


def test_a_save_syncs_the_file_and_then_its_folder(tmp_path, monkeypatch):
    synced, original = [], checkpoint.os.fsync
    monkeypatch.setattr(checkpoint.os, "fsync", lambda fd: (
        synced.append(checkpoint.os.path.realpath(f"/proc/self/fd/{fd}")), original(fd)))
    checkpoint.write_atomically(tmp_path / "a", b"text")
    assert [p.endswith(".tmp") for p in synced] == [True, False]
    assert synced[1] == str(tmp_path.resolve())


# ---- shapes and dtypes that do not fit -----------------------------------------------------------


@pytest.mark.parametrize("recipe", ["fp32", "bhq5"])
@pytest.mark.parametrize("shape", [(4, 20, 8, 4), (2, 8, 8, 4), (4, 8, 9, 4), (4, 8, 8, 5)])
def test_a_gradient_of_another_shape_than_the_output_raises(recipe, shape):
    layer = layers.Conv2d(3, 4, 3, padding=1, recipe=recipe)
    layer.forward(np.ones((4, 8, 8, 3), "float32"))
    dy = np.random.default_rng(0).standard_normal(shape).astype("float32")
    with pytest.raises(ValueError, match=r"grad: conv2d\.grad_[wx] has shape"):
        layer.backward(dy)


@pytest.mark.parametrize("shape", [(3, 2), (4, 3)])
def test_a_gradient_of_another_shape_than_a_linear_layers_output_raises(shape):
    layer = layers.Linear(5, 2, recipe="bhq5")
    layer.forward(np.ones((4, 5), "float32"))
    dy = np.random.default_rng(0).standard_normal(shape).astype("float32")
    with pytest.raises(ValueError, match=r"grad: linear\.grad_[wx] has shape"):
        layer.backward(dy)


def test_a_gradient_of_another_shape_than_batch_norms_output_raises():
    layer = layers.BatchNorm2d(3)
    layer.forward(np.arange(24, dtype="float32").reshape(2, 2, 2, 3))
    with pytest.raises(ValueError, match="batchnorm2d: gradient of shape"):
        layer.backward(np.ones((1, 2, 2, 3), "float32"))


@pytest.mark.parametrize("recipe", ["fp32", "bhq5"])
def test_the_inputs_dtype_changes_no_dtype_of_the_network(recipe):
    rng, optimizer = np.random.default_rng(0), minifqt.SGD()
    net = models.build("resnet8", 10, recipe)
    x = rng.standard_normal((4, 8, 8, 3))
    minifqt.train_step(net, optimizer, x, np.arange(4), 0.1, 0)          # float64
    minifqt.train_step(net, optimizer, (9 * x).astype("int64"), np.arange(4), 0.1, 1)
    assert {array.dtype.name for array in net.state().values()} == {"float32"}
    assert {v.dtype.name for v in optimizer.velocity.values()} == {"float32"}
    other = models.build("resnet8", 10, recipe)
    minifqt.train_step(other, minifqt.SGD(), x.astype("float32"), np.arange(4), 0.1, 0)
    net = models.build("resnet8", 10, recipe)
    minifqt.train_step(net, minifqt.SGD(), x, np.arange(4), 0.1, 0)
    for name, array in net.state().items():
        np.testing.assert_array_equal(array, other.state()[name], err_msg=name)


def test_a_gradient_in_float64_leaves_the_parameters_float32():
    layer = layers.Linear(3, 2)
    layer.forward(np.ones((4, 3), "float32"))
    layer.backward(np.random.default_rng(0).standard_normal((4, 2)))
    minifqt.SGD().step(layer.params(), 0.1)
    assert {p.data.dtype.name for p in layer.params().values()} == {"float32"}


def test_errors_name_the_layer():
    layer = layers.Conv2d(3, 4, np.int64(5), recipe="bhq5")
    with pytest.raises(ValueError, match=r"conv2d: input of shape \(0, 8, 8, 3\)"):
        layer.forward(np.ones((0, 8, 8, 3), "float32"))
    with pytest.raises(ValueError, match=r"conv2d\.act: a kernel of \(5, 5\) does not fit"):
        layer.forward(np.ones((1, 4, 4, 3), "float32"))


def test_a_network_that_was_not_built_says_so():
    net = layers.Sequential(layers.Linear(4, 2), layers.Linear(2, 3))
    with pytest.raises(RuntimeError, match="Sequential: not built. Call minifqt.layers.build"):
        minifqt.train_step(net, minifqt.SGD(), np.ones((2, 4)), np.zeros(2, int), 0.1, 0)
    layers.build(net, "bhq5")
    assert [layer.q.grad_x.name for layer in net.layers] == ["0.grad_x", "1.grad_x"]


def test_weights_without_ranges_forget_the_ranges_of_before():
    layer = layers.Linear(3, 2, recipe="bhq5")
    state = {name: array for name, array in layer.state().items() if name != "act_range"}
    layer.forward(np.full((2, 3), 100, "float32"))
    layer.load_state(state)
    assert np.isnan(layer.state()["act_range"]).all()
    assert not layer.q.act.calibrated


@pytest.mark.parametrize("bits", [4.0, 4.5, "4", None, 1, 9])
def test_bits_are_whole_numbers_from_2_to_8(bits):
    with pytest.raises(ValueError, match="expected 2 to 8 bits"):
        quantizers.create("ptq", bits=bits)


@pytest.mark.parametrize("name", ["ptq", "ptqz", "sym", "psq", "bhq"])
def test_a_tensor_carries_the_name_of_its_noise(name):
    x = np.random.default_rng(0).standard_normal((5, 7)).astype("float32")
    t = quantizers.create(name, bits=4)(x, minifqt.Streams(0).stream("layer1.conv1.grad_w"))
    assert t.name == "layer1.conv1.grad_w"


def test_labels_may_be_a_list_and_logits_are_a_matrix():
    logits = np.random.default_rng(0).standard_normal((3, 4))
    loss, _ = minifqt.cross_entropy(logits, [0, 1, 3])
    assert loss == minifqt.cross_entropy(logits, np.array([0, 1, 3]))[0]
    with pytest.raises(ValueError, match=r"logits of shape \(4,\): expected \(N, classes\)"):
        minifqt.cross_entropy(logits[0], [0])


def test_the_default_recipe_is_the_papers_five_bits():
    assert inspect.signature(models.build).parameters["recipe"].default == "bhq5"


# ---- runs that lost something --------------------------------------------------------------------


def test_a_finished_run_without_its_metrics_says_so(tmp_path):
    run, loaders = job(tmp_path / "a")
    run.start()
    train_all(run, loaders, epochs=1)
    run.metrics.unlink()
    again, loaders = job(tmp_path / "a")
    again.resume()
    with pytest.raises(ValueError, match="metrics.jsonl holds no result, though"):
        train_all(again, loaders, epochs=1)


def test_a_damaged_line_of_metrics_is_dropped_on_resume(tmp_path):
    run, loaders = job(tmp_path / "a")
    run.start()
    train_all(run, loaders, epochs=2)
    whole = run.metrics.read_text()
    run.metrics.write_text("garbage\n" + whole + "[1]\n")
    again, _ = job(tmp_path / "a")
    again.resume()
    assert run.metrics.read_text() == whole


def test_divergence_in_an_evaluation_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    run, loaders = job(tmp_path / "a")
    run.start()
    before = run.last.read_bytes()

    def diverged(*ignored):
        raise minifqt.NonFiniteError("conv1.act")

    monkeypatch.setattr("minifqt.run.evaluate", diverged)
    with pytest.raises(training.DivergedError, match="evaluation after epoch 1: conv1.act: NaN"):
        train_all(run, loaders, epochs=1)
    assert run.last.read_bytes() == before


def test_an_evaluation_asks_the_device_for_what_was_not_finite():
    net = models.build("resnet8", 10, "fp32", channels=1)
    net.streams._pending = {"conv1.act": np.True_}
    with pytest.raises(minifqt.NonFiniteError, match=r"^conv1\.act"):
        minifqt.evaluate(net, Loader(digits()[1], 16, None, train=False))


def test_evaluation_leaves_each_layer_in_the_mode_that_it_had():
    net = models.build("resnet8", 10, "bhq5", seed=0, channels=1)
    batches = Loader(digits()[1], 64, None, train=False)
    net.eval()
    net.layer1.train()
    before = [layer.training for _, layer in net.walk()]
    minifqt.evaluate(net, batches)
    assert [layer.training for _, layer in net.walk()] == before
    assert {True, False} == set(before)
    assert not net.conv1.q.act.training
