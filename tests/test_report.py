"""The page of a run: nothing from outside, everything escaped, all of what the run has recorded; also of damaged runs."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from runs import PIXELS, assert_refused, call, succeed, tree
from test_runs_command import make

from ms_diffusion.commands import report
from ms_diffusion.training.config import override
from ms_diffusion.training.runs import DEFAULT

EVIL = "<script>alert('$x$')<&\""
VOID = {"meta", "img"}


class Page(HTMLParser):
    """The elements of a page, each with its attributes, and its text; every element but the void ones is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "svg"} & {*self.open}:
            self.text += f" {data.strip()}"

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def read(path):
    text = path.read_text()
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "foreignobject"} & {tag for tag, _ in page.found}
    for tag, attributes in page.found:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert value.startswith(("data:image/png;base64,", "#")), (tag, value)
    assert not re.search(r"url\((?!#)|@import", text)
    return page


@pytest.fixture
def run(tmp_path):
    """A run of 1,000 steps whose name, class and metrics are markup."""
    same = {"lr": 1e-3, "img_per_s": 100.0, "skipped": 1}
    rows = [{"step": n, "loss": 1 / n, "epoch": n / 9, EVIL: n % 7, **same} for n in range(10, 1001, 10)]
    rows += [{"step": 500, "fid": 3.25}, {"step": 500, "val_loss": 0.5, "val_loss_ema": 0.4}]
    config = override(PIXELS, total_steps=1000, **{"data.dir": EVIL})
    versions = {"mindspore": "2.10.0", EVIL: EVIL}
    run = make(tmp_path / EVIL.replace("/", ""), config, 1000, rows, versions=versions)
    (run / "samples").mkdir()
    for step in range(20, 1001, 20):
        Image.fromarray(np.full((8, 6), step % 256, np.uint8)).save(run / "samples" / f"step-{step:07d}.png")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(run / "samples" / f"{EVIL}.png".replace("/", ""))
    (run / "samples" / "denoise-row-0000020.png").write_bytes(b"\x89PNG but no more")
    scores = {"protocol": f"of {EVIL}", "samples": {"fid": 3.0, "recall": 0.5}, "floor": {"fid": 1.0}}
    (run / "evaluation.json").write_text(json.dumps(scores))
    return run


def test_all_of_a_run(run):
    before = tree(run)
    assert "report.html" in succeed("report", run)
    page = read(run / "report.html")
    assert {name: content for name, content in tree(run).items() if name.name != "report.html"} == before
    assert len(page.all("svg")) == 5  # loss, learning rate, throughput, FID, and the number of a strange name
    pictures = page.all("img")
    assert len(pictures) == report.MOST + 1 and all((p["width"], p["height"]) == ("6", "8") for p in pictures[:-1])
    steps = [int(p["alt"].removeprefix("step ")) for p in pictures[:-1]]
    assert steps == sorted(steps) and (steps[0], steps[-1]) == (20, 1000)
    for words in (
        *(EVIL, "1000 of 1000, epoch 111.1", "finished", "mindspore 2.10.0", "FID 3 (evaluated); FID 3.25", "skipped steps"),
        *("--preset quick", "--train.total-steps", "4800", "learning rate", f"of {EVIL}"),
        *("denoise-row-0000020.png cannot be read", "(24 of 50)", "recall", '"total_steps": 1000'),
    ):
        assert words in page.text, words


def test_damaged_and_unfinished_runs(tmp_path):
    """What can be read is shown; without a configuration there is no page."""
    run = make(tmp_path / "run", PIXELS, 3, [{"step": 3, "loss": 0.5}])
    (run / "evaluation.json").write_text('{"samples": 3}')
    succeed("report", run, "--out", tmp_path / "a.html")
    page = read(tmp_path / "a.html")
    assert "not finished" in page.text and len(page.all("svg")) == 1 and "Scores" not in page.text
    (run / "checkpoints" / "step-0000003" / "state.json").write_text("[")
    (run / "metrics.jsonl").unlink()
    succeed("report", run, "--out", tmp_path / "b.html")
    page = read(tmp_path / "b.html")
    assert "no checkpoint can be read" in page.text and not page.all("svg") and "Curves" not in page.text
    (run / "config.json").write_text("[]")
    assert_refused(call("report", run, "--out", tmp_path / "c.html"), "config.json")
    assert_refused(call("report", tmp_path / "nowhere"), "nowhere is not a folder")
    assert_refused(call("report", tmp_path), "no config.json")
    assert_refused(call("report", run, "--out", run / "config.json"), "belongs to the run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html", "run"]


def test_a_bundled_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    succeed("report", DEFAULT)
    assert f"<h1>{DEFAULT}</h1>" in (tmp_path / "report.html").read_text()
    assert "class accuracy" in read(tmp_path / "report.html").text
