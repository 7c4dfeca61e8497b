"""What a finished run leaves: weights, scores, videos, a sheet, a page; the result file last."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandbox.config import registry
from sandbox.config.root import Root, to_container
from sandbox.config.secrets import mask_text
from sandbox.contracts import Clip, ConfigError, PluginConfig
from sandbox.evaluation.evaluate import Evaluation, evaluate
from sandbox.model.latent_diffusion import LatentDiffusion
from sandbox.reports import media
from sandbox.reports.run_page import Report, ScoreRow, read_curves, terminal_table, write_report
from sandbox.runs.protocol import cost, protocols
from sandbox.runs.run import Run
from sandbox.storage import weight_files
from sandbox.storage.atomic import storing, write_atomic

if TYPE_CHECKING:
    from sandbox.training.state import Training
from sandbox.reports.sample_files import FPS, write_clips

BY_CLIP = "scores_by_clip.json"  # of the model
UNTOLD = "This model is told no captions: its scores against captions are those of chance."
SHEET_COLUMNS = ("real clips", "model", "untrained model")
STORED_COLUMNS = ("real through first stage", "model", "untrained model")


def finish_run(
    training: Training, cfg: Any, overrides: list[str], seconds: dict[str, float]
) -> dict[str, Any]:
    """Exports weights, scores the averaged ones, writes everything, marks the run as finished.

    All of it comes from what the last checkpoint holds, so that it can be done again after a kill.
    """
    system, run, root = training.system, training.run, training.root
    assert isinstance(system, LatentDiffusion)
    began = time.monotonic()
    origin = system.made_with()
    weight_files.write(system.trainable_state(), run.folder / weight_files.LIVE, origin)
    with training.averaged():
        if training.ema:
            path = run.folder / weight_files.AVERAGED
            weight_files.write(system.trainable_state(), path, origin)
        if system.adapter is not None:
            name, weights, header = system.adapter.exported(system.backbone)
            weight_files.write(weights, run.folder / name, header)
        found = evaluate(system.eval(), cfg.score_clips, cfg.untrained, training.leave_if_asked)
    seconds["scoring"] = time.monotonic() - began
    picked = spread(found.captions, cfg.samples)
    if not root.conditioning.needs() & {"captions", "text"}:
        found.captions = [""] * found.count  # those of real clips, which nobody told the model
    captions = [found.captions[i] for i in picked]
    made, fps = found.clips["model"][picked], found.fps or FPS
    paths = write_clips(run.samples, captions, made, fps) if picked else []
    shown = list(zip(captions, paths, strict=False))
    sheet = run.folder / "samples.png"
    write_sheet(sheet, found, picked or [0])
    weights = "ema" if training.ema else "live"
    clip = Clip(*found.clips["model"].shape[1:])
    metrics = {
        "overrides": [mask_text(o) for o in overrides],
        "scores": found.scores,
        "meaning": found.meaning,
        "clips": found.count,
        "first_stage_psnr_db": found.first_stage_psnr,
        "seconds": {k: round(v, 1) for k, v in seconds.items()},
        "steps": training.step,
        "skipped": training.loader.bad,
        "skipped_steps": training.skipped,
        "protocols": protocols(root, clip, found.count, weights, [*found.meaning]),
        "cost": cost(system, seconds),
    }
    with storing(run.folder):
        if found.each:
            each = {"captions": found.captions, "scores": found.each}
            write_atomic(run.folder / BY_CLIP, json.dumps(each) + "\n")
        write_atomic(run.folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    bad = training.loader.bad
    page = write_report(run.folder, report(root, run, found, overrides, seconds, bad, sheet, shown))
    scores = found.scores.get("model", {})
    loss = final_loss(run)
    objective = {**scores, "loss": loss}.get(cfg.objective or next(iter(found.meaning), "loss"))
    training.trackers.summary({f"score/{k}": v for k, v in scores.items()})
    for caption, path in shown[:4]:
        training.trackers.video(training.step, f"samples/{path.stem}", path, caption)
    result = {
        "folder": str(run.folder),
        "steps": training.step,
        "scores": scores,
        "loss": loss,
        "objective": objective,
    }
    run.finish(result)
    say_scores(root, found)
    where = f"videos  {run.samples}\nsheet   {sheet}\npage    {page}"
    print(f"{where}\nscores  {run.folder / 'metrics.json'}", flush=True)
    return result


def final_loss(run: Run) -> float:
    """Mean loss over the last tenth of the steps."""
    losses = [m["loss"] for m in run.metrics().values() if "loss" in m]
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last) if last else float("nan")


def check_objective(root: Root, name: str | None) -> None:
    """Raises ConfigError for an objective that no run of this configuration has."""
    scores = registry.create(root.metric).meaning() if root.metric is not None else {}
    if name is not None and name not in (*scores, "loss"):
        raise ConfigError(f"task.objective={name!r}: want one of {[*scores, 'loss']}")


def spread(captions: list[str], count: int) -> list[int]:
    """Places of at most `count` clips with different captions, spread evenly over them."""
    first = sorted({caption: i for i, caption in reversed([*enumerate(captions)])}.values())
    places = first if len(first) > 1 else list(range(len(captions)))
    count = min(count, len(places))
    return [places[i * len(places) // count] for i in range(count)]


def write_sheet(path: Path, found: Evaluation, places: list[int]) -> None:
    """Real clips, the model's and an untrained model's side by side, a caption a row."""
    wanted = SHEET_COLUMNS if "real clips" in found.clips else STORED_COLUMNS
    columns = [c for c in wanted if c in found.clips]
    rows = [
        media.SheetRow(found.captions[i], {c: found.clips[c][i] for c in columns}) for i in places
    ]
    media.contact_sheet(path, rows)


def report(
    root: Root, run: Run, found: Evaluation, overrides: list[str], seconds: dict[str, float],
    skipped: dict[str, str], sheet: Path, samples: list[tuple[str, Path]],
) -> Report:  # fmt: skip
    """The page's contents."""
    reached = found.first_stage_psnr
    notes = ["Training was on stored latents: real clips are shown through the first stage."]
    if reached is not None:
        notes = [
            f"The first stage reaches {reached:.1f} dB on held-out clips: "
            "no sample can look better."
        ]
    if found.scores and _scores_untold(root):
        notes.append(UNTOLD)
    told = f"told by {_name(root.conditioning)}" if root.conditioning.needs() else "told nothing"
    return Report(
        title=root.recipe,
        summary=f"{_name(root.backbone)} on latents of {_name(root.vae)}, {told}, trained with "
        f"{_name(root.schedule)} on {_name(root.data)}",
        command=" ".join(["python run.py", *overrides]),
        facts={
            "seed": root.seed,
            "steps": root.steps,
            "lr": root.lr,
            "batch": root.data.batch_size,
            "precision": root.precision,
            "time": f"{sum(seconds.values()):.0f} s",
        },
        settings=to_container(root),
        scores=[ScoreRow(name, values, found.count) for name, values in found.scores.items()],
        meanings=found.meaning,
        rates=found.rates,
        samples=[(caption, path.resolve()) for caption, path in samples],
        sheet=sheet.resolve(),
        curves={**read_curves(run.metrics_file)},
        notes=notes,
        environment=json.loads(run.environment.read_text()),
        skipped=skipped,
        timings=seconds,
    )


def _scores_untold(root: Root) -> bool:
    """Whether a score compares clips with captions that the model is never told."""
    told = root.conditioning.needs() & {"captions", "text"}
    return not told and root.metric is not None and "captions" in root.metric.needs()


def _name(cfg: PluginConfig) -> str:
    return cfg.plugin.rpartition("/")[2]


def say_scores(root: Root, found: Evaluation) -> None:
    """The score table with what each score means, on the terminal."""
    if found.scores:
        rows = [ScoreRow(name, values, found.count) for name, values in found.scores.items()]
        print("\n" + terminal_table(rows, found.meaning, found.rates) + "\n")
        if _scores_untold(root):
            print(UNTOLD + "\n")
    if found.first_stage_psnr is not None:
        print(f"first stage {_name(root.vae)}: {found.first_stage_psnr:.1f} dB on held-out clips")
