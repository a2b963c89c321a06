"""The program: one training step, one epoch, one evaluation, one run. Read `train_step`, then models/resnet_cifar.py.

It knows neither data sets nor flags; train.py makes both.
"""
import json
import math
import signal
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from minifqt import checkpoint
from minifqt.backend import array_module, to_cpu
from minifqt.losses import cross_entropy


def train_step(net, optimizer, x, labels, lr, step, label_smoothing=0.0):     # x (N, H, W, C), labels (N,)
    net.streams.step = step                               # all noise is a function of it
    logits = net.forward(x)                               # (N, classes)
    loss, dlogits = cross_entropy(logits, labels, label_smoothing)
    net.backward(dlogits)                                 # assigns every Param.grad
    optimizer.step(net.params(), lr)
    return loss


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint, so that a resumed run goes on in the middle of an epoch."""

    epoch: int = 0                                        # the epoch under way
    position: int = 0                                     # its steps that are done
    step: int = 0                                         # all steps that are done
    best_acc: float = -1.0
    loss_sum: float = 0.0                                 # over the images of this epoch so far
    correct: int = 0
    images: int = 0
    seconds: float = 0.0                                  # of this epoch so far


class DivergedError(RuntimeError):
    """The loss is not finite; the message names the layer that first was not."""


def train_epoch(net, optimizer, loader, lr, progress, label_smoothing=0.0, stop=lambda: False, save=None):
    """The rest of epoch `progress.epoch`; updates progress.  True when the epoch is complete, False when `stop()` asked.

    save  called after each step that is not the last, for checkpoints in the middle of long epochs
    """
    watched = Watched(net.train())
    device = net.streams.device
    batches = loader.epoch(progress.epoch, start=progress.position)
    bar = tqdm(batches, f"epoch {progress.epoch + 1}", len(loader), initial=progress.position, unit="step",
               leave=False, disable=None, smoothing=0.05)
    start, before = time.perf_counter(), progress.seconds
    try:
        for x, labels in bar:
            x, labels = device.asarray(x), device.asarray(labels)
            loss = to_cpu(train_step(watched, optimizer, x, labels, lr, progress.step, label_smoothing))   # sync
            net.streams.raise_pending()
            if not math.isfinite(loss):
                raise DivergedError(f"the loss is {loss} at step {progress.step}, epoch {progress.epoch + 1}; first "
                                    f"not finite: {first_nonfinite(net, x)}.")
            progress.step, progress.position = progress.step + 1, progress.position + 1
            progress.loss_sum += float(loss) * len(x)
            progress.correct += int((watched.logits.argmax(axis=1) == labels).sum())
            progress.images += len(x)
            progress.seconds = before + time.perf_counter() - start
            bar.set_postfix(loss=f"{progress.loss_sum / progress.images:.3f}",
                            acc=f"{progress.correct / progress.images:.3f}")
            if progress.position < len(loader):
                if stop():
                    return False
                if save:
                    save()
    finally:
        bar.close()
        batches.close()
    return True


def evaluate(net, loader, label_smoothing=0.0):
    """Mean loss and accuracy per image over a loader of (x, labels) batches, in evaluation mode; training mode afterwards."""
    device, total, correct, images = net.streams.device, 0.0, 0, 0
    net.eval()
    try:
        for x, labels in loader.epoch(0):
            x, labels = device.asarray(x), device.asarray(labels)
            logits = net.forward(x)
            loss, _ = cross_entropy(logits, labels, label_smoothing)
            total += float(to_cpu(loss)) * len(x)
            correct += int((logits.argmax(axis=1) == labels).sum())
            images += len(x)
    finally:
        net.train()
    return total / images, correct / images


class Watched:
    """A net whose last logits can be read: train_step returns the loss alone."""

    def __init__(self, net):
        self._net, self.logits = net, None

    def forward(self, x):
        self.logits = self._net.forward(x)
        return self.logits

    def __getattr__(self, name):
        return getattr(self._net, name)


def first_nonfinite(net, x) -> str:
    """Name of the first parameter or, running forward once more, the first layer whose numbers are not finite."""
    def bad(array):
        return not bool(array_module(array).isfinite(array).all())

    for name, p in net.params().items():
        if bad(p.data):
            return f"the parameter {name}"
    found = []
    for name, layer in net.walk():
        if not list(layer.children()):
            def watched(x, name=name, inner=layer.forward):
                y = inner(x)
                if bad(y):
                    found.append(f"the output of {name}")
                return y

            layer.forward = watched
    try:
        net.forward(x)
    except ValueError as error:                           # a quantizer met it first
        found.append(str(error))
    finally:
        for _, layer in net.walk():
            vars(layer).pop("forward", None)
    return found[0] if found else "the loss itself, from finite logits"


# ---- a run: folder, metrics, checkpoints, interruption --------------------------------------------------------------


class Run:
    """A run's folder: config.json, metrics.jsonl, last.safetensors, best.safetensors; all written atomically.

    config  everything that is needed to repeat the run
    """

    def __init__(self, folder, net, optimizer, config, save_minutes=10.0):
        self.folder, self.net, self.optimizer, self.config = Path(folder), net, optimizer, config
        self.progress, self.save_seconds, self._saved_at = Progress(), 60 * save_minutes, time.monotonic()

    def start(self):
        """Make the folder and write config.json.  ValueError where it holds a run already."""
        if (self.folder / "last.safetensors").exists():
            raise ValueError(f"{self.folder} holds a run already. Continue it with --resume {self.folder}, or choose "
                             "another --out.")
        self.folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_atomically(self.folder / "config.json",
                                    (json.dumps(self.config, indent=2) + "\n").encode())
        checkpoint.write_atomically(self.folder / "metrics.jsonl", b"")

    def resume(self):
        """Take over weights, momentum, statistics, ranges and progress of last.safetensors; drop later metrics."""
        arrays, meta = checkpoint.load(self.folder / "last.safetensors")
        parts = {"net": {}, "velocity": {}}
        for name, array in arrays.items():
            part, _, key = name.partition("/")
            parts[part][key] = array
        self.net.load_state(parts["net"])
        self.optimizer.velocity = {name: self.net.streams.device.asarray(v) for name, v in parts["velocity"].items()}
        self.progress = Progress(**meta["progress"])
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["epoch"] <= self.progress.epoch]
        checkpoint.write_atomically(path, "".join(kept).encode())

    def save(self, name="last"):
        """Write NAME.safetensors: everything that a resumed run needs."""
        arrays = {f"net/{key}": to_cpu(v) for key, v in self.net.state().items()}
        arrays |= {f"velocity/{key}": to_cpu(v) for key, v in self.optimizer.velocity.items()}
        checkpoint.save(self.folder / f"{name}.safetensors", arrays,
                        {"progress": asdict(self.progress), "config": self.config})
        self._saved_at = time.monotonic()

    def train(self, train_loader, test_loader, schedule, epochs, label_smoothing=0.0, say=lambda line: None):
        """All epochs from where progress stands.  Returns the last metrics, or None when interrupted (and saved)."""
        metrics, progress = None, self.progress
        if not (self.folder / "last.safetensors").exists():
            self.save()
        with interruptible() as stop:
            while progress.epoch < epochs:
                lr = schedule(progress.epoch)
                done = train_epoch(self.net, self.optimizer, train_loader, lr, progress, label_smoothing, stop,
                                   self._save_sometimes)
                if not done:
                    self.save()
                    return None
                metrics = self._end_of_epoch(test_loader, lr, label_smoothing)
                say(f"epoch {metrics['epoch']:3d}/{epochs}  loss {metrics['train_loss']:.4f}  "
                    f"train {metrics['train_acc']:.2%}  test {metrics['test_acc']:.2%}  {metrics['seconds']:.1f} s")
                if stop() and progress.epoch < epochs:
                    return None
        return metrics or self._last_metrics()

    def _end_of_epoch(self, test_loader, lr, label_smoothing):
        p = self.progress
        test_loss, test_acc = evaluate(self.net, test_loader, label_smoothing)
        metrics = {"epoch": p.epoch + 1, "step": p.step, "train_loss": p.loss_sum / p.images,
                   "train_acc": p.correct / p.images, "test_loss": test_loss, "test_acc": test_acc, "lr": lr,
                   "seconds": round(p.seconds, 3), "images_per_second": round(p.images / max(p.seconds, 1e-9), 1)}
        best = test_acc > p.best_acc
        self.progress.__init__(epoch=p.epoch + 1, step=p.step, best_acc=max(test_acc, p.best_acc))
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        if best:
            self.save("best")
        self.save()
        return metrics

    def _save_sometimes(self):
        if time.monotonic() - self._saved_at > self.save_seconds:
            self.save()

    def _last_metrics(self):
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1]) if lines else None


@contextmanager
def interruptible():
    """Inside, Ctrl-C and SIGTERM only make the yielded function return True: the step under way is finished first."""
    asked = []

    def ask(number, frame):                               # noqa: ARG001 - a signal handler's signature
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
