"""The page and the terminal table: self-contained, escaped, bounded, right numbers."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from sandbox.contracts import StorageError
from sandbox.reports import pages
from sandbox.reports.charts import draw, format_number, line_chart, smooth
from sandbox.reports.media import contact_sheet, write_video
from sandbox.reports.run_page import (
    Report,
    charts_of,
    duration,
    losses_by_time,
    read_curves,
    time_chart,
    write_report,
)
from sandbox.reports.scores import ScoreRow, interval, terminal_table

NASTY = "<script>alert('x')</script> & \"quotes\" $title <img src=https://example.org/x.png>"
SCORES = [
    ScoreRow("this model", {"colour": 1.0, "digit": 36 / 192, "shape": 0.534}, 192),
    ScoreRow("real clips", {"colour": 1.0, "digit": 190 / 192, "shape": 1.0}, 192),
    ScoreRow("untrained model", {"colour": 34 / 192, "digit": 16 / 192}, 192),
]
RATES = frozenset({"colour", "digit"})
MEANINGS = {
    "colour": "Share of clips in the right colour; chance 0.17, perfect 1.",
    "shape": "Alike.",
}


class Page(HTMLParser):
    """Tags, addresses and texts of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.links: list[str] = []
        self.said = ""
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        self.sources += [values[k] for k in ("src", "poster", "data", "srcset") if values.get(k)]
        self.links += [values["href"]] if "href" in values else []
        if tag not in ("meta", "img", "input", "br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        self.said += data


@pytest.fixture
def run(tmp_path) -> Path:
    video = torch.zeros(3, 4, 16, 16)
    write_video(tmp_path / "samples" / "0.mp4", video, 8, 4)
    contact_sheet(tmp_path / "sheet.png", [("a", {"real": video})])
    lines = [{"step": s, "loss": 1 / s, "lr": 1e-3, "val/loss": 2 / s} for s in range(1, 101)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def full(run: Path, text: str = "plain") -> Report:
    return Report(
        title=text,
        summary=text,
        command=text,
        facts={"seed": 0, text: text},
        notes=[text],
        scores=SCORES,
        rates=RATES,
        meanings={**MEANINGS, "digit": text},
        samples=[(text, Path("samples/0.mp4"))],
        sheet=Path("sheet.png"),
        curves={
            **read_curves(run),
            f"score/{text}": [(1, 1.0)],
            "score/b": [(1, 2.0)],
        },
        timings={"training": 60.0, text: 1.0},
        settings={"lr": 1e-3, "backbone": {"plugin": "backbone/dit", "width": 64, text: text}},
        environment={"python": text, "packages": {"torch": "2"}},
        skipped={text: text},
    )


# --- the page -------------------------------------------------------------------------------------


def test_page_holds_every_section_and_closes_every_element(run):
    page = Page(write_report(run, full(run)))
    assert page.open == []
    sections = "Scores", "Samples", "Compared with real clips", "Training", "Wall-clock time"
    sections += "All settings", "Environment", "Files of this run"
    for word in (*sections, "backbone=dit", "backbone.width", "metrics.jsonl"):
        assert word in page.said, word


def test_what_users_write_never_becomes_markup(run):
    plain, nasty = Page(write_report(run, full(run))), Page(write_report(run, full(run, NASTY)))
    assert nasty.tags == plain.tags
    assert nasty.said == plain.said.replace("plain", NASTY)


def test_page_loads_nothing_from_outside(run):
    path = write_report(run, full(run, NASTY))
    page = Page(path)
    assert page.sources and all(s.startswith("data:") for s in page.sources)
    assert all(not re.match(r"[a-z]+:|//|/", link) for link in page.links)
    assert "default-src 'none'" in path.read_text()
    assert not re.search(r"url\((?!#)|@import", path.read_text())


def test_an_empty_report_is_a_page_too(tmp_path):
    page = Page(write_report(tmp_path / "new", Report("nothing yet")))
    assert "nothing yet" in page.said and "Scores" not in page.said


def test_links_work_from_the_run_folder(run):
    (run / "a b#c.txt").write_text("x")
    page = Page(write_report(run, full(run)))
    assert "a%20b%23c.txt" in page.links and "samples/" in page.links


@pytest.mark.parametrize("start", ["absolute", "folder", "working directory"])
def test_samples_are_found_however_they_are_named(run, monkeypatch, start):
    monkeypatch.chdir(run.parent)
    base = {"absolute": run, "folder": Path(), "working directory": Path(run.name)}[start]
    report = Report("x", samples=[("a", base / "samples" / "0.mp4")], sheet=base / "sheet.png")
    page = Page(write_report(run.name, report))
    assert len(page.sources) == 2 and page.links[0] == "sheet.png"


def test_missing_and_foreign_files_are_named(run, tmp_path_factory):
    outside = tmp_path_factory.mktemp("elsewhere") / "notes.txt"
    outside.write_text("x")
    samples = [("gone", Path("gone.mp4")), ("text", outside)]
    page = Page(write_report(run, Report("x", samples=samples)))
    assert "gone.mp4: no such file" in page.said
    assert "notes.txt (1 B) is not an image or video" in page.said and not page.sources


def test_large_media_are_linked_and_the_page_stays_bounded(run, monkeypatch):
    monkeypatch.setattr(pages, "PAGE_LIMIT", 5000)
    noise = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    for i in range(5):
        write_video(run / "samples" / f"{i}.mp4", noise, 8)
    samples = [(f"clip {i}", Path(f"samples/{i}.mp4")) for i in range(5)]
    path = write_report(run, Report("x", samples=samples))
    page = Page(path)
    assert 1 <= len(page.sources) < 5
    assert "samples/4.mp4" in page.links and "too large for this page" in page.said
    assert path.stat().st_size < 5000 * 4 / 3 + 20_000  # base64, and the template


def test_long_curves_do_not_make_long_pages(tmp_path):
    rng = np.random.default_rng(0)
    curve = [(i, float(v)) for i, v in enumerate(rng.normal(size=100_000))]
    path = write_report(tmp_path, Report("x", curves={"loss": curve}))
    assert path.stat().st_size < 100_000


def test_many_skipped_items_are_counted(tmp_path):
    skipped = {f"clip{i}": "corrupt" for i in range(1000)}
    page = Page(write_report(tmp_path, Report("x", skipped=skipped)))
    assert "1,000 data items were skipped" in page.said and "and 800 more" in page.said


def test_page_is_written_whole_or_not_at_all(run):
    first = write_report(run, Report("first")).read_text()
    report = Report("second", samples=[("x", None)])  # type: ignore[list-item]
    with pytest.raises(TypeError):
        write_report(run, report)
    assert (run / "report.html").read_text() == first
    assert not [p for p in run.iterdir() if "part" in p.name]


def test_an_unwritable_folder_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"report\.html"):
        write_report(tmp_path / "file" / "run", Report("x"))


# --- curves ---------------------------------------------------------------------------------------


def test_curves_survive_kills_and_resumes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 2, "loss": 2.0}\n{"step": 1, "loss": 1.0}\n{"step": 3, "lo\n'
        '{"step": 2, "loss": 2.5}\n{"step": 5, "loss": 1, "val/loss": 9}\n{"rewind": 3}\n'
        '{"step": 4, "loss": NaN}\n{"st'
    )
    curves = read_curves(tmp_path)
    assert list(curves) == ["loss"] and curves["loss"][:2] == [(1, 1.0), (2, 2.5)]
    assert math.isnan(curves["loss"][2][1])
    assert read_curves(tmp_path / "none") == {}


def test_splits_share_a_chart_and_losses_come_first():
    point = [(1, 1.0)]
    names = ["lr", "score/digit", "score/colour", "loss", "val/loss"]
    charts = charts_of(dict.fromkeys(names, point))
    assert list(charts) == ["loss", "score", "lr"]
    assert list(charts["loss"]) == ["train", "val"] and list(charts["score"]) == ["digit", "colour"]


def test_losses_at_fixed_times_have_a_chart_over_steps_and_one_over_time(tmp_path):
    curves = {
        "val_times/0.7500": [(1, 4.0), (2, 3.0)],
        "val_times/0.2500": [(1, 2.0), (2, 1.0)],
        "val_times/mean": [(1, 3.0), (2, 2.0)],
        "val_times/0.2500_ema": [(2, 5.0)],
    }
    charts = charts_of(curves)
    assert {*charts["val_times"]} == {"0.7500", "0.2500", "mean"}
    assert {*charts["val_times_ema"]} == {"0.2500"}
    assert losses_by_time(curves) == {"live": [(0.25, 1.0), (0.75, 3.0)], "EMA": [(0.25, 5.0)]}
    assert time_chart(losses_by_time(curves))["keys"] == [("live", "2"), ("EMA", "5")]
    page = write_report(tmp_path, Report("a run", curves=curves)).read_text()
    assert "Validation loss by time" in page
    plain = write_report(tmp_path, Report("a run", curves={"loss": [(1, 1.0)]})).read_text()
    assert "Validation loss by time" not in plain


def test_log_steps_begin_at_the_first_step():
    (axes,) = draw("x", {"x": np.array([(0, 0.0), (10, 1.0), (100, 0.0)])}, log_x=True).axes
    assert axes.get_xscale() == "log" and axes.get_xlim() == (1, 100)


def test_smoothing_follows_the_mean_and_keeps_a_learning_rate():
    rng = np.random.default_rng(0)
    noisy = np.stack([np.arange(2000.0), 1 + rng.normal(0, 0.3, 2000)], 1)
    assert smooth(noisy)[200:, 1].std() < 0.2 * noisy[200:, 1].std()
    ramp = np.array([(s, min(s, 50) / 50) for s in range(1000)])
    assert (smooth(ramp) == ramp).all()


def test_a_spike_does_not_flatten_a_curve():
    points = np.array([(s, 100.0 if s == 500 else 1 - s / 2000) for s in range(1000)])
    (axes,) = draw("grad", {"a": points}).axes
    assert axes.get_ylim()[1] < 10


def test_a_wide_range_of_values_has_a_logarithmic_axis_but_for_a_learning_rate():
    points = np.array([(s, 10.0 ** (-s / 10)) for s in range(30)])
    scales = [draw(name, {"a": points}).axes[0].get_yscale() for name in ("loss", "lr")]
    assert scales == ["log", "linear"]


@pytest.mark.parametrize(
    "points", [[], [(0, math.nan)], [(5, 1.0)], [(5, 0.0), (6, 0.0)], [(1, -1e-9), (2, 1e12)]]
)
@pytest.mark.parametrize("log_x", [False, True])
def test_odd_curves_are_drawn_without_errors(points, log_x):
    svg = line_chart("x", {"x": points}, log_x)["svg"]
    assert "nan" not in (svg or "").lower()
    assert (svg is None) == (not points or math.isnan(points[0][1]))


def test_charts_are_deterministic_and_use_the_colours_of_the_page():
    chart = line_chart("loss", {"a": [(0, 1.0), (5, 2.0)]})
    assert chart == line_chart("loss", {"a": [(0, 1.0), (5, 2.0)]})
    assert "var(--c0)" in chart["svg"] and "#0b6e62" not in chart["svg"]
    assert chart["keys"] == [("a", "2")]


def test_numbers_have_three_significant_digits():
    assert [format_number(v) for v in (0, 0.4731, 1200, 4e-5)] == ["0", "0.473", "1.2k", "4e-05"]


# --- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "n", "low", "high"),
    [(0.0, 10, 0.0, 0.2775), (1.0, 192, 0.9804, 1.0), (0.5, 100, 0.4038, 0.5962)],
)
def test_wilson_interval_equals_published_values(rate, n, low, high):
    found = interval(ScoreRow("x", {"a": rate}, n), "a")
    assert found == pytest.approx((low, high), abs=5e-5)  # tabulated to four digits


def test_a_missing_score_has_no_interval():
    assert interval(SCORES[2], "shape") is None


def test_terminal_table_shows_every_score_and_fits_the_width():
    table = terminal_table(SCORES, MEANINGS, RATES, width=60)
    lines = table.splitlines()
    assert lines[0].split() == ["192", "clips", "colour", "digit", "shape"]
    assert lines[2].split() == ["this", "model", "1.00", "0.19", "0.53"]
    assert lines[3].split() == ["95", "%", "interval", "0.98-1.00", "0.14-0.25"]
    assert lines[5].split() == ["untrained", "model", "0.18", "0.08", "-"]
    assert max(map(len, lines)) <= 60 and "chance 0.17" in table
    assert terminal_table([], {}, RATES) == ""


def test_page_shows_the_same_numbers(run):
    said = Page(write_report(run, full(run))).said
    assert "0.98\N{EN DASH}1.00" in said and "0.14\N{EN DASH}0.25" in said and "0.53" in said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.123, "0.12 s"), (57.2, "57 s"), (112, "1 min 52 s"), (11100, "3 h 05 min")],
)
def test_durations_read_well(seconds, said):
    assert duration(seconds) == said
