"""Finishes a run: weights, scores, samples, a page, and the result file last."""

import json
import time
from pathlib import Path
from typing import Any

from sandbox.config import registry
from sandbox.config.root import Root, to_container
from sandbox.config.secrets import mask_text
from sandbox.contracts import Clip, ConfigError, PluginConfig
from sandbox.data.batching import summary
from sandbox.evaluation.evaluate import Evaluation, evaluate
from sandbox.reports import media
from sandbox.reports.run_page import Report, read_curves, write_report
from sandbox.reports.sample_files import FPS, write_clips
from sandbox.reports.scores import ScoreRow, terminal_table
from sandbox.runs import records
from sandbox.runs.protocol import cost, protocols
from sandbox.runs.run import Run
from sandbox.storage import weight_files
from sandbox.training.state import Training
from sandbox.training.validation import MEAN, final_means, protocol_at_times

BY_CLIP = "scores_by_clip.json"  # of the model
UNCONDITIONED = (
    "This model is not conditioned on captions: its scores against captions are chance level."
)
SHEET_COLUMNS = ("real clips", "model", "untrained model")
CACHED_COLUMNS = ("real through first stage", "model", "untrained model")


def finish_run(
    training: Training, cfg: Any, overrides: list[str], seconds: dict[str, float]
) -> dict[str, Any]:
    """Exports weights, scores the EMA weights, writes all files and marks the run as finished.

    It needs only what the last checkpoint has, so that it can be repeated after a kill.
    """
    system, run, root = training.system, training.run, training.root
    began = time.monotonic()
    found = _export_and_evaluate(training, cfg)
    seconds["scoring"] = time.monotonic() - began
    picked = spread(found.captions, cfg.samples)
    if not _is_conditioned_on_captions(root):
        found.captions = [""] * found.count  # they are those of real clips
    captions = [found.captions[i] for i in picked]
    made, fps = found.clips["model"][picked], found.fps or FPS
    paths = write_clips(run.samples, captions, made, fps) if picked else []
    samples = list(zip(captions, paths, strict=False))
    sheet = run.folder / "samples.png"
    write_sheet(sheet, found, picked or [0])
    weights = "ema" if training.ema else "live"
    bad = found.skipped | training.unusable | training.loader.bad
    clip = Clip(*found.clips["model"].shape[1:])
    own = protocols(root, clip, found.count, weights, [*found.meaning])
    metrics = {
        "overrides": [mask_text(o) for o in overrides],
        "scores": found.scores,
        "meaning": found.meaning,
        "clips": found.count,
        "first_stage_psnr_db": found.first_stage_psnr,
        "seconds": {k: round(v, 1) for k, v in seconds.items()},
        "steps": training.step,
        "skipped": bad,
        "skipped_steps": training.skipped,
        "protocols": own | _at_times(training, own),
        **({"val_times": means} if (means := final_means(run)) else {}),
        "cost": cost(system, seconds),
    }
    if found.each:
        each = {"captions": found.captions, "scores": found.each}
        records.write(run.folder, BY_CLIP, json.dumps(each) + "\n")
    records.write_dict(run.folder, "metrics.json", metrics)
    page = write_report(
        run.folder, report(root, run, found, overrides, seconds, bad, sheet, samples)
    )
    scores = found.scores.get("model", {})
    training.trackers.summary({f"score/{k}": v for k, v in scores.items()})
    for caption, path in samples[:4]:
        training.trackers.video(training.step, f"samples/{path.stem}", path, caption)
    loss = final_loss(run)
    objective = {**scores, "loss": loss}.get(cfg.objective or next(iter(found.meaning), "loss"))
    result = {"folder": str(run.folder), "steps": training.step, "scores": scores, "loss": loss,
              "objective": objective}  # fmt: skip
    run.finish(result)
    print_scores(root, found)
    print(f"videos  {run.samples}\nsheet   {sheet}\npage    {page}")
    print(f"scores  {run.folder / 'metrics.json'}", flush=True)
    if bad:
        listed = f'all are in {run.folder / "metrics.json"}, under "skipped"'
        print(f"data    {summary(bad)}; {listed}", flush=True)
    return result


def _at_times(training: Training, own: dict[str, Any]) -> dict[str, Any]:
    """Protocols of the mean losses at fixed times, where a callback measures them."""
    cfg = training.root.callbacks.get("val_loss")
    if cfg is None or not cfg.metrics():
        return {}
    data, latents = own["first_stage_psnr_db"], own["loss"]["latents"]
    at_times = protocol_at_times(training.system, cfg.clips, cfg.times)
    shared = {**data, **at_times, "latents": latents}
    found = {MEAN: shared | {"weights": "live"}}
    return found | {f"{MEAN}_ema": shared | {"weights": "ema"}} if training.ema else found


def _export_and_evaluate(training: Training, cfg: Any) -> Evaluation:
    """Writes the weight files, and scores the EMA weights where there are some."""
    system, folder = training.system, training.run.folder
    training.save_weights(folder)
    with training.ema_weights():
        if system.adapter is not None:
            name, weights, header = system.adapter.exported(system.backbone)
            weight_files.write(weights, folder / name, header)
        return evaluate(
            system.eval(), cfg.score_clips, cfg.untrained, lambda *_: training.check_stop()
        )


def final_loss(run: Run) -> float:
    """Mean loss over the last tenth of the steps."""
    losses = [m["loss"] for m in run.metrics().values() if "loss" in m]
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last) if last else float("nan")


def check_objective(root: Root, name: str | None) -> None:
    """Raises ConfigError for an objective that runs of this configuration do not have."""
    scores = registry.create(root.metric).meaning() if root.metric is not None else {}
    if name is not None and name not in (*scores, "loss"):
        raise ConfigError(f"task.objective={name!r}: want one of {[*scores, 'loss']}")


def spread(captions: list[str], count: int) -> list[int]:
    """Indices of at most `count` clips, evenly spaced, with different captions if they differ."""
    first = sorted({caption: i for i, caption in reversed([*enumerate(captions)])}.values())
    places = first if len(first) > 1 else list(range(len(captions)))
    count = min(count, len(places))
    return [places[i * len(places) // count] for i in range(count)]


def write_sheet(path: Path, found: Evaluation, places: list[int]) -> None:
    """A contact sheet with a row per caption: real clips, the model, an untrained model."""
    wanted = SHEET_COLUMNS if "real clips" in found.clips else CACHED_COLUMNS
    columns = [c for c in wanted if c in found.clips]
    rows = [(found.captions[i], {c: found.clips[c][i] for c in columns}) for i in places]
    media.contact_sheet(path, rows)


def report(
    root: Root, run: Run, found: Evaluation, overrides: list[str], seconds: dict[str, float],
    skipped: dict[str, str], sheet: Path, samples: list[tuple[str, Path]],
) -> Report:  # fmt: skip
    """The contents of the run's page."""
    notes = ["Trained on cached latents: real clips are shown through the first stage."]
    if found.first_stage_psnr is not None:
        notes = [
            f"First-stage reconstruction: {found.first_stage_psnr:.1f} dB PSNR on held-out clips "
            "(an upper bound for samples)."
        ]
    if found.scores and _ignores_scored_captions(root):
        notes.append(UNCONDITIONED)
    is_conditional = bool(root.conditioning.needs())
    condition = f"conditioned on {_name(root.conditioning)}" if is_conditional else "unconditional"
    return Report(
        title=root.recipe,
        summary=f"{_name(root.backbone)} on {_name(root.vae)} latents, {condition}, trained with "
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
        scores=_score_rows(found),
        meanings=found.meaning,
        rates=found.rates,
        samples=[(caption, path.resolve()) for caption, path in samples],
        sheet=sheet.resolve(),
        curves={**read_curves(run.folder)},
        notes=notes,
        environment=run.read("environment.json"),
        skipped=skipped,
        timings=seconds,
    )


def _score_rows(found: Evaluation) -> list[ScoreRow]:
    return [ScoreRow(name, values, found.count) for name, values in found.scores.items()]


def _is_conditioned_on_captions(root: Root) -> bool:
    return bool(root.conditioning.needs() & {"captions", "text"})


def _ignores_scored_captions(root: Root) -> bool:
    """Whether a score compares clips with captions that the model is not conditioned on."""
    is_scored = root.metric is not None and "captions" in root.metric.needs()
    return is_scored and not _is_conditioned_on_captions(root)


def _name(cfg: PluginConfig) -> str:
    return cfg.plugin.rpartition("/")[2]


def print_scores(root: Root, found: Evaluation) -> None:
    """Prints the score table and the meaning of each score."""
    if found.scores:
        print("\n" + terminal_table(_score_rows(found), found.meaning, found.rates) + "\n")
        if _ignores_scored_captions(root):
            print(UNCONDITIONED + "\n")
    if found.first_stage_psnr is not None:
        print(f"first stage {_name(root.vae)}: {found.first_stage_psnr:.1f} dB on held-out clips")
