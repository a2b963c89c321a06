"""A run on disk: its folder, metrics, checkpoints, interruption. training.py knows none of it."""
import json
import signal
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from minifqt import checkpoint
from minifqt.backend import to_cpu
from minifqt.rng import NonFiniteError
from minifqt.training import DivergedError, Progress, evaluate, train_epoch


class Run:
    """config.json, metrics.jsonl, last.safetensors and best.safetensors in one folder.

    config        everything that is needed to repeat the run; stored in each checkpoint too
    save_minutes  a checkpoint inside an epoch where the last one is older
    """

    def __init__(self, folder: Path, net, optimizer, config: dict, save_minutes: float = 10.0):
        self.folder, self.net, self.optimizer, self.config = Path(folder), net, optimizer, config
        self.last, self.metrics = self.folder / "last.safetensors", self.folder / "metrics.jsonl"
        self.progress, self.save_seconds = Progress(), 60 * save_minutes
        self._saved_at = time.monotonic()

    def start(self) -> None:
        """Make the folder, write config.json and step 0.  ValueError where it holds a run."""
        if self.last.exists():
            raise ValueError(f"{self.folder} holds a run already. Continue it with --resume "
                             f"{self.folder}, or choose another --out.")
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.config, indent=2) + "\n"
        checkpoint.write_atomically(self.folder / "config.json", text.encode())
        checkpoint.write_atomically(self.metrics, b"")
        self.save()

    def resume(self) -> None:
        """Take over the state of last.safetensors; metrics of later epochs are dropped."""
        for stale in self.folder.glob("*.tmp"):           # of a save that was killed
            stale.unlink()
        arrays, meta = checkpoint.load(self.last)
        restore(self.net, self.optimizer, arrays)
        self.progress = Progress(**meta["progress"])
        kept = [line for line in checkpoint.json_lines(self.metrics)
                if line["epoch"] <= self.progress.epoch]
        checkpoint.write_json_lines(self.metrics, kept)

    def save(self, name: str = "last") -> None:
        """Write NAME.safetensors: all that a resumed run needs."""
        arrays = {f"net/{key}": to_cpu(v) for key, v in self.net.state().items()}
        arrays |= {f"velocity/{key}": to_cpu(v) for key, v in self.optimizer.velocity.items()}
        checkpoint.save(self.folder / f"{name}.safetensors", arrays,
                        {"progress": asdict(self.progress), "config": self.config})
        self._saved_at = time.monotonic()

    def train(self, train_loader, test_loader, schedule, epochs: int, label_smoothing=0.0,
              say=print) -> dict | None:
        """The epochs that are left.  The last metrics, or None when interrupted (and saved)."""
        with interruptible() as asked:
            while self.progress.epoch < epochs:
                complete = self._epoch(train_loader, schedule, label_smoothing, asked)
                if complete:
                    say(self._end_of_epoch(test_loader, schedule, label_smoothing, epochs))
                if asked() and self.progress.epoch < epochs:
                    self.save()
                    return None
        lines = self.metrics.read_text().splitlines()
        if not lines:
            raise ValueError(f"{self.metrics} holds no result, though {self.last} has finished its "
                             f"{epochs} epochs: nothing is left to train.")
        return json.loads(lines[-1])

    def _epoch(self, loader, schedule, label_smoothing, asked):
        start, before = time.perf_counter(), self.progress.seconds

        def after_step():
            self.progress.seconds = before + time.perf_counter() - start
            if time.monotonic() - self._saved_at > self.save_seconds:
                self.save()
            return asked()

        lr = schedule(self.progress.epoch)
        complete = train_epoch(self.net, self.optimizer, loader, lr, self.progress,
                               label_smoothing, after_step)
        self.progress.seconds = before + time.perf_counter() - start
        return complete

    def _end_of_epoch(self, test_loader, schedule, label_smoothing, epochs):
        p, before = self.progress, time.perf_counter()
        try:
            test_loss, test_acc = evaluate(self.net, test_loader, label_smoothing)
        except NonFiniteError as error:
            raise DivergedError(f"evaluation after epoch {p.epoch + 1}: {error}") from None
        metrics = {"epoch": p.epoch + 1, "step": p.step, "train_loss": p.loss_sum / p.images,
                   "train_acc": p.correct / p.images, "test_loss": test_loss,
                   "test_acc": test_acc, "lr": schedule(p.epoch), "seconds": round(p.seconds, 3),
                   "images_per_second": round(p.images / max(p.seconds, 1e-9), 1),
                   "test_seconds": round(time.perf_counter() - before, 3)}
        best = test_acc > p.best_acc
        self.progress = Progress(p.epoch + 1, 0, p.step, max(test_acc, p.best_acc))
        with self.metrics.open("a") as file:              # before the checkpoint: resume drops
            file.write(json.dumps(metrics) + "\n")        # what the checkpoint does not know
        if best:
            self.save("best")
        self.save()
        return (f"epoch {p.epoch + 1:3d}/{epochs}  loss {metrics['train_loss']:.4f}  train "
                f"{metrics['train_acc']:.2%}  test {test_acc:.2%}  {p.seconds:.1f} s")


def restore(net, optimizer, arrays: dict) -> None:
    """Take over what a checkpoint holds of a network and its optimizer.  ValueError: see Layer."""
    net.load_state(_part(arrays, "net/"))
    optimizer.velocity = {name: net.streams.device.asarray(v)
                          for name, v in _part(arrays, "velocity/").items()}


def _part(arrays, prefix):
    return {name.removeprefix(prefix): array for name, array in arrays.items()
            if name.startswith(prefix)}


@contextmanager
def interruptible():
    """Inside, Ctrl-C and SIGTERM make the yielded function return true: the step is finished.

    A second Ctrl-C interrupts at once. Outside the main thread signals are left as they are.
    """
    asked = []

    def ask(number, frame):  # noqa: ARG001 - a signal handler's signature
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
    except ValueError:                                    # not the main thread
        pass
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
