"""Plants each error of mutants.txt in a copy of the project and sees the named test turn red.

`python tests/mutants.py [word]` runs those whose block contains the word. A mutant that survives
twice, or whose text is not found exactly once, is an error, and so is a test that is red without
it. With `--green`, when all tests have just passed, that is looked at for one of them.
"""
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from shutil import copytree, ignore_patterns
from tempfile import TemporaryDirectory
from time import monotonic

ROOT = Path(__file__).parents[1]
WORKERS = 2
FORKS = get_context("forkserver")                         # each test in a fresh process, which need
FORKS.set_forkserver_preload(["hypothesis", "numba", "pytest"])             # not import these


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


def _run(folder: Path, tests: list[str], output: Path, status: Path) -> None:
    """What `python -m pytest` does, in a forked process; its status in a file of its own."""
    sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.chdir(folder)
    sys.path[0] = str(folder)
    import pytest

    known = "ignore::pytest.PytestAssertRewriteWarning"   # hypothesis is there before pytest looks
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-W", known, *tests])
    status.write_text(str(int(code)))


def run(folder: Path, tests: list[str], seconds: int) -> tuple[int, str]:
    """Pytest's exit status, −1 where there was none, and what it printed.

    A process's own status may get lost where several threads start processes.
    """
    output, status = folder / "output.txt", folder / "status.txt"
    for path in (output, status):
        path.unlink(missing_ok=True)                      # a copy's are links to the healthy one's
    process = FORKS.Process(target=_run, args=(folder, tests, output, status))
    process.start()
    process.join(seconds)
    process.kill()                                        # nothing where it has ended
    process.join()
    code = int(status.read_text()) if status.exists() else -1
    return code, output.read_text(errors="replace") if output.exists() else ""


def outcome(mutant: Mutant, healthy: Path) -> tuple[bool, str, float]:
    """Whether the test turned red, what is to be said if not at once, and the seconds it took.

    The healthy copy's machine code comes along: what does not depend on the file is compiled no
    more, and what does is told apart by its stamp (choice.source_stamp).
    """
    begun, told = monotonic(), ""
    with TemporaryDirectory() as scratch:
        copytree(healthy, scratch, copy_function=os.link, dirs_exist_ok=True)
        path = Path(scratch) / mutant.file
        try:
            text = apply(mutant, path.read_text())
        except ValueError as error:
            return False, str(error), monotonic() - begun
        path.unlink()                                     # a link: the healthy copy keeps its own
        path.write_text(text)
        for _ in range(2):                                # what threads do is in part luck
            status, output = run(Path(scratch), [mutant.test], 300)
            if status == 1:
                break
            told += f"survived (pytest exit {status}): {mutant}\n{output[-500:]}\n"
    return status == 1, told, monotonic() - begun


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
        tests = sorted({m.test for m in mutants})
        status, output = run(healthy, tests[:1] if "--green" in sys.argv else tests, 1800)
        if status:
            print(f"without any mutant these tests are not all green:\n{output[-2000:]}")
            return 1
        print(f"{monotonic() - begun:6.1f} s  without any mutant")
        survived, told = 0, []
        outcomes = pool.map(lambda mutant: outcome(mutant, healthy), mutants)
        for mutant, (caught, words, seconds) in zip(mutants, outcomes, strict=True):
            print(f"{seconds:6.1f} s  {'ok      ' if caught else 'SURVIVED'} {mutant.file}: "
                  f"{mutant.old.strip()}", flush=True)
            survived += not caught
            told += [words] if words else []
    print(*told, sep="\n")                                # at the end, which no log cuts off
    print(f"{len(mutants) - survived} mutants caught, {survived} survived, "
          f"in {monotonic() - begun:.0f} s")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
