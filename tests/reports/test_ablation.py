"""Many runs as one comparison: what varies, who is compared with whom, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import yaml
from PIL import Image

from sandbox.cli.main import _main
from sandbox.contracts import ConfigError, StorageError
from sandbox.reports.ablation import Ablation, compare, varying
from sandbox.reports.ablation_page import draw_curves, write_ablation
from sandbox.reports.ablation_runs import read
from sandbox.runs.identity import identity_of_work
from sandbox.runs.run import Run

PROTOCOL = {"data": "data/moving_digits", "clips": 8, "frames": 9, "weights": "ema"}


def run(
    out: Path, backbone: str, lr: float, seed: int, score: float,
    protocol: dict | None = None, prompts: int = 0, finished: bool = True, patch: int = 2,
    **settings: object,
) -> Path:  # fmt: skip
    """A folder as a finished run leaves it."""
    folder = out / f"run-{backbone}-{lr}-{seed}-{len([*out.glob('*')])}"
    (folder / "samples").mkdir(parents=True)
    width = {"dit": {"width": 8}, "unet3d": {"channels": 4}}[backbone]
    config = {
        "recipe": "default", "lr": lr, "seed": seed, "out": str(out), "steps": 20,
        "task": {"plugin": "task/train", "run": None},
        "backbone": {"plugin": f"backbone/{backbone}", "patch": patch, **width},
        "vae": {"plugin": "vae/pca"}, **settings,
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    protocol = PROTOCOL if protocol is None else protocol
    metrics = {
        "overrides": [f"lr={lr}", f"backbone={backbone}", f"seed={seed}"],
        "scores": {"model": {"digit": score}},
        "meaning": {"digit": "clips with the right digit; chance 0.1"},
        "protocols": {"digit": protocol, "loss": {"loss": "mse"}},
        "cost": {"parameters": 1000, "trained": 900, "training_seconds": 10.0 + seed},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "environment.json").write_text(json.dumps({"code": {"commit": "a"}}))
    lines = [{"step": s, "loss": math.exp(-s / 10) + seed / 50} for s in range(1, 21)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    pixels = np.full((16, 16, 3), 40 + 30 * seed, np.uint8)
    Image.fromarray(pixels).save(folder / "samples" / "000-a-red-3.png")
    if prompts:
        values = np.random.default_rng(seed).random(prompts) + score
        each = {"captions": [f"prompt {i}" for i in range(prompts)], "scores": {}}
        each["scores"]["digit"] = values.tolist()
        (folder / "scores_by_clip.json").write_text(json.dumps(each))
    if finished:
        (folder / "result.json").write_text(json.dumps({"folder": str(folder), "loss": 0.1}))
    return folder


@pytest.fixture
def runs(tmp_path):
    """Two backbones, two rates, three seeds: unet3d is better by 0.2."""
    for i, backbone in enumerate(("dit", "unet3d")):
        for j, lr in enumerate((1e-3, 4e-3)):
            for seed in range(3):
                run(tmp_path, backbone, lr, seed, 0.3 + 0.2 * i + 0.01 * j * seed + 0.03 * seed)
    return tmp_path


def compared(folder: Path, **words) -> Ablation:
    return compare(read(folder), **words)


# --- what varies ----------------------------------------------------------------------------------


def test_only_the_settings_that_vary_are_columns_and_a_component_is_one(runs):
    found = compared(runs)
    assert found.columns == ["lr", "backbone"]
    assert [v.settings for v in found.variants][:2] == [
        {"lr": "0.001", "backbone": "dit"},
        {"lr": "0.001", "backbone": "unet3d"},
    ]


def test_seeds_are_grouped(runs):
    found = compared(runs)
    assert [sorted(v.runs) for v in found.variants] == [[0, 1, 2]] * 4
    assert found.cells["A", "digit"].here.mean == pytest.approx(0.33)
    assert found.cells["A", "digit"].here.n == 3


def test_a_setting_that_follows_from_others_is_named_and_no_column(tmp_path):
    for lr in (1e-3, 2e-3):
        run(tmp_path, "dit", lr, 0, 0.5, follower=lr * 10)
    found = compared(tmp_path)
    assert found.columns == ["lr"]
    assert any("follower" in note for note in found.notes)


def test_what_was_typed_is_a_column_also_where_it_follows(tmp_path):
    for lr, backbone in ((1e-3, "dit"), (2e-3, "unet3d")):
        run(tmp_path, backbone, lr, 0, 0.5)
    assert compared(tmp_path).columns == ["lr", "backbone"]


def test_a_setting_inside_a_component_is_a_column_where_it_varies_within_one(tmp_path):
    for patch in (2, 4):
        run(tmp_path, "dit", 1e-3, 0, 0.5, patch=patch)
    run(tmp_path, "unet3d", 1e-3, 0, 0.5)
    columns, _ = varying(read(tmp_path).entries)
    assert columns.keys() == {"backbone", "backbone.patch"}


def test_of_the_same_run_twice_the_last_counts(tmp_path):
    run(tmp_path, "dit", 1e-3, 0, 0.1)
    run(tmp_path, "dit", 1e-3, 0, 0.9)
    assert compared(tmp_path).cells["A", "digit"].here.mean == 0.9


# --- comparison -----------------------------------------------------------------------------------


def test_differences_are_paired_by_seed_and_corrected_for_their_number(runs):
    found = compared(runs, baseline=["backbone=dit", "lr=1e-3"])
    assert found.baseline.label == "A"
    better = found.cells["B", "digit"]  # the same seeds differ by 0.2 each: no spread, no test
    assert better.difference.mean == pytest.approx(0.2) and better.p is None
    other = found.cells["D", "digit"]
    assert other.difference.mean == pytest.approx(0.21)
    assert other.difference.low < 0.21 < other.difference.high
    assert other.difference.p < other.p == pytest.approx(2 * other.difference.p)
    assert found.cells["A", "digit"].difference is None


@pytest.mark.parametrize(
    ("words", "text"), [(["lr=7"], "no variant has it"), (["lr=1e-3"], "2 variants have it")]
)
def test_a_baseline_must_choose_one_variant(runs, words, text):
    with pytest.raises(ConfigError, match=text):
        compared(runs, baseline=words)


def test_a_baseline_may_be_named_by_its_letter(runs):
    assert compared(runs, baseline=["C"]).baseline.label == "C"


def test_with_one_seed_many_prompts_give_the_interval(tmp_path):
    for i, backbone in enumerate(("dit", "unet3d")):
        run(tmp_path, backbone, 1e-3, 0, 0.5 * i, prompts=150)
    found = compared(tmp_path)
    cell = found.cells["B", "digit"]
    assert cell.here.of == "prompts" and cell.here.n == 150
    assert cell.difference.mean == pytest.approx(0.5)


def test_few_seeds_and_prompts_have_no_interval_and_it_is_said(tmp_path):
    for backbone in ("dit", "unet3d"):
        run(tmp_path, backbone, 1e-3, 0, 0.5, prompts=99)
    found = compared(tmp_path)
    assert not found.cells["A", "digit"].here.has_interval
    assert any("3 seeds" in note for note in found.notes)


# --- what is refused ------------------------------------------------------------------------------


def test_numbers_of_different_protocols_are_not_mixed(tmp_path):
    run(tmp_path, "dit", 1e-3, 0, 0.5)
    run(tmp_path, "unet3d", 1e-3, 0, 0.5, protocol=PROTOCOL | {"clips": 64})
    found = compared(tmp_path)
    assert found.metrics == ["loss"]
    assert any("digit is not compared" in n and "clips 8 and 64" in n for n in found.notes)
    with pytest.raises(ConfigError, match="different protocols"):
        compared(tmp_path, metrics=["digit"])


def test_scores_on_other_held_out_clips_are_not_mixed(tmp_path):
    """As of data.root=curated,raw: everything that a protocol says is the same."""
    judged = PROTOCOL | {"split": "val"}
    folders = [run(tmp_path, "dit", 1e-3, 0, 0.5, protocol=judged, data={"root": r}) for r in "abc"]

    def told(hashes: str) -> list[str]:
        for folder, ids in zip(folders, hashes, strict=True):
            data = {"train": {"clips": 9, "ids": ids}, "val": {"clips": 8, "ids": ids}}
            facts = {"data": data} if ids != "?" else {}
            (folder / "environment.json").write_text(json.dumps(facts))
        found = compared(tmp_path)
        assert found.columns == ["data.root"]
        assert any("Clips depend on data.root" in note for note in found.notes)
        return found.metrics

    assert told("xyx") == told("?xy") == ["loss"]
    assert told("xxx") == told("x?x") == ["digit", "loss"]


def evaluation(folder: Path, number: int, score: float, protocol: dict) -> None:
    """What task=evaluate leaves in a run folder."""
    (folder / "evaluations").mkdir(exist_ok=True)
    found = {"scores": {"model": {"frechet_image": score, "digit": 0.0}}, "clips": 8,
             "meaning": {"frechet_image": "distance"},
             "protocols": {"frechet_image": protocol, "digit": {}}}  # fmt: skip
    (folder / "evaluations" / f"evaluation-{number:02}.json").write_text(json.dumps(found))


def test_scores_that_were_asked_later_stand_beside_those_of_the_run(tmp_path):
    """The newest evaluation of a name counts; what the run has measured stays as it is."""
    for backbone in ("dit", "unet3d"):
        folder = run(tmp_path, backbone, 1e-3, 0, 0.5)
        evaluation(folder, 9, 70.0, PROTOCOL | {"clips": 64})
        evaluation(folder, 10, 30.0, PROTOCOL)
    found = compared(tmp_path)
    assert found.metrics == ["digit", "frechet_image", "loss"]
    assert found.cells["A", "frechet_image"].here.mean == 30.0
    assert found.cells["A", "digit"].here.mean == 0.5
    assert found.protocols["frechet_image"]["clips"] == "8"
    evaluation(folder, 11, 20.0, PROTOCOL | {"weights": "live"})
    notes = compared(tmp_path).notes
    assert any("frechet_image is not compared" in n and '"ema" and "live"' in n for n in notes)


def test_later_scores_keep_the_order_of_their_file(tmp_path):
    names = [f"score {i}" for i in range(9)]
    folder = run(tmp_path, "dit", 1e-3, 0, 0.5)
    (folder / "evaluations").mkdir()
    scores = {"scores": {"model": dict.fromkeys(names, 0.5)}}
    (folder / "evaluations" / "evaluation-01.json").write_text(json.dumps(scores))
    assert [*read(tmp_path).entries[0].values] == ["digit", *names, "loss"]


def test_a_number_without_a_protocol_is_not_mixed_with_one_that_has_one(tmp_path):
    run(tmp_path, "dit", 1e-3, 0, 0.5)
    run(tmp_path, "unet3d", 1e-3, 0, 0.5, protocol={})
    assert any("recorded and not recorded" in note for note in compared(tmp_path).notes)


def test_a_number_that_is_not_there_is_refused_by_name(runs):
    with pytest.raises(ConfigError, match="no run has it; want one of digit, loss"):
        compared(runs, metrics=["colour"])


def test_runs_without_a_common_number_are_refused_with_what_to_name(runs):
    found = read(runs)
    found.entries[0].values.clear()
    with pytest.raises(
        ConfigError, match="no metric in common; want the folder of a multirun"
    ) as e:
        compare(found)
    assert e.value.args[1].startswith("digit is not compared")
    with pytest.raises(ConfigError, match="colour: no run has it; want one of digit, loss"):
        compare(found, metrics=["colour"])


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no finished run"):
        read(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        read(tmp_path / "absent")
    with pytest.raises(ConfigError, match="this is one run"):
        read(run(tmp_path, "dit", 1e-3, 0, 0.5))


def test_runs_that_are_not_finished_are_named(runs):
    left = run(runs, "dit", 1e-3, 7, 0.5, finished=False)
    assert any(left.name in note for note in compared(runs).notes)


def test_the_jobs_of_a_multirun_are_found_also_where_the_folder_was_moved(tmp_path):
    sweep = tmp_path / "out" / "sweeps" / "now"
    sweep.mkdir(parents=True)
    for i in range(2):
        folder = run(tmp_path / "out", "dit", 1e-3 * (i + 1), 0, 0.5)
        job = {"number": i, "exit_code": 0, "result": {"folder": f"elsewhere/{folder.name}"}}
        (sweep / f"job-{i}.json").write_text(json.dumps(job))
    failed = {"number": 2, "exit_code": 4, "overrides": "lr=9", "error": "step 2: loss=nan"}
    (sweep / "job-2.json").write_text(json.dumps(failed))
    found = read(sweep)
    assert len(found.entries) == 2
    assert found.left_out == ["job 2 (lr=9) failed: step 2: loss=nan"]


def test_operations_are_those_that_a_plan_counted_for_such_a_run(runs):
    folder = next(e.folder for e in read(runs).entries if "dit" in e.settings["backbone.plugin"])
    plan = runs / "plans" / "default-0" / "plan.json"
    plan.parent.mkdir(parents=True)
    work = identity_of_work(Run(folder).config())
    plan.write_text(json.dumps({"work": work, "flops_per_step": 10**9}))
    flops = {
        e.settings["backbone.plugin"]: e.costs.get("flops_per_step") for e in read(runs).entries
    }
    assert flops == {'"backbone/dit"': 1e9, '"backbone/unet3d"': None}


# --- what is written ------------------------------------------------------------------------------


def test_the_same_folder_gives_the_same_bytes(runs):
    written = []
    for name in ("one", "two"):
        write_ablation(runs.parent / name, compared(runs))
        files = sorted((runs.parent / name).iterdir())
        written.append({p.name: p.read_bytes() for p in files})
    assert written[0].keys() == {
        "curves.pdf", "curves.svg", "intervals.pdf", "intervals.svg", "report.html",
        "report.json", "report.md", "report.tex", "samples.png",
    }  # fmt: skip
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("steps", "label"),
    [
        ({"dit": (1, 2), "unet3d": (1, 2)}, "step (seeds of A, B share none)"),
        ({"dit": (1, 1), "unet3d": (1, 2)}, "step (seeds of B share none)"),
        ({"dit": (1, 1), "unet3d": (2, 2)}, "step"),
        ({"dit": (), "unet3d": ()}, None),
    ],
)
def test_variants_whose_seeds_share_no_steps_are_named_in_the_panel(tmp_path, steps, label):
    for backbone, first in steps.items():
        for seed in range(2):
            folder = run(tmp_path, backbone, 1e-3, seed, 0.5)
            rows = [{"step": first[seed] + 2 * i, "loss": 0.1} for i in range(3 if first else 0)]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "metrics.jsonl").write_text(text)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw_curves(tmp_path / "curves", compared(tmp_path))
    svg = tmp_path / "curves.svg"
    assert svg.is_file() == (label is not None)
    assert label is None or f">{label}</text>" in svg.read_text()


def test_the_page_needs_nothing_else_and_names_no_path(runs):
    page = write_ablation(runs / "report", compared(runs)).read_text()
    assert "<script" not in page and "default-src 'none'" in page
    assert page.count("data:image/svg+xml;base64,") == 2
    assert page.count("data:image/png;base64,") == 4  # one sample of each variant
    assert str(runs) not in page


def test_markdown_and_latex_have_every_variant_with_its_interval(runs):
    found = compared(runs)
    write_ablation(runs / "report", found)
    text, paper = ((runs / "report" / name).read_text() for name in ("report.md", "report.tex"))
    assert text.count("| unet3d ") >= 4 and "0.330 [0.255, 0.405]" in text
    assert paper.count("\\midrule") == 1 and paper.count("& unet3d &") == 2
    assert "{\\scriptsize [0.255, 0.405]}" in paper and "95 \\% interval" in paper


# --- where it is sent -----------------------------------------------------------------------------

SHELF = '''
from dataclasses import dataclass
from pathlib import Path
from sandbox.contracts import PluginConfig
from sandbox.registry import register

@register("logger", "shelf")
class Shelf:
    """Writes down what a report is sent as; a page of `reach` bytes is too far."""

    @dataclass
    class Config(PluginConfig):
        to: str = ""
        reach: int = 10_000_000

    def __init__(self, cfg):
        self.cfg, self.said = cfg, []

    def start(self, folder, config, name, group, sweep=None):
        self.said.append(f"start {name} {group} {sweep}")

    def images(self, step, name, paths, captions=()):
        self.said.append(f"images {name}")

    def page(self, name, path):
        if path.stat().st_size > self.cfg.reach:
            raise OSError("no route to the shelf")
        self.said.append(f"page {name}")

    def table(self, name, rows):
        self.said.append(f"table {name} {len(rows)}")

    def finish(self, exit_code):
        Path(self.cfg.to).write_text("\\n".join([*self.said, f"finish {exit_code}"]))
'''


@pytest.fixture
def shelf(plugin_folder, runs) -> Path:
    (plugin_folder / "logger").mkdir()
    (plugin_folder / "logger" / "shelf.py").write_text(SHELF)
    return runs.parent / "shelf.txt"


def sent(runs: Path, shelf: Path, *words: str) -> int:
    placed = (f"runs={runs}", f"task.to={runs}/page", f"logger.to={shelf}")
    return _main(["task=report", "task.send=true", "logger=shelf", *placed, *words])


def test_a_report_is_sent_with_its_samples_and_tables_to_the_sweep_of_its_runs(shelf, runs):
    for folder in runs.glob("run-*"):
        (folder / "environment.json").write_text(json.dumps({"sweep": "abc"}))
    assert sent(runs, shelf) == 0
    said = shelf.read_text().splitlines()
    assert said[:3] == [f"start report {runs.name} abc", "images samples", "page report"]
    assert said[-1] == "finish 0" and any(s.startswith("table ") for s in said)


def test_a_report_that_cannot_be_sent_is_kept_and_says_so(shelf, runs):
    kept = rf"no route to the shelf\); it is kept in {runs}/page"
    with pytest.raises(StorageError, match=kept):
        sent(runs, shelf, "logger.reach=10")
    assert (runs / "page" / "report.html").is_file()
    assert shelf.read_text().endswith("finish 1")
