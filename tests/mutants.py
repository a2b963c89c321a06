"""Plants each error of mutants.txt in a copy of the project and sees the named test turn red.

`python tests/mutants.py [word]` runs those whose block contains the word. A mutant that survives,
or whose text is not found exactly once, is an error, and so is a test that is red without it.
"""
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from shutil import copytree, ignore_patterns

ROOT = Path(__file__).parents[1]
WORKERS = 2


@dataclass
class Mutant:
    """One edit, `old` to `new` in `file`, and the test that must catch it."""

    file: str
    old: str
    new: str
    test: str


def parse(text: str) -> list[Mutant]:
    """Blocks of four lines: file, `- old`, `+ new`, test id; lines starting with # are comments."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    blocks = [block.strip("\n").split("\n") for block in "\n".join(lines).split("\n\n")
              if block.strip()]
    for block in blocks:
        if len(block) != 4 or block[1][:2] != "- " or block[2][:2] not in ("+ ", "+"):
            raise ValueError(f"expected file, '- old', '+ new', test id; met {block}")
    return [Mutant(block[0], block[1][2:], block[2][2:], block[3]) for block in blocks]


def apply(mutant: Mutant, text: str) -> str:
    """The file's text with the error in it.  ValueError unless `old` stands there exactly once."""
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file}: {mutant.old!r} stands there {text.count(mutant.old)} "
                         "times; expected once.")
    return text.replace(mutant.old, mutant.new)


def pytest(folder: Path, tests: list[str], seconds: int = 300,
           **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds,
                          env=os.environ | environment)


def outcome(mutant: Mutant, folder: Path) -> str:
    """Empty when the test turned red, else what went wrong."""
    path = folder / mutant.file
    before = path.read_text()
    try:
        path.write_text(apply(mutant, before))
        with tempfile.TemporaryDirectory() as cache:
            # a mutant's machine code in a cache of its own: the copy's stays good
            fresh = {"NUMBA_CACHE_DIR": cache} if "/cpu/" in mutant.file else {}
            done = pytest(folder, [mutant.test], **fresh)
    except (ValueError, subprocess.TimeoutExpired) as error:
        return str(error)
    finally:
        path.write_text(before)
    if done.returncode == 1:
        return ""
    return f"SURVIVED (pytest exit {done.returncode}): {mutant}\n{done.stdout[-500:]}"


def main() -> int:
    """Exit status 1 when a mutant survives."""
    mutants = parse((ROOT / "tests/mutants.txt").read_text())
    if len(sys.argv) > 1:
        mutants = [m for m in mutants if sys.argv[1] in f"{m.file} {m.old} {m.new} {m.test}"]
    if not mutants:
        print("no mutant's block contains that word")
        return 1
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(WORKERS) as pool:
        copies = SimpleQueue()
        for i in range(WORKERS):
            skipped = ignore_patterns(".*", "runs", "__pycache__")
            copies.put(copytree(ROOT, Path(scratch) / str(i), ignore=skipped))
        healthy = pytest(Path(scratch) / "0", sorted({m.test for m in mutants}), 1800)   # compiles
        if healthy.returncode:
            print(f"without any mutant these tests are not all green:\n{healthy.stdout[-2000:]}")
            return 1

        def run(mutant):
            folder = copies.get()
            try:
                return outcome(mutant, folder)
            finally:
                copies.put(folder)

        survived = 0
        for mutant, why in zip(mutants, pool.map(run, mutants), strict=True):
            print(f"{'ok      ' if not why else 'SURVIVED'} {mutant.file}: {mutant.old.strip()}")
            survived += bool(why)
            if why:
                print(why)
    print(f"{len(mutants) - survived} mutants caught, {survived} survived")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
