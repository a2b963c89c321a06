"""The page about a run: its numbers, nothing from elsewhere, and what a browser shows of it."""
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tiny import QUICK, digits, probed, probed_batch

import train
from minifqt import autobits, quantizers
from minifqt.study import Probe, page, variance
from minifqt.study.__main__ import main


class Links(html.parser.HTMLParser):
    """Everything that a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [value for key, value in attributes if key in ("src", "href", "action")]
        self.found += [tag] if tag in ("link", "iframe", "img", "object", "base") else []


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """report.html of a tiny run with automatic bits, and what it holds."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.load", lambda *ignored: digits(128))
        patch.chdir(folder)
        for name, value in QUICK:
            patch.setattr(autobits, name, value)
        assert train.main(["--epochs", "2", "--recipe", "psq-auto", "--out", "a"]) == 0
        assert main(["report", "a", "--out", "out", "--draws", "2", "--step", "1"]) == 0
    path = folder / "out" / "report.html"
    text = path.read_text()
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return path, text, json.loads(found[1])


def test_the_page_fetches_nothing(report):
    _, text, _ = report
    links = Links()
    links.feed(text)
    assert links.found == []
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttp|import\(", text)
    assert "@DATA" not in text


def test_the_page_holds_the_runs_numbers(report):
    path, _, data = report
    lines = (path.parents[1] / "a" / "metrics.jsonl").read_text().splitlines()
    assert data["curves"] == [json.loads(line) for line in lines]
    assert [line["step"] for line in data["choices"]] == [0]
    assert [(p["name"], p["step"]) for p in data["points"]][:2] == [("start", 0), ("step 1", 1)]
    assert data["points"][-1]["step"] in (2, 4)
    for point in data["points"]:
        assert point["epoch"] == point["step"] / 2
        assert point["loss"] > 0
        assert point["sampling"] > 0
        assert point["total"] == pytest.approx(sum(mean for mean, _ in point["terms"].values()))
        assert len(point["audit"]["products"]) == 29
        assert set(point["codes"]) == {site for site in point["specs"] if site.endswith("grad_x")}
        for site, rows in point["codes"].items():
            bits = int(point["specs"][site][-1])
            assert [r["name"] for r in rows] == [f"{n}{bits}" for n in ("ptq", "psq", "bhq")]
            assert all(len(r["occupied"]) == 2**bits for r in rows)


def test_what_the_page_shows_of_a_step_is_what_the_studies_find():
    net, some = probed("psq4"), [probed_batch(8), probed_batch(6)]
    found = page.look(net, some, seed=3)
    assert found["sampling"] == variance.sampling(net, some)[0]
    assert found["terms"] == variance.terms(net, some, seed=3)
    with Probe(net, *some[0]) as probe:
        dy = probe.errors["3.grad_x"]
    for row in found["codes"]["3.grad_x"]:
        q = quantizers.create(row["name"][:3], bits=4)
        assert row["variance"] == pytest.approx(q.variance(dy).sum() / (dy**2.0).sum())
        assert sum(row["occupied"]) == dy.size


def test_numbers_that_json_has_not_are_left_out():
    text = page.page({"title": "", "points": [], "curves": [{"test_loss": float("nan")}]})
    assert json.loads(re.search(r'id="data">(.*?)</script>', text)[1])["curves"] == [
        {"test_loss": None}]


@pytest.mark.usefixtures("small")
def test_a_report_leaves_out_half_lines_and_refuses_another_recipe(capsys):
    assert train.main(["--epochs", "1", "--recipe", "fp32", "--out", "a"]) == 0
    with Path("a/metrics.jsonl").open("a") as log:
        log.write('{"epoch": 2, "st')
    assert main(["report", "--draws", "2", "a", "--out", "out"]) == 0
    assert main(["report", "a", "--recipe", "psq3"]) == 1
    assert "--recipe psq3: report shows a run as it is" in capsys.readouterr().err


def test_text_of_a_run_cannot_end_the_pages_data():
    text = page.page({"title": "</script><script>alert(1)</script>", "points": []})
    assert "<script>alert" not in text
    assert json.loads(re.search(r'id="data">(.*?)</script>', text)[1])["title"].startswith("</s")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to look at the page with")
@pytest.mark.parametrize(("at", "says"), [
    ("step=0&layer=layer2.0.conv1", ["Codes of <span class=\"layer\">layer2.0.conv1<"]),
    ("step=1&layer=fc", ["Audit of <span class=\"layer\">fc<", "<td>dgrad</td>"]),
    ("", ["100.0 % of ", "29 of 29 are the same, every bit"])])
def test_a_browser_shows_the_picked_layer_and_step(report, at, says, tmp_path):
    path, _, data = report
    shown = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--user-data-dir={tmp_path}", "--dump-dom", f"file://{path}#{at}"],
        capture_output=True, text=True, timeout=60, check=True).stdout
    for text in says:
        assert text in shown
    if at:
        step = at.split("&")[0].removeprefix("step=")
        point = [p["step"] for p in data["points"]].index(int(step))
        assert re.search(rf'data-point="{point}" aria-pressed="true"', shown)
