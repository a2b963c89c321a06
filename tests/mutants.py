"""Plants each error of mutants.txt in a copy of the project and sees the named test turn red.

`python tests/mutants.py [word]` runs those whose block contains the word. A mutant that survives,
or whose text is not found exactly once, is an error, and so is a test that is red without it. With
`--green` that is not looked at: all tests have just passed.
"""
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree, ignore_patterns
from tempfile import TemporaryDirectory
from time import monotonic

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


def pytest(folder: Path, tests: list[str], seconds: int) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds)


def outcome(mutant: Mutant, healthy: Path) -> tuple[str, float]:
    """Empty when the test turned red, else what went wrong; and the seconds that it took.

    The healthy copy's machine code comes along: what does not depend on the file is compiled no
    more, and what does is told apart by its stamp (choice.source_stamp).
    """
    begun = monotonic()
    with TemporaryDirectory() as scratch:
        path = Path(copytree(healthy, scratch, dirs_exist_ok=True)) / mutant.file
        try:
            path.write_text(apply(mutant, path.read_text()))
            done = pytest(Path(scratch), [mutant.test], 300)
        except (ValueError, subprocess.TimeoutExpired) as error:
            return str(error), monotonic() - begun
    caught = done.returncode == 1
    return ("" if caught else f"SURVIVED (pytest exit {done.returncode}): {mutant}\n"
            f"{done.stdout[-500:]}"), monotonic() - begun


def main() -> int:
    """Exit status 1 when a mutant survives."""
    mutants = parse((ROOT / "tests/mutants.txt").read_text())
    words = [word for word in sys.argv[1:] if word != "--green"]
    for word in words:
        mutants = [m for m in mutants if word in f"{m.file} {m.old} {m.new} {m.test}"]
    if not mutants:
        print("no mutant's block contains that word")
        return 1
    begun = monotonic()
    with TemporaryDirectory() as scratch, ThreadPoolExecutor(WORKERS) as pool:
        healthy = copytree(ROOT, Path(scratch) / "healthy", ignore=ignore_patterns(".*", "runs"))
        if "--green" not in sys.argv:
            done = pytest(healthy, sorted({m.test for m in mutants}), 1800)  # compiles
            if done.returncode:
                print(f"without any mutant these tests are not all green:\n{done.stdout[-2000:]}")
                return 1
            print(f"{monotonic() - begun:6.1f} s  without any mutant")
        survived = 0
        outcomes = pool.map(lambda mutant: outcome(mutant, healthy), mutants)
        for mutant, (why, seconds) in zip(mutants, outcomes, strict=True):
            print(f"{seconds:6.1f} s  {'ok      ' if not why else 'SURVIVED'} {mutant.file}: "
                  f"{mutant.old.strip()}", flush=True)
            survived += bool(why)
            if why:
                print(why)
    print(f"{len(mutants) - survived} mutants caught, {survived} survived, "
          f"in {monotonic() - begun:.0f} s")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
