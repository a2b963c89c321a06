"""Downloads from a local server: whole, continued, damaged, refused; nothing wrong stays behind."""
import hashlib
import http.server
import os
import threading
import urllib.request
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from records import archive, synthetic

import data
from data import cifar
from data.download import ATTEMPTS, fetch

CONTENT = np.random.default_rng(0).bytes(200_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


@dataclass
class Behaviour:
    """What the local server does; `asked` collects the Range header of every request."""

    content: bytes = CONTENT
    ranges: bool = True
    shift: int = 0                                        # answers with a range that starts later
    statuses: list = field(default_factory=list)          # of the first requests; 0 is normal
    sends: list = field(default_factory=list)             # bytes before the first requests are cut
    asked: list = field(default_factory=list)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):  # noqa: N802 - http.server's name
        does = self.server.does
        asked = self.headers.get("Range")
        does.asked.append(asked)
        status = does.statuses.pop(0) if does.statuses else 0
        if status:
            return self.send_error(status)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and does.ranges else 0
        if start >= len(does.content):
            return self.send_error(416)
        body = does.content[start:]
        self.send_response(206 if asked and does.ranges else 200)
        if asked and does.ranges:
            last = len(does.content) - 1
            self.send_header("Content-Range", f"bytes {start + does.shift}-{last}/{last + 1}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:does.sends.pop(0)] if does.sends else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.does = Behaviour()
        running.url = f"http://127.0.0.1:{running.server_port}/cifar.tar.gz"
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def get(server, path, md5=MD5, progress=False):
    """fetch without pauses, and past any proxy that the environment names."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
    fetch(server.url, path, md5, progress, direct, pause=0)


def test_a_download_arrives_whole_and_leaves_no_part(server, tmp_path):
    path = tmp_path / "new" / "cifar.tar.gz"
    get(server, path)
    assert path.read_bytes() == CONTENT
    assert os.listdir(path.parent) == ["cifar.tar.gz"]
    assert server.does.asked == [None]


def test_a_file_that_is_there_and_right_is_not_asked_for(server, tmp_path):
    path = tmp_path / "cifar.tar.gz"
    path.write_bytes(CONTENT)
    get(server, path)
    assert server.does.asked == []


def test_a_wrong_file_is_replaced(server, tmp_path):
    path = tmp_path / "cifar.tar.gz"
    path.write_bytes(CONTENT[:-1])
    get(server, path)
    assert path.read_bytes() == CONTENT


def test_a_part_of_an_earlier_run_is_continued(server, tmp_path):
    (tmp_path / "cifar.tar.gz.part").write_bytes(CONTENT[:70_000])
    get(server, tmp_path / "cifar.tar.gz")
    assert (tmp_path / "cifar.tar.gz").read_bytes() == CONTENT
    assert server.does.asked == ["bytes=70000-"]


def test_a_cut_connection_is_continued_where_it_broke(server, tmp_path):
    server.does.sends = [50_000, 60_000]
    get(server, tmp_path / "cifar.tar.gz")
    assert (tmp_path / "cifar.tar.gz").read_bytes() == CONTENT
    assert server.does.asked == [None, "bytes=50000-", "bytes=110000-"]


def test_after_too_many_cuts_the_part_stays_and_running_again_continues(server, tmp_path):
    server.does.sends = [10_000] * ATTEMPTS
    with pytest.raises(ConnectionError, match="ended after 50000 of 200000 bytes. 50000 bytes are "
                                              "in .*part: run the same command again to continue"):
        get(server, tmp_path / "cifar.tar.gz")
    assert len(server.does.asked) == ATTEMPTS
    get(server, tmp_path / "cifar.tar.gz")
    assert (tmp_path / "cifar.tar.gz").read_bytes() == CONTENT
    assert server.does.asked[-1] == "bytes=50000-"


def test_a_wrong_byte_deletes_the_part_and_raises(server, tmp_path):
    server.does.content = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    with pytest.raises(ValueError, match=f"has md5 .*, expected {MD5}; it was deleted"):
        get(server, tmp_path / "cifar.tar.gz")
    assert os.listdir(tmp_path) == []


def test_a_server_that_ignores_range_makes_the_part_start_over(server, tmp_path):
    server.does.ranges = False
    (tmp_path / "cifar.tar.gz.part").write_bytes(CONTENT[:70_000])
    get(server, tmp_path / "cifar.tar.gz")
    assert (tmp_path / "cifar.tar.gz").read_bytes() == CONTENT
    assert server.does.asked == ["bytes=70000-"]


def test_a_server_that_answers_with_another_range_makes_the_part_start_over(server, tmp_path):
    server.does.shift = 5
    (tmp_path / "cifar.tar.gz.part").write_bytes(CONTENT[:70_000])
    get(server, tmp_path / "cifar.tar.gz")
    assert (tmp_path / "cifar.tar.gz").read_bytes() == CONTENT
    assert server.does.asked == ["bytes=70000-", None]


def test_a_part_that_is_complete_becomes_the_file(server, tmp_path):
    (tmp_path / "cifar.tar.gz.part").write_bytes(CONTENT)
    get(server, tmp_path / "cifar.tar.gz")
    assert (tmp_path / "cifar.tar.gz").read_bytes() == CONTENT
    assert server.does.asked == ["bytes=200000-"]


def test_a_part_that_is_too_long_starts_over(server, tmp_path):
    (tmp_path / "cifar.tar.gz.part").write_bytes(CONTENT + b"more")
    get(server, tmp_path / "cifar.tar.gz")
    assert (tmp_path / "cifar.tar.gz").read_bytes() == CONTENT
    assert server.does.asked == ["bytes=200004-", None]


def test_a_file_that_the_server_does_not_have_raises_at_once(server, tmp_path):
    server.does.statuses = [404]
    with pytest.raises(ConnectionError, match=f"HTTP 404 Not Found. Get the file from elsewhere "
                                              rf"\(md5 {MD5}\) and put it at .*/cifar.tar.gz\."):
        get(server, tmp_path / "cifar.tar.gz")
    assert len(server.does.asked) == 1


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.does.statuses = [503, 0]
    get(server, tmp_path / "cifar.tar.gz")
    assert (tmp_path / "cifar.tar.gz").read_bytes() == CONTENT
    assert len(server.does.asked) == 2


def test_no_server_at_all_raises_after_as_many_attempts_as_stated(tmp_path):
    calls = []

    def refuse(request, timeout):
        calls.append((request.full_url, timeout))
        raise ConnectionRefusedError("nobody listens")

    with pytest.raises(ConnectionError, match="nobody listens.*0 bytes are in"):
        fetch("http://example.invalid/x", tmp_path / "x", MD5, False, refuse, pause=0)
    assert len(calls) == ATTEMPTS


def test_the_progress_bar_starts_where_the_part_ended(server, tmp_path, capsys):
    (tmp_path / "cifar.tar.gz.part").write_bytes(CONTENT[:150_000])
    get(server, tmp_path / "cifar.tar.gz", progress=True)
    shown = capsys.readouterr().err
    assert "cifar.tar.gz:  75%" in shown
    assert "200k/200k" in shown


def test_load_with_download_fetches_unpacks_and_reads(server, tmp_path, monkeypatch):
    source, content, images, _ = synthetic("cifar10")
    server.does.content = archive(source.subfolder, content)
    url = server.url.replace("cifar.tar.gz", "cifar-10-binary.tar.gz")
    monkeypatch.setitem(cifar.SOURCES, "cifar10", replace(source, url=url))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = Path(tmp_path) / "new"
    train, test = data.load("cifar10", folder, download=True)
    assert (len(train), len(test)) == (30, 6)
    assert (test.images == images[-1]).all()
    data.load("cifar10", folder, download=True)
    assert server.does.asked == [None]                    # what is there is not fetched again
