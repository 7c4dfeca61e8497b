"""Does everything agree? From a Root to a checked, complete Wiring, in plain Python and before anything heavy starts.

All problems are found together. Each line names both sides' settings and numbers and the nearest values that work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from sandbox import registry
from sandbox.config import Root
from sandbox.contracts import Clip, ConfigError, Misfit, PluginConfig, Slots


@dataclass(frozen=True)
class Wiring:
    """A configuration whose parts agree. `root` is complete: no number is left to another component."""

    root: Root
    clips: tuple[Clip, ...]  # every size of a batch, in pixels
    latents: tuple[Clip, ...]  # of those clips
    grids: tuple[Clip, ...]  # what the backbone works on
    slots: tuple[Slots, ...]  # what it is told


def wire(root: Root) -> Wiring:
    """Checks and completes `root`. Raises ConfigError with every problem there is."""
    if root.task is not None:
        missing = {k: v for k, v in root.task.defaults().items() if getattr(root, k) is None}
        root = replace(root, **missing)
    found = [*root.problems()]
    unsound: set[str] = set()
    absent = [g for g in REQUIRED if getattr(root, g) is None]
    found += [f"{g}=null: want one of {[p.name for p in registry.plugins(g)]}" for g in absent]
    for path, cfg in root.parts():
        own = list(cfg.problems())
        found += [f"{path}.{p}" for p in own]
        if own:
            unsound.add(path)
    check = _Check(root, unsound | set(absent))
    wiring = check.run()
    found += check.found
    if found or wiring is None:
        raise ConfigError(*found)
    return wiring


REQUIRED = ("task", "data", "vae", "backbone", "conditioning", "schedule", "loss", "sampler", "guidance", "optimizer",
            "lr_schedule", "ema", "trainer", "checkpoint", "resume", "kernels")  # fmt: skip


@dataclass
class _Check:
    root: Root
    unsound: set[str]  # parts with problems of their own: nothing more is asked of them

    def __post_init__(self) -> None:
        self.found: list[str] = []

    def sound(self, *names: str) -> bool:
        return not self.unsound & set(names)

    def say(self, *problems: str) -> None:
        self.found += [p for p in problems if p not in self.found]

    def run(self) -> Wiring | None:
        root = self.root
        self.schedule()
        self.fields()
        root = self.metric(root)
        clips = root.data.clips() if self.sound("data") else ()
        sizes = [s for clip in clips if (s := self.sizes(clip)) is not None]
        if len(sizes) < len(clips) or not sizes:
            return None
        root, slots = self.told(root, clips, [grid for _, grid in sizes])
        if self.found:
            return None
        return Wiring(root, clips, tuple(z for z, _ in sizes), tuple(g for _, g in sizes), slots)

    # each of these is one kind of agreement

    def schedule(self) -> None:
        """Prediction and noise process against loss, sampler and guidance."""
        if not self.sound("schedule"):
            return
        for part in ("loss", "sampler", "guidance"):
            if self.sound(part):
                cfg = getattr(self.root, part)
                self.say(*(f"{part}.{p}" for p in cfg.accepts(self.root.schedule)))

    def fields(self) -> None:
        """What conditioning reads against what the data provide."""
        if not self.sound("data", "conditioning"):
            return
        data, conditioning = self.root.data, self.root.conditioning
        lacking = conditioning.needs() - data.provides()
        if lacking:
            self.say(
                f"conditioning={_name(conditioning)} needs {_list(lacking)}, but data={_name(data)} provides "
                f"{_list(data.provides())}: use " + _options("conditioning", lambda c: c.needs() <= data.provides())
            )

    def metric(self, root: Root) -> Root:
        """The metric of the data where none was chosen; else what it needs against what the data provide."""
        if not self.sound("data"):
            return root
        if root.metric is None and root.data.metric():
            return replace(root, metric=registry.default("metric", root.data.metric()))
        if root.metric is not None and self.sound("metric"):
            lacking = root.metric.needs() - root.data.provides()
            if lacking:
                self.say(
                    f"metric={_name(root.metric)} needs {_list(lacking)}, but data={_name(root.data)} provides "
                    f"{_list(root.data.provides())}: use metric=null"
                )
            for clip in root.data.clips():
                self.say(*(f"metric.{p}" for p in root.metric.accepts(clip)))
        return root

    def sizes(self, clip: Clip) -> tuple[Clip, Clip] | None:
        """(latents, grid) of a clip, through the first stage and the backbone; None where it does not fit."""
        vae, backbone = self.root.vae, self.root.backbone
        if not self.sound("vae"):
            return None
        through = [vae.latents, *([backbone.grid] if self.sound("backbone") else [])]
        try:
            z = vae.latents(clip)
        except Misfit as e:
            near = self.near(clip, e.field, through) or self.near(clip, e.field, [vae.latents])
            self.say(f"data.{e.field}={e.value} does not fit vae={_name(vae)}, which wants {e.rule}{near}")
            return None
        except ConfigError as e:
            self.say(*(f"vae.{p} (data={_name(self.root.data)} has clips of {clip})" for p in e.problems))
            return None
        if not self.sound("backbone"):
            return None
        try:
            return z, backbone.grid(z)
        except Misfit as e:
            size = getattr(clip, e.field)
            self.say(
                f"data.{e.field}={size} becomes latents {z} with vae={_name(vae)}, whose {e.field} {e.value} does not fit "
                f"backbone={_name(backbone)}, which wants {e.rule}" + self.near(clip, e.field, through)
            )
        except ConfigError as e:
            self.say(*(f"backbone.{p} (latents of vae={_name(vae)} are {z})" for p in e.problems))
        return None

    def near(self, clip: Clip, field: str, through: list[Callable[[Clip], Clip]]) -> str:
        """The nearest values of `field` that go through the whole chain, found by trying them."""

        def fits(value: int) -> bool:
            size = replace(clip, **{field: value})
            try:
                for step in through:
                    size = step(size)
            except ConfigError:
                return False
            return True

        value = getattr(clip, field)
        if field == "channels":
            return ""
        below = next((v for v in range(value - 1, 0, -1) if fits(v)), None)
        over = next((v for v in range(value + 1, 4 * value + 65) if fits(v)), None)
        values = [f"data.{field}={v}" for v in (below, over) if v is not None]
        return f": use {' or '.join(values)}" if values else ""

    def told(self, root: Root, clips: tuple[Clip, ...], grids: list[Clip]) -> tuple[Root, tuple[Slots, ...]]:
        """Slots offered against slots taken and needed; then the numbers that components decide for one another."""
        if not self.sound("conditioning", "schedule", "backbone"):
            return root, ()
        conditioning, backbone, slots = root.conditioning, root.backbone, []
        outputs = root.schedule.outputs()
        for clip, grid in zip(clips, grids, strict=True):
            try:
                conditioning = conditioning.wired(clip, grid)
                slots.append(conditioning.offers(clip, grid))
            except ConfigError as e:
                self.say(*(f"conditioning.{p} (clips are {clip}, latents {grid})" for p in e.problems))
                continue
            self.match(slots[-1])
            try:
                backbone = backbone.wired(grid, slots[-1], outputs)
            except ConfigError as e:
                self.say(
                    *(
                        f"backbone.{p} (vae={_name(root.vae)} gives latents {grid}, conditioning={_name(conditioning)} "
                        f"offers {_slots(slots[-1])}, schedule={_name(root.schedule)} wants {outputs} output(s) a channel)"
                        for p in e.problems
                    )
                )
        return replace(root, conditioning=conditioning, backbone=backbone), tuple(slots)

    def match(self, slots: Slots) -> None:
        backbone, conditioning = self.root.backbone, self.root.conditioning
        pair = f"backbone={_name(backbone)}", f"conditioning={_name(conditioning)}"
        ignored = slots.names() - backbone.takes()
        if ignored:
            self.say(f"{pair[1]} offers {_list(ignored)}, which {pair[0]} does not take with these settings "
                     f"(it takes {_list(backbone.takes())}): change one of them")  # fmt: skip
        lacking = backbone.needs() - slots.names()
        if lacking:
            self.say(f"{pair[0]} needs {_list(lacking)}, but {pair[1]} offers {_list(slots.names())}: change one of them")


def _name(cfg: PluginConfig) -> str:
    return cfg.plugin.rpartition("/")[2]


def _list(names: frozenset[str] | set[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _slots(slots: Slots) -> str:
    return ", ".join(f"{n}={getattr(slots, n)}" for n in sorted(slots.names() - slots.scalars)) or "nothing"


def _options(group: str, works: Callable[[PluginConfig], bool]) -> str:
    """"a or b": the plugins of a group whose defaults work."""

    def candidates() -> Iterator[str]:
        for p in registry.plugins(group):
            if p.config and works(p.config(plugin=p.key)):
                yield f"{group}={p.name}"

    return " or ".join(candidates()) or "other data"


