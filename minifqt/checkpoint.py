"""Checkpoints: safetensors files with a digest, written atomically. No pickle."""
import hashlib
import json
import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

_ADVICE = ("Resume from another checkpoint of the run (copy best.safetensors over it), or start "
           "again.")


def save(path: Path, arrays: dict[str, np.ndarray], meta: dict) -> None:
    """Write arrays and meta (anything that JSON holds).

    Whoever reads path meanwhile, or after a crash, sees the old file or the new one.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    header = {"meta": json.dumps(meta), "sha256": digest(arrays, json.dumps(meta))}
    write_atomically(Path(path), to_bytes(arrays, metadata=header))


def load(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """(arrays, meta).  FileNotFoundError; ValueError where the file is truncated or altered."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such checkpoint. Give the folder of a run, "
                                "as in runs/NAME.")
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no checkpoint ({error}). {_ADVICE}") from None
    if header.get("sha256") != digest(arrays, header.get("meta", "")):
        raise ValueError(f"{path} is altered: its contents do not match its digest. {_ADVICE}")
    return arrays, json.loads(header["meta"])


def json_lines(path: Path) -> list[dict]:
    """The records of a run, each a JSON object with its step; half a line, of a kill, is left out.
    """
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [each for each in found if isinstance(each, dict) and "step" in each]


def write_json_lines(path: Path, records: list[dict]) -> None:
    """The same file anew, with these records."""
    write_atomically(path, "".join(f"{json.dumps(each)}\n" for each in records).encode())


def digest(arrays: dict[str, np.ndarray], meta: str) -> str:
    """SHA-256 over meta and over names, dtypes, shapes and bytes."""
    total = hashlib.sha256(meta.encode())
    for name in sorted(arrays):
        array = arrays[name]
        total.update(f"{name} {array.dtype} {array.shape}\n".encode())
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write under a temporary name, fsync, rename: a crash at any moment leaves the old file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)            # the new name must survive a crash too
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
