"""Does everything agree? From a Root to a checked, complete Wiring, before anything heavy starts.

All problems are found together. Each line names both sides' settings and numbers and the nearest
values that work.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from sandbox import registry
from sandbox.config import Root
from sandbox.contracts import (
    SIZES,
    CallbackConfig,
    Clip,
    ConfigError,
    PluginConfig,
    SizeError,
    Slots,
)

FARTHEST = 512  # how far from a size that does not fit one that does is looked for


@dataclass(frozen=True)
class Wiring:
    """A configuration whose parts agree.

    `root` is complete: no number is left to another component.
    """

    root: Root
    clips: tuple[Clip, ...]  # every size of a batch, in pixels
    latents: tuple[Clip, ...]  # of those clips
    grids: tuple[Clip, ...]  # what the backbone works on
    slots: tuple[Slots, ...]  # what it is told


def wire(root: Root, unasked: frozenset[str] = frozenset()) -> Wiring:
    """Checks and completes `root`. Raises ConfigError with every problem there is.

    `unasked`: groups and settings whose problems are known already; nothing more is asked of them.
    """
    root, found = _scaled(root)
    if root.task is not None and root.vae is not None:
        missing = {
            k: v for k, v in root.task.defaults(root.vae).items() if getattr(root, k) is None
        }
        root = replace(root, **missing)
    absent = {g for g in REQUIRED if getattr(root, g) is None} - unasked
    found += [p for p in root.problems() if re.split(r"\W", p)[0] not in unasked]
    found += [f"{g}=null: want one of {', '.join(_names(g))}" for g in REQUIRED if g in absent]
    unsound = set(unasked) | absent
    for path, cfg in root.parts():
        group = path.partition(".")[0]
        own = [f"{path}.{p}" for p in cfg.problems()]
        seen = {_field(p) for p in own}
        own += [q for p in registry.misshapen(cfg) if _field(q := f"{path}.{p}") not in seen]
        if group not in unasked:
            found += own
        if own:
            unsound.add(group)
    check = _Check(root, unsound)
    wiring = check.run()
    found += check.found
    if not found and wiring is not None:  # of what was filled in, too
        parts = [(path, cfg) for path, cfg in wiring.root.parts() if path not in unsound]
        found = [f"{path}.{p}" for path, cfg in parts for p in cfg.problems()]
    if found or wiring is None:
        raise ConfigError(*dict.fromkeys(found))
    return wiring


def _scaled(root: Root) -> tuple[Root, list[str]]:
    """`root` with the learning rate that `base_lr` asks for, and what contradicts it."""
    if root.base_lr is None or None in (root.trainer, root.data, root.task, root.vae):
        return root, []
    clips = root.task.micro_batch(root.data, root.vae)
    factors = (root.trainer.accumulate, root.trainer.processes, clips)
    lr = root.base_lr * math.prod(factors)
    if root.lr is None:
        return replace(root, lr=lr), []
    if math.isclose(root.lr, lr) or root.task.uses_run():
        return root, []  # wired before; sampling may take another batch size than training did
    terms = " x ".join(map(str, (root.base_lr, *factors)))
    return root, [
        f"lr={root.lr}: base_lr={root.base_lr} asks for {lr:.6g} ({terms}: base_lr x "
        "trainer.accumulate x trainer.processes x data.batch_size); set one of them to null"
    ]


def first_stage_alone(root: Root) -> Root:
    """`root` with the loss and the batch of a first stage that is trained alone.

    Raises ConfigError where none is trained.
    """
    found = []
    if root.vae.fitted() != "trained":
        found.append(
            f"vae={_name(root.vae)}: it is not trained (vae.weights=auto fits it); want another vae"
        )
    if "video" not in root.data.provides():
        found.append(
            f"data={_name(root.data)}: it has no pixels, which a first stage is trained on; want "
            "other data"
        )
    if root.trainer.shards:
        found.append(
            f"trainer={_name(root.trainer)}: a first stage is trained whole; want trainer=ddp or "
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


REQUIRED = ("task", "data", "vae", "backbone", "conditioning", "schedule", "loss", "sampler",
            "guidance", "optimizer", "lr_schedule", "ema", "trainer", "checkpoint", "resume",
            "kernels")  # fmt: skip
MISFITS = 4  # numbers of clips of many sizes that are said not to fit
CHANGE = "change a setting of one of them, or choose another (task=plugins lists what each takes)"


@dataclass
class _Check:
    root: Root
    unsound: set[str]  # parts with problems of their own: nothing more is asked of them

    def __post_init__(self) -> None:
        self.found: list[str] = []
        self.misfits: dict[tuple[Any, ...], list[int]] = {}  # and the nearest values that fit

    def sound(self, *names: str) -> bool:
        return not self.unsound & set(names)

    def say(self, *problems: str) -> None:
        self.found += [p for p in problems if p not in self.found]

    def run(self) -> Wiring | None:
        root = self.root
        self.beginning()
        self.schedule()
        self.fields()
        root = self.first_stage(self.metric(root))
        clips = root.data.clips() if self.sound("data") else ()
        sizes: list[tuple[Clip, Clip]] = []
        for clip in clips:
            if (found := self.sizes(clip)) is not None:
                sizes.append(found)
            elif len(self.misfits) >= MISFITS:
                break
        if len(sizes) < len(clips) or not sizes:
            return None
        root, slots = self.told(root, clips, [grid for _, grid in sizes])
        if self.sound("optimizer", "backbone") and not self.found:
            why = f" (backbone={_name(root.backbone)})"
            for problem in root.optimizer.accepts(root.backbone):
                self.say(_of("optimizer", root.optimizer, problem, why))
        if self.sound("optimizer", "trainer"):
            why = f" (optimizer={_name(root.optimizer)}, precision={root.precision})"
            for problem in root.trainer.accepts(root.optimizer, root.precision):
                self.say(_of("trainer", root.trainer, problem, why))
        self.adapter(root)
        self.best(root)
        if self.found:
            return None
        return Wiring(root, clips, tuple(z for z, _ in sizes), tuple(g for _, g in sizes), slots)

    # each of these is one kind of agreement

    def beginning(self) -> None:
        """Continuing a run and starting one from weights are different things.

        An adapter's run is both: what lies below it is in no checkpoint.
        """
        if self.root.adapter is not None:
            return
        run = getattr(self.root.resume, "run", None)
        if self.sound("resume") and run is not None and self.root.init_from is not None:
            self.say(
                f"init_from={self.root.init_from} and resume.run={run}: resuming goes on with the "
                "weights, optimizer and step of that run, init_from begins a new run at step 0 "
                "with other weights; give one of them"
            )

    def adapter(self, root: Root) -> None:
        """Weights beside a frozen backbone, which must have some of its own."""
        if root.adapter is None or not self.sound("adapter", "backbone"):
            return
        why = f" (backbone={_name(root.backbone)})"
        for problem in root.adapter.accepts(root.backbone):
            self.say(_of("adapter", root.adapter, problem, why))
        starts = not self.sound("task") or root.task.reads_data()
        if root.init_from is None and starts:
            self.say(
                f"adapter={_name(root.adapter)} leaves the backbone as it begins: name its weights "
                "with init_from=FOLDER, or use adapter=null"
            )

    def schedule(self) -> None:
        """Prediction and noise process against loss, sampler and guidance."""
        if not self.sound("schedule"):
            return
        for part in ("loss", "sampler", "guidance"):
            if self.sound(part):
                cfg = getattr(self.root, part)
                schedule = self.root.schedule
                self.say(
                    *(
                        _of(part, cfg, p, f" (schedule={_name(schedule)})")
                        for p in cfg.accepts(schedule)
                    )
                )

    def fields(self) -> None:
        """What conditioning reads against what the data provide."""
        if not self.sound("data", "conditioning"):
            return
        data, conditioning = self.root.data, self.root.conditioning
        lacking = conditioning.needs() - data.provides() - set(SIZES)
        if conditioning.encodes() and not data.provides() & {"video", "image"}:
            self.say(
                f"conditioning={_name(conditioning)} encodes pictures, but data={_name(data)} "
                f"provides {_list(data.provides())}: use data.image=true"
            )
        is_for_none = not (conditioning.embeds() or "text" in conditioning.needs())
        if "text" in data.provides() and is_for_none:
            self.say(
                f"data.text=true: conditioning={_name(conditioning)} takes no stored text: use "
                "data.text=false"
            )
        if lacking:
            self.say(
                f"conditioning={_name(conditioning)} needs {_list(lacking)}, but "
                f"data={_name(data)} provides "
                f"{_list(data.provides())}: use "
                + _options("conditioning", lambda c: c.needs() <= data.provides() | set(SIZES))
            )

    def best(self, root: Root) -> None:
        """Checkpoints that are kept by a metric need one that is measured when they are saved."""
        policy = root.checkpoint
        if not self.sound("checkpoint", "callbacks") or not policy.best:
            return
        watching = [c for c in root.callbacks.values() if isinstance(c, CallbackConfig)]
        if not any(c.measures(policy.every) for c in watching):
            self.say(
                f"checkpoint.best={policy.best}: {policy.best_of} is not measured every "
                f"checkpoint.every={policy.every} steps: use callbacks=[val_loss] with "
                f"callbacks.val_loss.every={policy.every}, or checkpoint.best=0"
            )
        if self.sound("ema") and policy.best_of.endswith("_ema") and not root.ema.keeps_ema():
            self.say(
                f"checkpoint.best_of={policy.best_of}: ema={_name(root.ema)} keeps no average to "
                f"measure: use checkpoint.best_of={policy.best_of.removesuffix('_ema')}, or "
                "another ema"
            )

    def metric(self, root: Root) -> Root:
        """The metric of the data where none is chosen; else its needs against what data have."""
        if not self.sound("data"):
            return root
        if root.metric is None and root.data.metric():
            return replace(root, metric=registry.default("metric", root.data.metric()))
        if root.metric is not None and self.sound("metric"):
            lacking = root.metric.needs() - root.data.provides()
            if lacking:
                self.say(
                    f"metric={_name(root.metric)} needs {_list(lacking)}, but "
                    f"data={_name(root.data)} provides "
                    f"{_list(root.data.provides())}: use metric=null"
                )
            for clip in root.data.clips():
                self.say(*(_of("metric", root.metric, p) for p in root.metric.accepts(clip)))
        return root

    def first_stage(self, root: Root) -> Root:
        """What trains a first stage alone, where the task does."""
        needed = ("task", "vae", "data", "trainer", "reconstruction")
        if not self.sound(*needed) or not root.task.trains_first_stage:
            return root
        try:
            return first_stage_alone(root)
        except ConfigError as e:
            self.say(*e.problems)
            return root

    def sizes(self, clip: Clip) -> tuple[Clip, Clip] | None:
        """(latents, grid) of a clip; None where first stage or backbone do not take it.

        Each of the clip's numbers that does not fit is named with the nearest that do; the next is
        looked for as if it had that value.
        """
        vae, backbone = self.root.vae, self.root.backbone
        if not self.sound("data", "vae"):
            return None
        fitting, first, with_backbone = clip, None, self.sound("backbone")
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
                if key not in self.misfits:  # of many sizes it is said once
                    self.misfits[key] = self.near(fitting, e.field)
                    self.say(self.misfit(clip, first if z else None, e, self.misfits[key]))
                near = self.misfits[key]
                if not near:
                    return None
                fitting = replace(fitting, **{e.field: near[-1]})
            except ConfigError as e:
                part, cfg, size = ("backbone", backbone, z) if z else ("vae", vae, clip)
                why = f" (it gets clips of {size})"
                self.say(*(_of(part, cfg, p, why) for p in e.problems))
                return None
        return None

    def misfit(self, clip: Clip, z: Clip | None, e: SizeError, near: list[int]) -> str:
        """A number of `clip` that does not fit the first stage or, with latents `z`, backbone."""
        data, value, vae = self.root.data, getattr(clip, e.field), f"vae={_name(self.root.vae)}"
        size, cure = f"data.{e.field}={value}", ""
        if getattr(data, e.field, None) != value:  # of a bucket, which other settings decide
            size = f"data={_name(data)}: a size of batches, {clip}, with {e.field}={value}"
            cure = f"; the nearest that do: {' and '.join(map(str, near))}" if near else ""
        elif near:
            cure = ": use " + " or ".join(f"data.{e.field}={v}" for v in near)
        if z is None:
            return f"{size} does not fit {vae}, which wants {e.rule}{cure}"
        return (
            f"{size}: clips of {clip} become latents of {z} with {vae}, and {e.field} {e.value} "
            f"does not fit backbone={_name(self.root.backbone)}, which wants {e.rule}{cure}"
        )

    def near(self, clip: Clip, field: str) -> list[int]:
        """The nearest values of `field`, below and above, that first stage and backbone take."""
        if field == "channels":
            return []

        data, value = self.root.data, getattr(clip, field)

        def fits(size: int) -> bool:
            try:
                z = self.root.vae.latents(replace(clip, **{field: size}))
                if self.sound("backbone"):
                    self.root.backbone.grid(z)
            except SizeError as e:
                if e.field == field:
                    return False
            except ConfigError:
                return False
            is_own = getattr(data, field) == value
            return not (is_own and any(replace(data, **{field: size}).problems()))

        below = next((v for v in range(value - 1, max(0, value - FARTHEST), -1) if fits(v)), None)
        end = min(4 * value + 65, value + FARTHEST)
        over = next((v for v in range(value + 1, end) if fits(v)), None)
        return [v for v in (below, over) if v is not None]

    def told(
        self, root: Root, clips: tuple[Clip, ...], grids: list[Clip]
    ) -> tuple[Root, tuple[Slots, ...]]:
        """Slots offered against slots taken, then the numbers that others decide."""
        if not self.sound("conditioning", "schedule", "backbone"):
            return root, ()
        conditioning, backbone, slots = root.conditioning, root.backbone, []
        outputs = root.schedule.outputs()
        for clip, grid in zip(clips, grids, strict=True):
            try:
                conditioning = conditioning.wired(clip, grid)
                slots.append(conditioning.offers(clip, grid))
            except ConfigError as e:
                why = f" (clips are {clip}, latents {grid})"
                self.say(*(_of("conditioning", conditioning, p, why) for p in e.problems))
                continue
            self.match(slots[-1])
            try:
                backbone = backbone.wired(grid, slots[-1], outputs)
            except ConfigError as e:
                why = (
                    f" (vae={_name(root.vae)} gives latents of {grid}, "
                    f"conditioning={_name(conditioning)} offers {_slots(slots[-1])}, "
                    f"schedule={_name(root.schedule)} wants {outputs} output(s) a channel); "
                    "null takes what is needed"
                )
                self.say(*(_of("backbone", backbone, p, why) for p in e.problems))
        return replace(root, conditioning=conditioning, backbone=backbone), tuple(slots)

    def match(self, slots: Slots) -> None:
        """What conditioning offers against what the backbone takes and needs."""
        backbone, conditioning = self.root.backbone, self.root.conditioning
        told, network = f"conditioning={_name(conditioning)}", f"backbone={_name(backbone)}"
        ignored = slots.names() - backbone.takes()
        if ignored:
            self.say(
                f"{told} offers {_list(ignored)}, but {network} takes {_list(backbone.takes())} "
                f"with these settings: {CHANGE}"
            )
        lacking = backbone.needs() - slots.names()
        if lacking:
            self.say(
                f"{network} needs {_list(lacking)} with these settings, but {told} offers "
                f"{_list(slots.names())}: {CHANGE}"
            )


def _of(part: str, cfg: PluginConfig, problem: str, why: str = "") -> str:
    """A problem that a Config names by a setting, or by its own name, as the user types it."""
    name, rest = re.match(r"(\w*)(.*)", problem, re.DOTALL).groups()  # type: ignore[union-attr]
    if name == _name(cfg):
        return f"{part}={name}{rest}{why}"
    return f"{part}.{problem}{why}"


def _field(problem: str) -> str:
    """The setting that a problem begins with."""
    return re.split(r"[^\w.]", problem)[0]


def _names(group: str) -> list[str]:
    return [p.name for p in registry.plugins(group)]


def _name(cfg: PluginConfig) -> str:
    return cfg.plugin.rpartition("/")[2]


def _list(names: frozenset[str] | set[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _slots(slots: Slots) -> str:
    return (
        ", ".join(f"{n}={getattr(slots, n)}" for n in sorted(slots.names() - slots.scalars))
        or "nothing"
    )


def _options(group: str, works: Callable[[Any], bool]) -> str:
    """The plugins of a group whose defaults work: a=x or a=y."""

    def candidates() -> Iterator[str]:
        for p in registry.plugins(group):
            if p.config and works(p.config(plugin=p.key)):
                yield f"{group}={p.name}"

    return " or ".join([*candidates(), "other data"])
