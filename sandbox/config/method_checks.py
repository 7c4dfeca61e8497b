"""Checks of the training method and the sampler against the other components."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sandbox.config.root import Root
from sandbox.config.wording import listed, name_of, of_part, options
from sandbox.contracts import AVERAGE, TRAINED

Valid = Callable[..., bool]  # whether none of the named groups has invalid settings


def method_problems(root: Root, valid: Valid) -> Iterator[str]:
    """One line for each component that does not fit the method or the sampler."""
    yield from frame_times(root, valid)
    yield from scalars(root, valid)
    yield from cached_frames(root, valid)
    yield from samplers(root, valid)
    yield from chosen_noise(root, valid)
    yield from learned_guidance(root, valid)
    yield from forward_mode(root, valid)
    yield from features(root, valid)
    yield from roles(root, valid)


def frame_times(root: Root, valid: Valid) -> Iterator[str]:
    """Where method or sampler give each frame a time, the other components accept it."""
    takers = {"method": ("backbone", "schedule", "loss"), "sampler": ("backbone", "schedule")}
    giving = [p for p in takers if valid(p) and getattr(root, p).frame_times()]
    for part in giving:
        for group in filter(valid, takers[part]):
            taker = getattr(root, group)
            if taker.takes_frame_times():
                continue
            yield (
                f"{part}={name_of(getattr(root, part))} gives each frame its own time, "
                f"but {group}={name_of(taker)} takes one for the clip with these settings: "
                f"use {options(group, lambda c: c.takes_frame_times(), last='')}"
            )


def scalars(root: Root, valid: Valid) -> Iterator[str]:
    """Numbers of the method reach a backbone that embeds them; a sampler passes no others."""
    if not valid("method"):
        return
    method, sampler, names = root.method, root.sampler, frozenset(root.method.scalars())
    if names and valid("backbone") and not root.backbone.takes_time_scalars():
        yield (
            f"method={name_of(method)} tells the network {listed(names)}, but "
            f"backbone={name_of(root.backbone)} takes no numbers of a method: use "
            f"{options('backbone', lambda c: c.takes_time_scalars(), last='')}"
        )
    if names and root.init_from is not None and getattr(root.backbone, "time_scale", 1) is None:
        yield (
            f"backbone.time_scale=null: method={name_of(method)} derives it for new weights; with "
            "init_from, want that of its weights: 1 for those of method=denoising"
        )
    if not valid("sampler"):
        return
    if lacking := frozenset(sampler.scalars()) - names:
        works = options("method", lambda c: lacking <= c.scalars().keys(), "another sampler")
        yield (
            f"sampler={name_of(sampler)} tells the network {listed(lacking)}, but "
            f"method={name_of(method)} does not train it: use {works}"
        )
    elif sampler.scalars():
        why = f" (method={name_of(method)})"
        problems = method.steps_problems(sampler.steps)
        yield from (of_part("sampler", sampler, p, why) for p in problems)


def cached_frames(root: Root, valid: Valid) -> Iterator[str]:
    """A sampler that keeps earlier frames has a backbone whose frames see no later ones."""
    if not valid("sampler", "backbone") or not root.sampler.caches_frames():
        return
    if not root.backbone.caches_frames():
        yield (
            f"sampler={name_of(root.sampler)} keeps keys and values of earlier frames, but in "
            f"backbone={name_of(root.backbone)} frames see later ones with these settings: use "
            "backbone=dit backbone.attention=causal"
        )


def samplers(root: Root, valid: Valid) -> Iterator[str]:
    """The method accepts the sampler."""
    if valid("method", "sampler"):
        where = f"sampler={name_of(root.sampler)}, method={name_of(root.method)}"
        yield from (f"{where}: {p}" for p in root.method.accepts_sampler(root.sampler))


def chosen_noise(root: Root, valid: Valid) -> Iterator[str]:
    """A guidance that chooses the noise of a step has a sampler that adds it."""
    if not valid("sampler", "guidance") or root.sampler.recombines():
        return
    if root.guidance.chooses_noise():
        yield (
            f"guidance={name_of(root.guidance)} chooses the noise that a step adds, and "
            f"sampler={name_of(root.sampler)} steps from the clean estimate: use "
            f"{options('sampler', lambda c: c.recombines(), last='')}"
        )


def learned_guidance(root: Root, valid: Valid) -> Iterator[str]:
    """A method that learns guidance has signals to drop, and sampling adds no guidance."""
    if not valid("method", "conditioning") or not root.method.learns_guidance():
        return
    method, signals = f"method={name_of(root.method)}", root.conditioning.signals()
    if not signals:
        yield (
            f"{method} learns guidance, but conditioning={name_of(root.conditioning)} has no "
            "signal to drop: use method.guidance_scale=1, or another conditioning"
        )
    if valid("guidance") and len(root.guidance.passes(signals)) > 1:
        yield (
            f"guidance={name_of(root.guidance)} would guide twice, since {method} learns guidance "
            f"of its own: use guidance=none, or method.guidance_scale=1"
        )


def forward_mode(root: Root, valid: Valid) -> Iterator[str]:
    """Forward-mode derivatives need the weights in one piece."""
    if valid("method", "trainer") and root.trainer.shards and root.method.forward_mode():
        yield (
            f"trainer={name_of(root.trainer)} shards the weights, and method="
            f"{name_of(root.method)} takes forward-mode derivatives of the network: use "
            "trainer=ddp or trainer=single"
        )


def features(root: Root, valid: Valid) -> Iterator[str]:
    """Where a method aligns with features of clean frames, there are an encoder and pixels."""
    if not valid("method"):
        return
    method, encoder = f"method={name_of(root.method)}", root.features
    if encoder is not None and not root.method.encodes_video():
        works = options("method", lambda c: c.encodes_video(), last="")
        yield (
            f"features={name_of(encoder)}: {method} reads no features: leave it out, or use {works}"
        )
    elif encoder is None and root.method.encodes_video():
        yield (
            f"features=null: {method} reads features of clean frames: use "
            f"{options('features', lambda c: True, last='')}"
        )
    elif encoder is not None and valid("data", "features"):
        lacking = {"video", *encoder.needs()} - root.data.provides()
        if lacking:
            yield (
                f"features={name_of(encoder)} reads {listed(lacking)}, but data="
                f"{name_of(root.data)} provides {listed(root.data.provides())}: use data of pixels"
            )
    if valid("trainer") and root.trainer.shards and root.method.has_weights():
        yield (
            f"trainer={name_of(root.trainer)} shards the weights, and {method} has weights that "
            "stay in one piece: use trainer=ddp or trainer=single"
        )


def roles(root: Root, valid: Valid) -> Iterator[str]:
    """The further networks of a method can be kept, trained and resumed."""
    if not valid("method"):
        return
    if root.method.scalars() and valid("guidance") and root.guidance.roles():
        guidance, names = name_of(root.guidance), listed(frozenset(root.method.scalars()))
        yield (
            f"guidance={guidance} has a network of its own, and method={name_of(root.method)} "
            f"tells the network {names}, which that one does not take: use guidance=none"
        )
    kinds = {role.kind for role in root.method.roles().values()}
    turns = max((role.turns for role in root.method.roles().values()), default=1)
    method = f"method={name_of(root.method)}"
    if AVERAGE in kinds and valid("ema") and not root.ema.keeps_ema():
        yield (
            f"{method} uses the EMA of the network, and ema={name_of(root.ema)} keeps none: use "
            f"{options('ema', lambda c: c.keeps_ema(), last='')}"
        )
    if valid("trainer") and root.trainer.shards and kinds & {AVERAGE, TRAINED}:
        yield (
            f"trainer={name_of(root.trainer)} shards the weights, and {method} has networks whose "
            "weights stay in one piece: use trainer=ddp or trainer=single"
        )
    if TRAINED not in kinds:
        return
    if root.adapter is not None:
        yield (
            f"adapter={name_of(root.adapter)} trains a part of the network, and {method} trains a "
            "second network in full: leave the adapter out"
        )
    if root.precision == "fp16":
        yield f"precision=fp16: {method} trains a second network without a loss scaler: use bf16"
    if valid("trainer") and turns > 1 and root.trainer.accumulate > 1:
        yield (
            f"trainer.accumulate={root.trainer.accumulate}: {method} updates a second network "
            f"{turns} times a step, which needs trainer.accumulate=1: use a larger data.batch_size"
        )
