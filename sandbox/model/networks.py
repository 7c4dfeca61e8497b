"""What a training method works with: the networks of a system, and one micro-batch."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn

from sandbox.config.registry import nearest
from sandbox.contracts import (
    STUDENT,
    BackboneConfig,
    Batch,
    Clip,
    Conditions,
    ConfigError,
    Draws,
    Output,
    Schedule,
)

if TYPE_CHECKING:
    from sandbox.model.latent_diffusion import LatentDiffusion


class Networks:
    """The `Model` of a system, see sandbox.contracts; its schedule is that for the `example`."""

    def __init__(self, system: "LatentDiffusion", example: "MicroBatch | None" = None) -> None:
        self.system, self.loss, self.example = system, system.loss, example

    @property
    def schedule(self) -> Schedule:
        if self.example is None or not self.system.root.schedule.depends_on_size():
            return self.system.schedule
        return self.system.schedule_for(Clip(*self.example.z0.shape[1:]))

    def __call__(
        self,
        z_t: Tensor,
        t: Tensor,
        cond: Conditions,
        features: tuple[str, ...] = (),
        scalars: Mapping[str, Tensor] | None = None,
        role: str = STUDENT,
    ) -> Output:
        system, backbone = self.system, self.system.network(role).backbone
        cond = with_scalars(cond, self.schedule, z_t, scalars or {})
        with (
            system.autocast(),
            system.on_device(backbone),
            captured(backbone, features) as found,
        ):
            raw = backbone(*self.schedule.inputs(z_t, t), cond)
        return Output(raw, in_grid(found, z_t, system.root.backbone) if role == STUDENT else found)


class MicroBatch:
    """The `Example` of a batch, see sandbox.contracts."""

    def __init__(self, system: "LatentDiffusion", batch: Batch, draws: Draws) -> None:
        self.system, self.batch, self.draws = system, batch, draws
        self.video = batch.video
        self._z0: Tensor | None = None
        self._features: Tensor | None = None
        self._conditions: dict[tuple[frozenset[str] | None, str], Conditions] = {}

    @property
    def signals(self) -> tuple[str, ...]:
        return self.system.root.conditioning.signals()

    @property
    def features(self) -> Tensor:
        if self._features is None:
            assert self.video is not None  # wiring requires pixels
            self._features = self.system.features_of(self.video, self.z0.shape[2])
        return self._features

    @property
    def z0(self) -> Tensor:
        if self._z0 is None:
            self._z0 = self.system.latents(self.batch, self.draws)
        return self._z0

    def conditions(self, drop: frozenset[str] | None = None, role: str = STUDENT) -> Conditions:
        if (drop, role) not in self._conditions:
            self._conditions[drop, role] = self._encoded(
                drop, self.system.network(role).conditioner
            )
        return self._conditions[drop, role]

    def _encoded(self, drop: frozenset[str] | None, conditioner: Any) -> Conditions:
        system, z0 = self.system, self.z0
        if drop is None:
            dropped = system.conditioner.drop(self.draws)
        else:
            dropped = dropped_signals(self.signals, drop, z0)
        with system.on_device(conditioner):
            return conditioner(
                self.batch, Clip(*z0.shape[1:]), dropped, self.draws,
                system.encoder(self.draws), z0,
            )  # fmt: skip


def with_scalars(
    cond: Conditions, schedule: Schedule, z_t: Tensor, scalars: Mapping[str, Tensor]
) -> Conditions:
    """`cond` with numbers in the unit of t, each (B,), scaled as the backbone's time is."""
    scaled = {name: schedule.inputs(z_t, x)[1] for name, x in scalars.items()}
    return replace(cond, scalars=cond.scalars | scaled) if scaled else cond


def dropped_signals(
    signals: tuple[str, ...], dropped: frozenset[str], like: Tensor
) -> dict[str, Tensor]:
    """signal -> (B,) bool: the signals in `dropped` are dropped in every clip."""
    return {s: torch.full((len(like),), s in dropped, device=like.device) for s in signals}


def check_modules(backbone: Any, names: tuple[str, ...], setting: str) -> None:
    """Raises ConfigError for names that are not modules of the backbone."""
    known = [name for name, _ in backbone.named_modules() if name]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(*(
            f"{setting}: the backbone has no module {name}{nearest(name, known)}"
            for name in unknown
        ))  # fmt: skip


@contextmanager
def captured(backbone: Any, names: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """Collects the outputs of these modules inside the block; of a tuple, the last tensor."""
    found: dict[str, Tensor] = {}

    def capture(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            found[name] = out[-1] if isinstance(out, tuple) else out

        return hook

    with _hooked(backbone, {name: capture(name) for name in names}):
        yield found


def in_grid(found: Mapping[str, Tensor], z: Tensor, backbone: BackboneConfig) -> dict[str, Tensor]:
    """The outputs of blocks as (B, d, t, h, w), where the Config knows their axes; z: latents."""
    grids = dict(found)
    for name, hidden in ((name, backbone.hidden(name)) for name in found):
        if hidden is not None:
            t, h, w = (n // cells for n, cells in zip(z.shape[2:], hidden.cells, strict=True))
            axes, sizes = f"{hidden.axes} -> b d t h w", {"b": len(z), "t": t, "h": h, "w": w}
            grids[name] = rearrange(found[name], axes, **sizes)
    return grids


@contextmanager
def skipped(backbone: Any, names: tuple[str, ...]) -> Iterator[None]:
    """These modules return their input inside the block: the first argument, or the first two."""

    def hook(module: nn.Module, args: Any, out: Any) -> Any:
        return args[: len(out)] if isinstance(out, tuple) else args[0]

    with _hooked(backbone, dict.fromkeys(names, hook)):
        yield


@contextmanager
def _hooked(backbone: Any, hooks: dict[str, Any]) -> Iterator[None]:
    handles = [
        backbone.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
