"""Fetches one file over HTTP so that only the right bytes ever bear its name.

Bytes gather in `NAME.part`; a cut connection, a killed process and a second run all continue from
there. Not a general client: one file, one known md5.
"""
import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

ATTEMPTS = 5                                              # connections made for one fetch
TIMEOUT = 30                                              # seconds without a byte
_CHUNK = 1 << 18
_PASSING = (408, 429, 500, 502, 503, 504)                 # HTTP statuses worth another attempt


class _TransferError(Exception):
    """This attempt brought nothing more; another may."""


def fetch(url: str, path: str | os.PathLike, md5: str, progress: bool = True,
          opener: Callable = urllib.request.urlopen, pause: float = 1.0) -> None:
    """Make path the file behind url, whose md5 is known; returns at once if it already is.

    Continues from path.part; at most ATTEMPTS connections, pause · 1, 2, 3 … seconds between them.
    opener  as urllib.request.urlopen(request, timeout=seconds)
    Errors: ConnectionError (running again continues), ValueError for wrong content (deleted).
    """
    path = Path(path)
    if path.exists() and file_md5(path) == md5:
        return
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(ATTEMPTS):
        time.sleep(pause * attempt)
        try:
            _transfer(url, part, md5, progress, opener)
            break
        except _TransferError as error:
            reason = error
    else:
        kept = part.stat().st_size if part.exists() else 0
        raise ConnectionError(f"{url}: gave up after {ATTEMPTS} attempts, the last one: {reason}. "
                              f"{kept} bytes are in {part}: run the same command again to continue."
                              ) from reason
    found = file_md5(part)
    if found != md5:
        part.unlink()
        raise ValueError(f"{url}: what came has md5 {found}, expected {md5}; it was deleted. Run "
                         "the same command again; if it repeats, the server has another file.")
    os.replace(part, path)                                # atomic, and fsync is done


def file_md5(path: str | os.PathLike) -> str:
    """The file's md5 in hexadecimal: against accidents, not against attackers."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _transfer(url, part, md5, progress, opener):
    """Append to part what it lacks.  _TransferError if it still lacks something."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = opener(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        _refused(error, url, part, md5, have)
        return                                            # 416, and nothing was lacking
    except (OSError, http.client.HTTPException) as error:
        raise _TransferError(f"no connection ({error})") from error
    with response:
        start = _start(response, part, have)
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        with (open(part, "ab" if start else "wb") as file,
              tqdm(desc=part.stem, initial=start, total=total, unit="B", unit_scale=True,
                   disable=not progress) as bar):
            for chunk in _chunks(response):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    size = part.stat().st_size
    if total is not None and size < total:                # http.client is silent about it
        raise _TransferError(f"the connection ended after {size} of {total} bytes")


def _start(response, part, have) -> int:
    """Where in the file the response's body begins."""
    if response.status != 206:
        return 0                                          # Range was ignored: the whole file
    stated = response.headers.get("Content-Range", "")
    if not stated.startswith(f"bytes {have}-"):
        part.unlink(missing_ok=True)                      # nothing to be joined safely: start over
        raise _TransferError(f"asked for bytes from {have}, the server sent {stated!r}")
    return have


def _chunks(response) -> Iterator[bytes]:
    """The body; only *its* errors may be retried, a full disk may not."""
    while True:
        try:
            chunk = response.read(_CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise _TransferError(f"the connection broke ({error})") from error
        if not chunk:
            return
        yield chunk


def _refused(error, url, part, md5, have):
    """Returns if part is complete after all, else raises."""
    if error.code == 416 and have:                        # no bytes from there on
        if file_md5(part) == md5:
            return
        part.unlink()
        raise _TransferError(f"{part} did not fit the server's file and was deleted") from error
    answer = f"HTTP {error.code} {error.reason}"
    if error.code in _PASSING:
        raise _TransferError(f"the server answered {answer}") from error
    raise ConnectionError(f"{url}: the server answered {answer}. Get the file from elsewhere (md5 "
                          f"{md5}) and put it at {part.with_suffix('')}.") from error
