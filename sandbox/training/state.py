"""The state of a training run: everything that changes in it, checkpoints, metrics, validation.

`training.loop` has the loop. A run continues from `Training.state()` bit for bit: noise, timesteps,
dropping, sample order and augmentation are keyed by position (`data.randomness`), module dropout is
re-seeded for every micro-batch, and nothing else is random.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from torch import Tensor

from sandbox.config import registry
from sandbox.config.root import Root
from sandbox.contracts import (
    Diverged,
    Preempted,
    SamplerConfig,
    SandboxError,
    Snapshot,
)
from sandbox.data.loader import Loader
from sandbox.distributed.rank import Rank
from sandbox.evaluation.evaluate import first_clips, fps_of, generate
from sandbox.evaluation.prompts import data_batch
from sandbox.model.cached_latents import CachedLatents
from sandbox.model.ema import EMA, replaced
from sandbox.model.latent_diffusion import LatentDiffusion
from sandbox.model.roles import DISCRIMINATOR
from sandbox.model.sharding import full_tensors, is_sharded, load_optimizer
from sandbox.model.trainable import Trainable, without_method
from sandbox.reports import media
from sandbox.reports.sample_files import FPS, write_clips
from sandbox.runs.run import Run
from sandbox.storage import checkpoint, weight_files
from sandbox.storage.background import BackgroundWriter, copied_state
from sandbox.storage.snapshots import write_snapshot
from sandbox.training.image_rows import image_rows
from sandbox.training.tracking import MetricBuffer, Trackers, suspects
from sandbox.training.validation import losses_at_times, training_losses

log = logging.getLogger(__name__)


@dataclass
class Training:
    """A system and everything that changes in training. `step` counts finished optimizer steps.

    `just_stepped`: whether the last micro-batch completed one; `skipped`: bad steps with their
    samples; `scaler`: state of the fp16 loss scaler; `processes`: the `trainer` plugin.

    Each rank has one, in the same state. Methods that compute are collective, as weights may be
    sharded; only the first rank writes files.
    """

    system: Any  # a Trainable
    root: Root
    loader: Loader
    run: Run
    rank: Rank
    trackers: Trackers
    ema: EMA | None
    optimizer: torch.optim.Optimizer
    callbacks: dict[str, Callback]
    processes: Any
    step: int = 0
    just_stepped: bool = False
    skipped: list[dict[str, Any]] = field(default_factory=list)
    scaler: dict[str, Any] = field(default_factory=dict)
    unusable: dict[str, str] = field(default_factory=dict)  # items of all ranks, when last saved
    latest: dict[str, float] = field(default_factory=dict)  # metrics of the last flushed step
    measured: tuple[int, dict[str, float]] = (0, {})  # step and metrics of the last validation
    buffer: MetricBuffer = field(default_factory=MetricBuffer)
    writer: BackgroundWriter = field(default_factory=BackgroundWriter)

    @property
    def steps(self) -> int:
        """Optimizer steps of the full run."""
        return self.root.steps or 0

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank.index == 0

    # checkpoints

    def state(self) -> dict[str, Any]:
        """What a checkpoint contains: plain containers and full tensors, the same on all ranks."""
        loader = self.loader.state_dict()
        updates = {name: update.state_dict() for name, update in self.system.updates.items()}
        weights = full_tensors(self.system.trainable_state())
        averages = full_tensors(self.optimizer_averages())
        bad = {k: v for part in self.rank.gather_plain(loader["bad"]) for k, v in part.items()}
        self.unusable = bad
        return {
            "step": self.step,
            "weights": weights | averages,
            # gradients are taken at these, where the optimizer averages weights
            **(
                {"training_weights": {name: weights[name] for name in averages}} if averages else {}
            ),
            "ema": self.ema.state_dict() if self.ema else None,
            "optimizer": self.processes.optimizer_state(self.optimizer),
            "opponent": updates.pop(DISCRIMINATOR, None),
            **({"networks": updates} if updates else {}),
            "loader": loader | {"bad": bad},
            "callbacks": {name: c.state_dict() for name, c in self.callbacks.items()},
            "scaler": self.scaler,
            "skipped": self.skipped,
            "frozen": self.system.frozen_hashes(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Loads `state`, before training starts."""
        self.system.check_frozen(state["frozen"])
        self.step = state["step"]
        self._load_weights(state)
        if averaged := state.get("training_weights"):
            self.system.load_trainable(state["weights"] | averaged)
        load_optimizer(self.optimizer, state["optimizer"])
        networks = state.get("networks", {}) | {DISCRIMINATOR: state["opponent"]}
        for name, update in self.system.updates.items():
            update.load_state_dict(networks[name])
        self.loader.load_state_dict(state["loader"])
        for name, callback in self.callbacks.items():
            callback.load_state_dict(state["callbacks"].get(name, {}))
        self.scaler, self.skipped = state["scaler"], state["skipped"]

    def _load_weights(self, state: dict[str, Any]) -> None:
        self.system.load_trainable(state["weights"])
        self.ema = self.system.ema = EMA.of(self.system, registry.create(self.root.ema))
        if self.ema and state["ema"]:  # an EMA may be new in a resumed run
            self.ema.load_state_dict(state["ema"])

    def save(self, wait: bool = True) -> None:
        """Writes a checkpoint, after the metrics: a resumed run does not repeat their steps.

        `wait=False` returns after a copy of the state; `check_saved` raises the error of its write.
        """
        self.flush()
        state = self.state()
        if not self.is_first:
            return
        notes = self.measured[1] if self.measured[0] == self.step else {}
        # The write before ends first: of two copies one would be too much memory.
        self.writer.wait()
        state = state if wait else copied_state(state)
        self.writer.start(partial(self._write, state, self.step, notes))
        if wait:
            self.writer.wait()

    def _write(self, state: dict[str, Any], step: int, notes: dict[str, float]) -> None:
        """Runs in the writer's thread."""
        try:
            policy = self.root.checkpoint
            checkpoint.save_and_prune(self.run.checkpoints, state, step, policy, notes)
        except Diverged as e:
            raise Diverged(f"step {step}: {e}; lower lr={self.root.lr}") from e

    def check_saved(self) -> None:
        """Raises the error of the last checkpoint's write, if it has ended."""
        self.writer.check()

    def finish_writing(self, error: BaseException) -> BaseException:
        """Completes the checkpoint that is being written; returns the error to end the run with.

        Weights that diverged at the step of the checkpoint come before what followed from them.
        """
        if isinstance(error, KeyboardInterrupt):  # stops at once
            return error
        try:
            self.writer.wait()
        except (SandboxError, OSError) as e:
            if isinstance(e, Diverged) and isinstance(error, Diverged):
                return e
            log.warning("%s", e)
        return error

    def save_weights(self, folder: Path) -> None:
        """Writes the weights alone, live and EMA."""
        with self.live_weights():
            self._save_weights(folder / weight_files.LIVE)
        if self.ema:
            with self.ema_weights():
                self._save_weights(folder / weight_files.AVERAGED)

    def save_snapshot(self) -> None:
        """Writes all averages of the EMA, for task=ema."""
        assert self.ema is not None  # its plugin requests it
        state = self.ema.state_dict()
        averages = {registry.create(self.root.ema).name: state["average"]} | state.get("others", {})
        for name, average in averages.items() if self.is_first else ():
            write_snapshot(self.run.folder, self.step, Snapshot(name, state["updates"]), average)

    def _save_weights(self, path: Path) -> None:
        state = full_tensors(without_method(self.system.trainable_state()))
        if self.is_first:
            weight_files.write(state, path, self.system.first_stage_hash(), hashed=True)

    def unshard(self, build: Callable[[], Trainable]) -> None:
        """After training: the first rank continues alone, with an unsharded system from `build`."""
        if not self.root.trainer.shards:
            return
        if self.rank.world == 1 and not any(map(is_sharded, self.system.parameters())):
            return
        state = self.state()
        if self.is_first:
            self.system = build().to(self.system.device)
            self._load_weights(state)

    def check_stop(self) -> None:
        """Raises Preempted at a stop request, in long work after the last step."""
        if self.rank.stop_signal:
            raise Preempted(
                f"stopped by {self.rank.stop_signal} after the last step; all weights are saved in "
                f"{self.run.folder}, and the same command finishes the run"
            )

    # metrics

    def flush(self) -> None:
        """Writes the buffered metrics; raises Diverged at the first step that is not finite."""
        good: list[tuple[int, dict[str, float]]] = []
        step, wrong, samples = 0, "", ""
        for step, metrics, trained_on in self.buffer.flush(self.rank.mean):
            if "skipped" not in metrics and (wrong := self._not_finite(metrics)):
                samples = suspects(trained_on, self.rank)
                break
            good.append((step, {k: v for k, v in metrics.items() if math.isfinite(v)}))
        if good:
            self._record(good)
            self.latest = good[-1][1]
        if wrong:
            raise Diverged(
                f"step {step}: {wrong} is not finite; {samples}; lower lr={self.root.lr}, or look "
                "at these samples"
            )

    def _record(self, rows: list[tuple[int, dict[str, float]]]) -> None:
        if self.is_first:
            self.trackers.metrics(rows)

    def _not_finite(self, metrics: dict[str, float]) -> str:
        """Metrics that are not finite; under fp16 not the gradient alone, which is skipped."""
        ignored = "grad_norm" if self.root.precision == "fp16" else ""
        found = {k: v for k, v in metrics.items() if not math.isfinite(v)}
        return ", ".join(f"{k}={v}" for k, v in found.items()) if found.keys() - {ignored} else ""

    # for callbacks

    def sample(self, prompts: Sequence[str], count: int) -> None:
        """Writes videos and a sheet of `prompts`, or of the data's first `count` captions.

        Images for the conditioning come from validation clips. task=sample makes the same clips.
        """
        self.flush()
        batch = data_batch(self.root, prompts, count)
        with self.ema_weights(), self.eval_mode():
            video = generate(self.system, batch)
        if not self.is_first:
            return
        captions = batch.captions or []
        folder = self.run.samples / f"step_{self.step:08}"
        val = registry.create(self.root.data).split("val")
        fps = fps_of(first_clips(val, 1, self.root.seed)) or FPS  # of the first validation clip
        paths = write_clips(folder, captions, video, fps, batch.image)
        self.trackers.images(self.step, "samples", paths[-1:])
        for caption, path in zip(captions, paths[:-1][:4], strict=False):
            self.trackers.video(self.step, f"samples/{path.stem}", path, caption)

    def show(self, rows: Sequence[str], count: int, chain: SamplerConfig | None = None) -> None:
        """Writes sheets of the image `rows`; "samples" are those of `sample`.

        `chain` is the sampler of the progressive row. For a first stage: reconstructions of
        held-out clips.
        """
        if not isinstance(self.system, LatentDiffusion):
            rows = ("reconstruction",)
        if "samples" in rows:
            self.sample((), count)
        self.flush()
        with self.ema_weights(), self.eval_mode():
            found = image_rows(self.system, rows, count, chain)
        for name, columns in found.items() if self.is_first else ():
            path = self.run.samples / f"step_{self.step:08}" / f"{name}.png"
            if name == "reconstruction":
                media.reconstruction_sheet(path, [*columns["input"]], [*columns[name]])
            else:
                clips = zip(*columns.values(), strict=True)
                sheet = [("", dict(zip(columns, row, strict=True))) for row in clips]
                media.contact_sheet(path, sheet)
            self.trackers.images(self.step, name, [path])

    def validate(self, count: int, times: int = 0) -> None:
        """Losses on `count` held-out clips, of live and EMA weights, with the same noise each time.

        val/ and the names that the loss logs are of training's times; val_times/ are at `times`
        equidistant times, none if 0. EMA weights add "_ema".
        """
        self.flush()
        val = registry.create(self.root.data).split("val")
        with self.live_weights():
            found = self._losses(val, count, times)
        if self.ema:
            with self.ema_weights():
                found |= {f"{k}_ema": value for k, value in self._losses(val, count, times).items()}
        self.measured = self.step, found
        self._record([(self.step, found)])

    def _losses(self, items: Any, count: int, times: int) -> dict[str, float]:
        with self.eval_mode():
            losses = training_losses(self.system, items, count)
            at_times = losses_at_times(self.system, items, count, times) if times else {}
        return {f"val/{name}": value for name, value in losses.items()} | at_times

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """Eval mode inside the block; afterwards frees a first stage that was loaded for pixels."""
        was = self.system.training
        self.system.eval()
        yield
        self.system.train(was)
        if isinstance(stage := getattr(self.system, "first_stage", None), CachedLatents):
            stage.release()

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """The system has the EMA weights inside the block, else its `live_weights`."""
        with self.ema.applied() if self.ema else self.live_weights():
            yield

    @contextmanager
    def live_weights(self) -> Iterator[None]:
        """The system has the averages of the optimizer inside the block, if it has some."""
        averages = self.optimizer_averages()
        live = {n: p for n, p in self.system.named_parameters() if n in averages}
        with replaced(live, averages) if averages else nullcontext():
            yield

    def optimizer_averages(self) -> dict[str, Tensor]:
        """The averages of an optimizer that has them, by the names of the system's parameters.

        Empty for a system that `unshard` has rebuilt: it has the averages as its weights.
        """
        if not self.root.optimizer.averages:
            return {}
        names = {id(p): name for name, p in self.system.named_parameters()}
        averages = self.optimizer.averages()  # type: ignore[attr-defined]
        return {names[id(p)]: average for p, average in averages if id(p) in names}
