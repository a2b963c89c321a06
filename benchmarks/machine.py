"""The facts that make a number worth keeping: machine, date, commit, command, versions.

Every benchmark writes them beside its results. Nothing is measured here. Next: step.py.
"""
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FEATURES = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
            "asimddp", "i8mm", "bf16")                    # dot products of small numbers
KEYS = ("schema", "kind", "machine", "date", "commit", "dirty", "command", "versions", "seed",
        "threads")                                        # of every result


def facts(kind: str, seed: int, threads: int) -> dict:
    """All KEYS of a result; taken at the start of a run, before the run itself loads the machine.

    kind   what was measured: "step", "accuracy", "variance", "roofline", "scaling"
    dirty  whether anything but results and documents differed from the commit; None outside git
    """
    return {"schema": 1, "kind": kind, "machine": machine(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"), **commit(),
            "command": command(), "versions": versions(), "seed": seed, "threads": threads}


def machine() -> dict:
    """The processor, the cores that this process may use, and how busy they are already."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    flags = set(flags[1].split()) if flags else set()
    return {"cpu": model[1].strip() if model else platform.processor() or platform.machine(),
            "cores": cores, "features": [name for name in FEATURES if name in flags],
            "load": load}


def commit() -> dict:
    """{"commit": hash, "dirty": bool}, both None where this is no git repository."""
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True,
                              check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results",
                      ":(exclude)docs")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def command() -> str:
    """What was typed, from the repository's root."""
    script = Path(sys.argv[0]).resolve()
    script = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return shlex.join(["python", str(script), *sys.argv[1:]])


def versions() -> dict:
    """Of Python and of what this run has imported."""
    loaded = {name: str(sys.modules[name].__version__) for name in ("numpy", "numba", "torch")
              if name in sys.modules}
    return {"python": platform.python_version(), **loaded}


def describe(result: dict) -> str:
    """One line for the reader of a table."""
    where, dirty = result["machine"], " (changed)" if result["dirty"] else ""
    commit = result["commit"][:7] + dirty if result["commit"] else "none"
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (f"{where['cpu']}, {where['cores']} cores ({' '.join(where['features'])}), "
            f"{result['threads']} threads; {versions}; commit {commit}; {result['date']}")
