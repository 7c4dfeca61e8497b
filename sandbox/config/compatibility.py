"""Checks that the components of a configuration fit together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sandbox.config import registry
from sandbox.config.method_checks import method_problems
from sandbox.config.root import Root
from sandbox.config.wording import listed, name_of, of_part, options, slot_sizes
from sandbox.contracts import (
    SIZES,
    CallbackConfig,
    Clip,
    ConfigError,
    SizeError,
    Slots,
)

SEARCH = 512  # how far from an incompatible size a compatible one is searched


@dataclass(frozen=True)
class Wiring:
    """A configuration whose components fit together; `root` has every derived number filled in."""

    root: Root
    clips: tuple[Clip, ...]  # every batch size in pixels (one per bucket)
    latents: tuple[Clip, ...]  # the latents of those clips
    grids: tuple[Clip, ...]  # the grids that the backbone works on
    slots: tuple[Slots, ...]  # the conditions that it receives


def first_stage_alone(root: Root) -> Root:
    """`root` with the loss and batch size for training its first stage.

    Raises ConfigError for a first stage that is not trained, data without pixels, or sharding.
    """
    found = []
    if root.vae.fitted() != "trained":
        found.append(
            f"vae={name_of(root.vae)}: cannot be trained (vae.weights=auto fits it); choose "
            "another vae"
        )
    if "video" not in root.data.provides():
        found.append(
            f"data={name_of(root.data)}: provides no pixels to train a first stage on; choose "
            "other data"
        )
    if root.trainer.shards:
        found.append(
            f"trainer={name_of(root.trainer)}: cannot shard a first stage; use trainer=ddp or "
            "trainer=single"
        )
    if found:
        raise ConfigError(*found)
    recipe = root.vae.recipe()
    loss: Any = root.reconstruction or replace(
        registry.default("reconstruction", root.vae.regularizer()), **recipe.reconstruction
    )
    refused = [f"reconstruction.{p}" for p in loss.accepts(root.vae)]
    if refused:
        raise ConfigError(*refused)
    batch_size = root.task.micro_batch(root.data, root.vae)
    return replace(root, reconstruction=loss, data=replace(root.data, batch_size=batch_size))


MOST_SIZE_PROBLEMS = 4  # incompatible sizes that are reported, of many buckets
CHANGE = "change a setting of either, or choose another (task=plugins lists what each takes)"


@dataclass
class Compatibility:
    """Collects in `found` where components of `root` do not fit together."""

    root: Root
    invalid: set[str]  # groups with invalid settings, excluded from the checks

    def __post_init__(self) -> None:
        self.found: list[str] = []
        self.size_problems: dict[tuple[Any, ...], list[int]] = {}  # size -> nearest that fit

    def valid(self, *names: str) -> bool:
        """Whether none of these groups has invalid settings."""
        return not self.invalid & set(names)

    def report(self, *problems: str) -> None:
        self.found += [p for p in problems if p not in self.found]

    def run(self) -> Wiring | None:
        """Runs every check; the wiring, or None where problems were found."""
        root = self.root
        self.start()
        self.schedule()
        self.report(*method_problems(self.root, self.valid))
        self.fields()
        root = self.labels(self.first_stage(self.metric(root)))
        clips = root.data.clips() if self.valid("data") else ()
        sizes: list[tuple[Clip, Clip]] = []
        for clip in clips:
            if (found := self.sizes(clip)) is not None:
                sizes.append(found)
            elif len(self.size_problems) >= MOST_SIZE_PROBLEMS:
                break
        if len(sizes) < len(clips) or not sizes:
            return None
        root, slots = self.conditions(root, clips, [grid for _, grid in sizes])
        root = self.blocks(root)
        if self.valid("optimizer", "backbone") and not self.found:
            why = f" (backbone={name_of(root.backbone)})"
            for problem in root.optimizer.accepts(root.backbone):
                self.report(of_part("optimizer", root.optimizer, problem, why))
        if self.valid("optimizer", "trainer"):
            why = f" (optimizer={name_of(root.optimizer)}, precision={root.precision})"
            for problem in root.trainer.accepts(root.optimizer, root.precision):
                self.report(of_part("trainer", root.trainer, problem, why))
        self.adapter(root)
        self.best(root)
        if self.found:
            return None
        return Wiring(root, clips, tuple(z for z, _ in sizes), tuple(g for _, g in sizes), slots)

    # one method per kind of agreement

    def start(self) -> None:
        """resume.run and init_from exclude each other, except with an adapter.

        Checkpoints of an adapter do not hold the backbone below it.
        """
        if self.root.adapter is not None:
            return
        run = getattr(self.root.resume, "run", None)
        if self.valid("resume") and run is not None and self.root.init_from is not None:
            self.report(
                f"init_from={self.root.init_from} and resume.run={run}: resume.run continues "
                "that run with its weights, optimizer and step; init_from starts a new run at step "
                "0 from other weights; keep one of them"
            )

    def adapter(self, root: Root) -> None:
        """An adapter fits the backbone, whose pretrained weights are named."""
        if root.adapter is None or not self.valid("adapter", "backbone"):
            return
        why = f" (backbone={name_of(root.backbone)})"
        for problem in root.adapter.accepts(root.backbone):
            self.report(of_part("adapter", root.adapter, problem, why))
        starts = not self.valid("task") or root.task.reads_data()
        if root.init_from is None and starts:
            self.report(
                f"adapter={name_of(root.adapter)} needs a pretrained backbone: set "
                "init_from=FOLDER, or use adapter=null"
            )

    def schedule(self) -> None:
        """Loss, method, sampler and guidance accept the schedule."""
        if not self.valid("schedule"):
            return
        if self.valid("method", "loss"):
            method = self.root.method
            for problem in method.accepts(self.root.schedule, self.root.loss):
                self.report(of_part("method", method, problem))
        for part in ("loss", "sampler", "guidance"):
            if self.valid(part):
                cfg, schedule = getattr(self.root, part), self.root.schedule
                why = f" (schedule={name_of(schedule)})"
                self.report(*(of_part(part, cfg, p, why) for p in cfg.accepts(schedule)))

    def blocks(self, root: Root) -> Root:
        """Guidance and method name blocks of the backbone."""
        wired = {}
        for part, others in (("guidance", ()), ("method", ("features",))):
            try:
                if self.valid(part, "backbone", *others):
                    given = (root.backbone, *(getattr(root, other) for other in others))
                    wired[part] = getattr(root, part).wired(*given)
            except ConfigError as e:
                why = f" (backbone={name_of(root.backbone)})"
                self.report(*(of_part(part, getattr(root, part), p, why) for p in e.problems))
        return replace(root, **wired)

    def fields(self) -> None:
        """The data provide every batch field that the conditioning reads."""
        if not self.valid("data", "conditioning"):
            return
        data, conditioning = self.root.data, self.root.conditioning
        lacking = conditioning.needs() - data.provides() - set(SIZES)
        if conditioning.encodes() and not data.provides() & {"video", "image"}:
            self.report(
                f"conditioning={name_of(conditioning)} encodes images, but data={name_of(data)} "
                f"provides {listed(data.provides())}: use data.image=true"
            )
        is_for_none = not (conditioning.embeds() or "text" in conditioning.needs())
        if "text" in data.provides() and is_for_none:
            self.report(
                f"data.text=true: conditioning={name_of(conditioning)} takes no cached text "
                "embeddings: use data.text=false"
            )
        if lacking:
            encoder = "conditioning.weights=FOLDER or " if lacking == {"text"} else ""
            self.report(
                f"conditioning={name_of(conditioning)} needs {listed(lacking)}, but "
                f"data={name_of(data)} provides "
                f"{listed(data.provides())}: use {encoder}"
                + options("conditioning", self.conditioning_fits)
            )

    def conditioning_fits(self, other: Any) -> bool:
        """Whether another plugin, with its defaults, fits the data, first stage and backbone."""
        data, vae, backbone = self.root.data, self.root.vae, self.root.backbone
        is_same = other.plugin == self.root.conditioning.plugin
        lacks_images = other.encodes() and not data.provides() & {"video", "image"}
        if is_same or lacks_images or not other.needs() <= data.provides() | set(SIZES):
            return False
        if not self.valid("vae", "backbone"):
            return True
        try:
            clip = data.clips()[0]
            grid = backbone.grid(vae.latents(clip))
            slots = other.wired(clip, grid).offers(clip, grid)
        except ConfigError:
            return False
        return backbone.needs() <= slots.names() <= backbone.takes()

    def best(self, root: Root) -> None:
        """A metric that selects checkpoints is measured whenever one is saved."""
        policy = root.checkpoint
        if not self.valid("checkpoint", "callbacks") or not policy.best:
            return
        watching = [c for c in root.callbacks.values() if isinstance(c, CallbackConfig)]
        if not any(c.measures(policy.every) for c in watching):
            self.report(
                f"checkpoint.best={policy.best}: {policy.best_of} is not measured every "
                f"checkpoint.every={policy.every} steps: use callbacks=[val_loss] with "
                f"callbacks.val_loss.every={policy.every}, or checkpoint.best=0"
            )
        if self.valid("ema") and policy.best_of.endswith("_ema") and not root.ema.keeps_ema():
            self.report(
                f"checkpoint.best_of={policy.best_of}: ema={name_of(root.ema)} has no EMA weights "
                f"to measure: use checkpoint.best_of={policy.best_of.removesuffix('_ema')}, or "
                "another ema"
            )

    def metric(self, root: Root) -> Root:
        """Fills in the default metric of the data; a chosen one finds its fields in the data."""
        if not self.valid("data"):
            return root
        if root.metric is None and root.data.metric():
            return replace(root, metric=registry.default("metric", root.data.metric()))
        if root.metric is not None and self.valid("metric"):
            lacking = root.metric.needs() - root.data.provides()
            if lacking:
                self.report(
                    f"metric={name_of(root.metric)} needs {listed(lacking)}, but data="
                    f"{name_of(root.data)} provides {listed(root.data.provides())}: use metric=null"
                )
            for clip in root.data.clips():
                self.report(*(of_part("metric", root.metric, p) for p in root.metric.accepts(clip)))
        return root

    def labels(self, root: Root) -> Root:
        """Fills in the number of classes of the data where the conditioning reads labels."""
        if not self.valid("data", "conditioning") or not root.data.labels():
            return root
        try:
            return replace(root, conditioning=root.conditioning.labelled(root.data.labels()))
        except ConfigError as e:
            why = f" (data={name_of(root.data)})"
            problems = (of_part("conditioning", root.conditioning, p, why) for p in e.problems)
            self.report(*problems)
            return root

    def first_stage(self, root: Root) -> Root:
        """Fills in loss and batch size where the task trains a first stage."""
        needed = ("task", "vae", "data", "trainer", "reconstruction")
        if not self.valid(*needed) or not root.task.trains_first_stage:
            return root
        for name, callback in root.callbacks.items() if self.valid("callbacks") else ():
            if isinstance(callback, CallbackConfig) and (found := callback.metrics()):
                self.report(
                    f"callbacks.{name}: measures {listed(frozenset(found))} of a denoiser, and "
                    f"task={name_of(root.task)} trains a first stage: use the callback without them"
                )
        try:
            return first_stage_alone(root)
        except ConfigError as e:
            self.report(*e.problems)
            return root

    def sizes(self, clip: Clip) -> tuple[Clip, Clip] | None:
        """(latents, grid) of a clip; None where the first stage or backbone rejects its size.

        Reports each incompatible dimension with the nearest compatible values. Later dimensions are
        checked as if the earlier ones were fixed.
        """
        vae, backbone = self.root.vae, self.root.backbone
        if not self.valid("data", "vae"):
            return None
        fitting, first, with_backbone = clip, None, self.valid("backbone")
        for _ in range(3):  # frames, height, width
            z = None
            try:
                z = vae.latents(fitting)
                first = first or z
                if with_backbone:
                    grid = backbone.grid(z)
                    return (z, grid) if fitting == clip else None
                return None
            except SizeError as e:
                key = (e.field, getattr(clip, e.field), e.value, z is None)
                near = self.size_problems.get(key)
                if near is None:  # once for all buckets
                    near = self.size_problems[key] = self.nearest(fitting, e.field)
                    self.report(self.size_problem(clip, first if z else None, e, near))
                if not near:
                    return None
                fitting = replace(fitting, **{e.field: near[-1]})
            except ConfigError as e:
                part, cfg, size = ("backbone", backbone, z) if z else ("vae", vae, clip)
                why = f" (it gets clips of {size})"
                self.report(*(of_part(part, cfg, p, why) for p in e.problems))
                return None
        return None

    def size_problem(self, clip: Clip, z: Clip | None, e: SizeError, near: list[int]) -> str:
        """The message for a size that the first stage (or, given `z`, the backbone) rejects."""
        data, value, vae = self.root.data, getattr(clip, e.field), f"vae={name_of(self.root.vae)}"
        size, fix = f"data.{e.field}={value}", ""
        if getattr(data, e.field, None) != value:  # a bucket, derived from other settings
            size = f"data={name_of(data)}: a size of batches, {clip}, with {e.field}={value}"
            fix = f"; the nearest that do: {' and '.join(map(str, near))}" if near else ""
        elif near:
            fix = ": use " + " or ".join(f"data.{e.field}={v}" for v in near)
        if z is None:
            return f"{size} does not fit {vae}, which wants {e.rule}{fix}"
        return (
            f"{size}: clips of {clip} become latents of {z} with {vae}, and {e.field} {e.value} "
            f"does not fit backbone={name_of(self.root.backbone)}, which wants {e.rule}{fix}"
        )

    def nearest(self, clip: Clip, field: str) -> list[int]:
        """The nearest values of `field`, below and above, that first stage and backbone accept."""
        if field == "channels":
            return []

        data, value = self.root.data, getattr(clip, field)

        def fits(size: int) -> bool:
            try:
                z = self.root.vae.latents(replace(clip, **{field: size}))
                if self.valid("backbone"):
                    self.root.backbone.grid(z)
            except SizeError as e:
                if e.field == field:
                    return False
            except ConfigError:
                return False
            is_own = getattr(data, field) == value
            return not (is_own and any(replace(data, **{field: size}).problems()))

        smaller = range(value - 1, max(0, value - SEARCH), -1)
        larger = range(value + 1, min(4 * value + 65, value + SEARCH))
        found = (next(filter(fits, sizes), None) for sizes in (smaller, larger))
        return [v for v in found if v is not None]

    def conditions(
        self, root: Root, clips: tuple[Clip, ...], grids: list[Clip]
    ) -> tuple[Root, tuple[Slots, ...]]:
        """The backbone takes what conditioning offers; fills in the numbers derived from others."""
        if not self.valid("conditioning", "schedule", "backbone"):
            return root, ()
        conditioning, backbone, slots = root.conditioning, root.backbone, []
        outputs = root.schedule.outputs()
        numbers = frozenset(root.method.scalars()) if self.valid("method") else frozenset()
        for clip, grid in zip(clips, grids, strict=True):
            try:
                conditioning = conditioning.wired(clip, grid)
                slots.append(replace(conditioning.offers(clip, grid), time_scalars=numbers))
            except ConfigError as e:
                why = f" (clips are {clip}, latents {grid})"
                self.report(*(of_part("conditioning", conditioning, p, why) for p in e.problems))
                continue
            self.match(slots[-1])
            try:
                backbone = backbone.wired(grid, slots[-1], outputs)
            except ConfigError as e:
                why = (
                    f" (vae={name_of(root.vae)} gives latents of {grid}, "
                    f"conditioning={name_of(conditioning)} offers {slot_sizes(slots[-1])}, "
                    f"schedule={name_of(root.schedule)} wants {outputs} output(s) a channel); "
                    "null derives the value"
                )
                self.report(*(of_part("backbone", backbone, p, why) for p in e.problems))
        return replace(root, conditioning=conditioning, backbone=backbone), tuple(slots)

    def match(self, slots: Slots) -> None:
        """The backbone takes every slot offered and finds every slot that it needs."""
        backbone, conditioning = self.root.backbone, self.root.conditioning
        source, network = f"conditioning={name_of(conditioning)}", f"backbone={name_of(backbone)}"
        ignored = slots.names() - backbone.takes()
        if ignored:
            self.report(
                f"{source} offers {listed(ignored)}, but {network} takes "
                f"{listed(backbone.takes())} with these settings: {CHANGE}"
            )
        lacking = backbone.needs() - slots.names()
        if lacking:
            self.report(
                f"{network} needs {listed(lacking)} with these settings, but {source} offers "
                f"{listed(slots.names())}: {CHANGE}"
            )
