"""The training engine: all that changes in a run, what is kept of it, and where it begins.

`training.loop` is the loop. Everything that changes while a system trains is in `Training`, and a
run continues from `Training.state()` bit for bit: noise, timesteps, dropping, sample order and
augmentation are keyed by position (`data.randomness`), module dropout is re-seeded for every
micro-batch, and nothing else is random.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from lightning import Callback
from torch import Tensor

from sandbox.config import registry
from sandbox.config.param_groups import split_groups
from sandbox.config.root import Root, to_container
from sandbox.config.wiring import Wiring
from sandbox.contracts import ConfigError, Diverged, Preempted, SamplerConfig
from sandbox.data.loader import Loader, batches
from sandbox.data.randomness import Keyed
from sandbox.distributed.rank import Rank
from sandbox.evaluation.evaluate import fps_of, gather, generate
from sandbox.evaluation.prompts import of_data
from sandbox.model.autoencoding import through
from sandbox.model.cached_latents import StoredLatents
from sandbox.model.devices import device_of, use_threads
from sandbox.model.ema import EMA
from sandbox.model.latent_diffusion import LatentDiffusion
from sandbox.model.sharding import is_sharded, load_optimizer, whole
from sandbox.model.trainable import Trainable
from sandbox.reports import media
from sandbox.reports.sample_files import FPS, write_clips
from sandbox.runs.protocol import forget_peak
from sandbox.runs.run import Run
from sandbox.storage import checkpoint, weight_files
from sandbox.training.image_rows import looks
from sandbox.training.tracking import MetricBuffer, Trackers

NAMED = 8  # samples that an error names


@dataclass
class Training:
    """A system with all that changes while it trains. `step` counts finished optimizer steps.

    `just_stepped`: whether the last micro-batch ended one. `skipped`: bad steps that were left out,
    with their samples. `scaler`: that of fp16, as its state. `processes` is the `trainer` plugin.

    Each rank has one, in the same state. What computes is called on all ranks, as weights may be
    cut over them; the first rank alone writes.
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
    latest: dict[str, float] = field(default_factory=dict)  # metrics of the last flushed step
    measured: tuple[int, dict[str, float]] = (0, {})  # step and numbers of the last validation
    buffer: MetricBuffer = field(default_factory=MetricBuffer)
    waiting: dict[int, list[Seen]] = field(default_factory=dict)  # of the steps in the buffer

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.root.steps or 0

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank.index == 0

    # what a run continues from

    def state(self) -> dict[str, Any]:
        """Plain containers and whole tensors: what a checkpoint holds, the same on all ranks."""
        loader = self.loader.state_dict()
        bad = {k: v for part in self.rank.gather_plain(loader["bad"]) for k, v in part.items()}
        return {
            "step": self.step,
            "weights": whole(self.system.trainable_state()),
            "ema": self.ema.state_dict() if self.ema else None,
            "optimizer": self.processes.optimizer_state(self.optimizer),
            "opponent": self.system.opponent.state_dict() if self.system.opponent else None,
            "loader": loader | {"bad": bad},
            "callbacks": {name: c.state_dict() for name, c in self.callbacks.items()},
            "scaler": self.scaler,
            "skipped": self.skipped,
            "frozen": self.system.frozen_parts(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from `state`, before training starts."""
        self.system.check_frozen(state["frozen"])
        self.step = state["step"]
        self.system.load_trainable(state["weights"])
        self.ema = EMA.of(self.system, registry.create(self.root.ema))
        if self.ema and state["ema"]:  # a run continued with an average that it had not starts one
            self.ema.load_state_dict(state["ema"])
        load_optimizer(self.optimizer, state["optimizer"])
        if self.system.opponent:
            self.system.opponent.load_state_dict(state["opponent"])
        self.loader.load_state_dict(state["loader"])
        for name, callback in self.callbacks.items():
            callback.load_state_dict(state["callbacks"].get(name, {}))
        self.scaler, self.skipped = state["scaler"], state["skipped"]

    def save(self) -> None:
        """Writes a checkpoint; metrics first, as a resumed run does not repeat their steps."""
        self.flush()
        state, policy = self.state(), self.root.checkpoint
        if not self.leads:
            return
        try:
            notes = self.measured[1] if self.measured[0] == self.step else {}
            checkpoint.save_and_prune(self.run.checkpoints, state, self.step, policy, notes)
        except Diverged as e:
            raise Diverged(f"step {self.step}: {e}; lower lr={self.root.lr}") from e

    def save_weights(self) -> None:
        """Writes the weights of this step alone, live and averaged ones."""
        self.flush()
        self._export(weight_files.LIVE)
        if self.ema:
            with self.averaged():
                self._export(weight_files.AVERAGED)

    def _export(self, name: str) -> None:
        state = whole(self.system.trainable_state())
        if self.leads:
            path = self.run.folder / "weights" / f"step_{self.step:08d}" / name
            weight_files.write(state, path, self.system.made_with())

    def unshard(self, build: Callable[[], Trainable]) -> None:
        """After training: the first rank goes on by itself, with a whole system from `build`."""
        is_whole = not any(map(is_sharded, self.system.parameters()))
        if not self.root.trainer.shards or (self.rank.world == 1 and is_whole):
            return
        state = self.state()
        if self.leads:
            self.system = build().to(self.system.device)
            self.system.load_trainable(state["weights"])
            self.ema = EMA.of(self.system, registry.create(self.root.ema))
            if self.ema:
                self.ema.load_state_dict(state["ema"])

    def leave_if_asked(self) -> None:
        """For long work after the last step, which can be done again. Raises Preempted."""
        if self.rank.stop_requested():
            raise Preempted(
                f"stopped by {self.rank.asked} after the last step; all weights are saved in "
                f"{self.run.folder}, and the same command finishes the run"
            )

    # metrics

    def note(self, metrics: Mapping[str, Tensor | float], seen: list[Seen]) -> None:
        """Takes in the metrics of step `step` and the micro-batches that made it."""
        self.buffer.add(self.step, metrics)
        self.waiting[self.step] = seen

    def flush(self) -> None:
        """Writes the metrics since the last time, up to a step that is not finite: Diverged."""
        good: list[tuple[int, dict[str, float]]] = []
        bad: tuple[int, dict[str, float]] | None = None
        for step, metrics in self.buffer.flush(self.rank.mean if self.rank.world > 1 else None):
            if "skipped" not in metrics and not all(map(math.isfinite, self._checked(metrics))):
                bad = step, metrics
                break
            good.append((step, {k: v for k, v in metrics.items() if math.isfinite(v)}))
        if good:
            self._record(good)
            self.latest = good[-1][1]
        if bad:
            raise Diverged(self._diverged(*bad))
        self.waiting.clear()

    def _record(self, rows: list[tuple[int, dict[str, float]]]) -> None:
        if self.leads:
            self.trackers.metrics_of(rows)

    def _checked(self, metrics: dict[str, float]) -> list[float]:
        """What must be finite: under fp16 a gradient need not be, its scaler passes over it."""
        ignored = "grad_norm" if self.root.precision == "fp16" else ""
        return [v for k, v in metrics.items() if k != ignored]

    def _diverged(self, step: int, metrics: dict[str, float]) -> str:
        wrong = ", ".join(f"{k}={v}" for k, v in metrics.items() if not math.isfinite(v))
        return (
            f"step {step}: {wrong} is not finite; {blamed(self.waiting[step], self.rank)}; "
            f"lower lr={self.root.lr}, or look at these samples"
        )

    @cached_property
    def fps(self) -> float:
        """Of sample videos: that of the first validation clip, where the data tell it."""
        val = registry.create(self.root.data).split("val")
        return fps_of(gather(val, 1, self.root.seed)) or FPS

    # what callbacks may call

    def sample(self, prompts: Sequence[str], count: int) -> None:
        """Videos and a sheet of `prompts`, else of the data's first `count`.

        Images that the conditioning wants are those of validation clips. The clips are those that
        task=sample makes of this step.
        """
        self.flush()
        batch = of_data(self.root, prompts, count)
        with self.averaged(), self.evaluating():
            video = generate(self.system, batch)
        if not self.leads:
            return
        captions = batch.captions or []
        folder = self.run.samples / f"step_{self.step:08}"
        paths = write_clips(folder, captions, video, self.fps, batch.image)
        self.trackers.images(self.step, "samples", paths[-1:])
        for caption, path in zip(captions, paths[:-1][:4], strict=False):
            self.trackers.video(self.step, f"samples/{path.stem}", path, caption)

    def show(self, rows: Sequence[str], count: int, chain: SamplerConfig | None = None) -> None:
        """Sheets of what the system makes: `rows` of `image_rows`, "samples" as `sample` writes.

        `chain` is the sampler of the progressive row. Of a first stage: reconstructions of held-out
        clips.
        """
        if not isinstance(self.system, LatentDiffusion):
            self._show_reconstructions(count)
            return
        if "samples" in rows:
            self.sample((), count)
        self.flush()
        with self.averaged(), self.evaluating():
            found = looks(self.system, tuple(rows), count, chain)
        for name, columns in found.items() if self.leads else ():
            path = self.run.samples / f"step_{self.step:08}" / f"{name}.png"
            clips = [
                dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
            ]
            media.contact_sheet(path, [media.SheetRow("", strips) for strips in clips])
            self.trackers.images(self.step, name, [path])

    @torch.no_grad()
    def _show_reconstructions(self, count: int) -> None:
        self.flush()
        items = registry.create(self.root.data).split("val")
        video = gather(items, count, self.root.seed).video
        assert video is not None  # gathered
        with self.averaged(), self.evaluating():
            made = through(self.system.first_stage, video.to(self.system.device))
        if self.leads:
            path = self.run.samples / f"step_{self.step:08}" / "reconstruction.png"
            media.reconstruction_sheet(path, [*video], [*made.clamp(-1, 1).cpu()])
            self.trackers.images(self.step, "reconstruction", [path])

    def validate(self, count: int) -> None:
        """Loss on `count` held-out clips, live and averaged weights, always on the same noise.

        Under val/ with the names that the loss logs.
        """
        self.flush()
        val = registry.create(self.root.data).split("val")
        found = {f"val/{name}": value for name, value in self._losses(val, count).items()}
        if self.ema:
            with self.averaged():
                averaged = self._losses(val, count)
            found |= {f"val/{name}_ema": value for name, value in averaged.items()}
        self.measured = self.step, found
        self._record([(self.step, found)])

    @torch.no_grad()
    def _losses(self, items: Any, count: int) -> dict[str, float]:
        """Mean loss of `count` clips; what else the loss logs, over the batches that hold them."""
        losses, logs, system = [], [], self.system
        with self.evaluating():
            for batch in batches(items, min(count, 64), self.root.seed):
                batch = system.transfer_batch_to_device(batch, system.device, 0)
                terms = system.step(batch, system.draws(batch))
                losses.append(terms.per_sample)
                logs.append({k: v * len(terms.per_sample) for k, v in terms.log.items()})
                if sum(map(len, losses)) >= count:
                    break
        taken = sum(map(len, losses))
        means = {k: (torch.stack([log[k] for log in logs]).sum() / taken).item() for k in logs[0]}
        return means | {"loss": torch.cat(losses)[:count].mean().item()}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode inside the block; a first stage that it loads for pixels is gone afterwards."""
        was = self.system.training
        self.system.eval()
        yield
        self.system.train(was)
        if isinstance(stage := getattr(self.system, "first_stage", None), StoredLatents):
            stage.release()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights are the system's inside the block, where there is an average."""
        with self.ema.applied(self.system) if self.ema else nullcontext():
            yield


@dataclass
class Seen:
    """What one micro-batch trained on."""

    ids: list[str]
    losses: Tensor | None  # (B,), where the system tells them

    def bad(self) -> list[str]:
        """Those whose loss is not finite."""
        losses = [] if self.losses is None else self.losses.tolist()
        return [i for i, loss in zip(self.ids, losses, strict=False) if not math.isfinite(loss)]


def blamed(seen: list[Seen], rank: Rank) -> str:
    """The samples of all ranks whose loss is not finite; where none is to blame all of the step."""
    bad = [i for s in seen for i in s.bad()]
    of_ranks = rank.gather_plain([bad, [i for s in seen for i in s.ids]])
    bad = [i for part, _ in of_ranks for i in part]
    ids = bad or [i for _, part in of_ranks for i in part]
    more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
    what = "samples with such a loss" if bad else "samples of this step"
    return f"{what}: {', '.join(ids[:NAMED])}{more}"


# --- beginning ------------------------------------------------------------------------------------


def check_best(wiring: Wiring) -> None:
    """Raises ConfigError where checkpoint.best_of is no number of the loss, which is asked once."""
    root, grid = wiring.root, wiring.grids[0]
    if root.checkpoint.best:
        schedule = registry.create(root.schedule)
        z = torch.zeros(1, grid.channels, 1, 2, 2)
        out = z.repeat(1, root.schedule.outputs(), 1, 1, 1)
        t = schedule.draw_t(Keyed(root.seed, 0, torch.zeros(1, dtype=torch.int64), 1))
        check_best_of(root, registry.create(root.loss)(schedule, out, z, z, t).log)


def check_best_of(root: Root, names: Iterable[str]) -> None:
    """`names`: of the numbers that the loss logs."""
    policy, found = root.checkpoint, {f"val/{name}" for name in (*names, "loss")}
    if root.ema.keeps_ema():
        found |= {f"{name}_ema" for name in found}
    if policy.best and policy.best_of not in found:
        raise ConfigError(
            f"checkpoint.best_of={policy.best_of}: not measured here; want one of "
            + ", ".join(sorted(found))
        )


@contextmanager
def start(
    system: Trainable,
    run: Run,
    group: str | None = None,
    rank: Rank | None = None,
    initialise: Callable[[], None] = lambda: None,
) -> Iterator[Training]:
    """Everything that a run trains with, at step 0 or where its newest good checkpoint stands.

    `initialise` gives the system the weights of step 0; a run that continues has its own. Trackers
    are told the end when the block is left. Raises DataError, StorageError, ConfigError.
    """
    root, rank = system.root, rank or Rank()
    device, cfg = device_of(root, rank.local), root.data
    if root.precision == "fp16" and device.type != "cuda":
        raise ConfigError(f"precision=fp16 needs a CUDA device, here is {device}: use bf16 or fp32")
    if root.trainer.shards and root.precision == "fp16" and rank.world > 1:
        raise ConfigError("precision=fp16: its scaler does not know cut gradients; use bf16")
    use_threads(root)
    newest = rank.broadcast_plain(_newest(run) if rank.index == 0 else None)
    if newest is None:
        initialise()
    forget_peak(device)
    processes = registry.create(root.trainer)
    processes.prepare(system, device, rank.world)
    system.to(device)
    trained = [(n, p) for n, p in system.named_parameters() if p.requires_grad]
    optimizer = registry.create(root.optimizer).build(trained, root.lr)
    for g in optimizer.param_groups:
        g.setdefault("initial_lr", g["lr"])
    split_groups(optimizer, {id(p): system.rates.get(name, 1.0) for name, p in trained})
    if system.opponent:
        if root.precision == "fp16":
            raise ConfigError(
                "precision=fp16: a discriminator trains without a loss scale: use bf16 or fp32"
            )
        system.opponent.build(registry.create(root.optimizer), root.lr, rank)
    training = Training(
        system=system,
        root=root,
        loader=Loader(
            registry.create(cfg).split("train"), cfg.batch_size, root.seed, rank.index, rank.world,
            num_workers=cfg.num_workers, max_bad=cfg.max_bad,
            batch_of=cfg.batch_of, drop_incomplete=cfg.drop_incomplete,
            turns=cfg.alternates_sizes(),
        ),
        run=run,
        rank=rank,
        trackers=Trackers(
            run, [registry.create(root.logger)] if root.logger and rank.index == 0 else []
        ),
        ema=EMA.of(system, registry.create(root.ema)),
        optimizer=optimizer,
        callbacks={k: registry.create(c) for k, c in sorted(root.callbacks.items()) if c},
        processes=processes,
    )  # fmt: skip
    try:
        training.trackers.start(to_container(root), run.folder.name, group)
        if newest is not None:
            training.restore(checkpoint.load(run.checkpoints / newest))
            print(f"continuing from step {training.step} ({newest})", flush=True)
        if run.resumed and training.leads:
            run.rewind(training.step)
        yield training
    except BaseException as e:
        training.trackers.finish(getattr(e, "exit_code", 1))
        raise
    training.trackers.finish(0)


def _newest(run: Run) -> str | None:
    path = checkpoint.newest(run.checkpoints)
    return path.name if path else None
