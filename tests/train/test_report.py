"""The report: one file that needs no other, with all that is known of a run, whatever its names contain."""

import base64
import html.parser
import io
import re
import sys

import numpy as np
import pytest

from mpitrain._errors import InputError, MissingExtraError
from mpitrain.comm.bench.results import Quantiles
from mpitrain.train import plots
from mpitrain.train.bench.costs import JobCosts
from mpitrain.train.bench.memory import Memory
from mpitrain.train.bench.overhead import Overhead
from mpitrain.train.report import write_report
from mpitrain.train.rundir import RunDirectory

pytest.importorskip("matplotlib")
PIL_Image = pytest.importorskip("PIL.Image")


class Page(html.parser.HTMLParser):
    """Collects tags and text, and checks that tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def sources(self):
        return [value for _, attrs in self.tags for key, value in attrs.items() if key in ("src", "href")]


def make(path, steps=60, finished=True, name="digits", metric="accuracy", classes=("zero", "one")):
    path.mkdir()
    run = RunDirectory(path)
    run.write_job({"name": name})
    run.write_environment({"ranks": 2, "host": name})
    for step in range(1, steps + 1):
        train = {"step": step, "kind": "train", "loss": 300 / step**2, "lr": 0.1, "samples_per_s": 100.0 + step}
        run.append_metrics(train | {"epoch": step / 10, "seconds": step / 10})
        if step % 10 == 0:
            run.append_metrics({"step": step, "kind": "valid", "loss": 1 / step, metric: 1 - 1 / step})
    if finished:
        run.finish(
            {
                "job": name, "ranks": 2, "steps": steps, "seconds": 6.5, "loss": 0.25, "run_dir": str(path),
                "metrics": {"test_accuracy": 0.98, "r2": np.nan}, "weights_sha256": "ab" * 32,
                "confusion": [[9, 1], [0, 5]], "classes": list(classes), "stopped": "target reached",
            }
        )  # fmt: skip
    return path


def test_a_finished_run(tmp_path):
    path = make(tmp_path / "run")
    assert write_report(path) == path / "report.html"
    page = Page((path / "report.html").read_text())
    for part in ("digits", "Finished: target reached", "98.00 %", "Test accuracy", "0.25", "ab" * 32, "6.5"):
        assert part in page.text
    assert 'name = "digits"' in page.text
    assert '"ranks": 2' in page.text
    names = {file.name for file in path.glob("*.png")}
    assert names == {"loss.png", "accuracy.png", "throughput.png", "learning_rate.png", "confusion.png"}


def test_rates_are_the_medians_of_all_records(tmp_path):
    path = make(tmp_path / "run", steps=3)
    assert "samples/s102 (p10 101, p90 103) over 3 records of the training" in Page(write_report(path).read_text()).text
    RunDirectory(path).append_metrics(
        {"step": 4, "kind": "train", "loss": 1.0, "samples_per_s": 7.0, "tokens_per_s": 5600.0}
    )
    text = Page(write_report(path).read_text()).text
    assert "tokens/s5,600 (p10 5,600, p90 5,600) over 1 record of the training" in text
    assert not (path / "tokens_per_s.png").exists()


def test_costs_that_lie_in_the_run_are_told(tmp_path):
    path = make(tmp_path / "a run", steps=0)
    assert f"which training does not measure, of jobs on CPUs: mpitrain bench job '{path}' -n 2" in shown(path)
    memory = {"parameters": Memory(3e6, 3e6), "activations": Memory(7.5e6), "codec": Memory(1e6, 2e6)}
    seconds = Quantiles(7, 0.04, 0.045, 0.05, 0.055, 0.06)
    costs = JobCosts(
        "<digits>: on 2 ranks", 2, 64, seconds, 1280.0, 9000.0, 4 * 10**9, 80e9, 0.5, 0.125, memory,
        Overhead(0.3, 0.25, 0.2), ["not all is known"],
    )  # fmt: skip
    (path / "costs.json").write_bytes(costs.to_json())
    text = shown(path)
    for part in (
        "Measured by mpitrain bench job: <digits>: on 2 ranks",
        "step50 ms (p10 40, p90 60): 1,280 samples/s, 9,000 tokens/s",
        "operations4 GFLOP a step, 50.0% of 80 GFLOP/s of each rank's products",
        "communication12.5% of a step",
        "pipelineoverhead 30.0%; 25.0% simulated with the passes' times, 20.0% by formula",
        "MB a rankparametersactivationscodecmeasured3.007.501.00predicted3.00not known2.00",
        "measured activations include the workspace",
        "not all is known",
    ):
        assert part in text
    assert "which training does not measure" not in text


def test_many_classes_are_told_by_the_pairs_that_are_confused_most(tmp_path):
    path = make(tmp_path / "run", steps=0)
    finish(path, np.diag(np.full(30, 4)))
    assert "Classes confused" not in shown(path)
    assert (path / "confusion.png").exists()
    (path / "confusion.png").unlink()
    matrix = np.diag(np.full(31, 4000))
    matrix[7, 30], matrix[2, 1], matrix[1, 2] = 9, 10, 3
    finish(path, matrix)
    assert "confused most often (test)classwas taken forsamples2110 of 4,0107309 of 4,009123 of 4,003" in (
        shown(path).replace("\n", "")
    )
    assert not (path / "confusion.png").exists()
    finish(path, np.diag(np.full(31, 4)))
    assert "Classes confused most often (test)\nNone" in shown(path)


def test_ticks_of_steps_are_whole_numbers(monkeypatch):
    monkeypatch.setattr(plots, "_png", lambda figure: figure)
    (axes,) = plots.curve("Loss", {"train": ((10, 20, 30), (3.0, 2.0, 1.0))}).axes
    assert len(axes.get_xticks()) > 2
    assert all(tick == round(tick) for tick in axes.get_xticks())


def test_large_numbers_have_separators(monkeypatch):
    monkeypatch.setattr(plots, "_png", lambda figure: figure)
    series = {"train": ((10_000, 20_000), (24_000.0, 25_000.0))}
    (axes,) = plots.curve("Throughput", series, from_zero=True).axes
    assert {axes.xaxis.get_major_formatter()(20_000), axes.yaxis.get_major_formatter()(25_000)} == {"20,000", "25,000"}
    (axes,) = plots.curve("Accuracy", {"train": ((10, 20), (0.25, 0.5))}).axes
    axes.figure.canvas.draw()
    assert "0.50" in [tick.get_text() for tick in axes.get_yticklabels()]


def test_a_single_point_is_no_curve(tmp_path):
    path = make(tmp_path / "run", steps=10)
    write_report(path)
    assert (path / "loss.png").exists()
    assert not (path / "accuracy.png").exists()


def finish(path, matrix):
    RunDirectory(path).finish({"job": "many", "confusion": matrix, "classes": []})


def shown(path):
    return Page(write_report(path).read_text()).text


def test_it_needs_no_other_file_nor_the_network(tmp_path):
    path = make(tmp_path / "run")
    page = Page(write_report(path).read_text())
    assert len(page.sources()) == 5
    for source in page.sources():
        head, data = source.split(",", 1)
        assert head == "data:image/png;base64"
        picture = PIL_Image.open(io.BytesIO(base64.b64decode(data)))
        assert picture.width > 400
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 20  # something is drawn
    assert not re.search(r"https?://|@import|url\(|<script|<link", (path / "report.html").read_text())
    assert {base64.b64decode(source.split(",", 1)[1]) for source in page.sources()} == {
        file.read_bytes() for file in path.glob("*.png")
    }


def test_all_names_are_escaped(tmp_path):
    bad = '<script>alert("x")</script>&$x_1$'
    path = make(tmp_path / "run", name=bad, metric=f"../{bad}", classes=(bad, "$日"))
    text = write_report(path).read_text()  # without a warning that the pictures' font has no such letter
    assert "<script" not in text
    assert bad in Page(text).text
    assert {file.parent for file in tmp_path.rglob("*.png")} == {path}


@pytest.mark.parametrize("steps", [0, 1, 2, 41])
def test_a_run_that_goes_on(tmp_path, steps):
    path = make(tmp_path / "run", steps=steps, finished=False)
    if steps:
        with (path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 99, "ki')
    text = Page(write_report(path).read_text()).text
    assert "Not finished" in text
    assert f"last metrics at step {steps}" in text if steps else "No metrics yet" in text


def test_values_that_are_no_numbers_are_left_out(tmp_path):
    path = make(tmp_path / "run", steps=3)
    run = RunDirectory(path)
    run.append_metrics({"step": 4, "kind": "train", "loss": np.inf, "lr": "high", "samples_per_s": None, "ok": True})
    run.append_metrics({"step": 4, "kind": "other", "loss": 1.0})
    assert write_report(path).exists()
    assert not (path / "ok.png").exists()


def test_without_matplotlib_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mpitrain\[plot\]'"):
        write_report(make(tmp_path / "run"))


def test_bad_input(tmp_path):
    with pytest.raises(InputError, match=r"report: .*nowhere: holds no run; name the directory with its job\.toml"):
        write_report(tmp_path / "nowhere")
    path = make(tmp_path / "run")
    (path / "costs.json").write_text('{"title": 3}')
    with pytest.raises(InputError, match=r"report: .*costs\.json: cannot be read.*not what mpitrain bench job writes"):
        write_report(path)
    for text in ("{", "[1]"):
        (path / "result.json").write_text(text)
        with pytest.raises(InputError, match=r"report: .*result\.json: "):
            write_report(path)
