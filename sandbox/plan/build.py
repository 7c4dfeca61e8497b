"""Builds a system on the meta device, and measures one micro-batch of it on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sandbox.config import registry
from sandbox.config.root import Root
from sandbox.config.wiring import Wiring, wire
from sandbox.contracts import (
    AVERAGE,
    FROZEN,
    STUDENT,
    TRAINED,
    Clip,
    Conditions,
    Slots,
)
from sandbox.model.ema import EMA
from sandbox.model.offload import freeze
from sandbox.plan.depth import extrapolate
from sandbox.plan.measure import Measured, measure, on_fake_device
from sandbox.plan.step_inputs import (
    EmptyDraws,
    PlannedExample,
    PlannedModel,
    conditions,
    planned_features,
)
from sandbox.runs.lookup import read_root

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHECKPOINTING = ("gradient_checkpointing", "use_checkpoint")  # published names of the setting
GROUPS = ("vae", "conditioning", "backbone", "loss", "method", "features")


@dataclass(frozen=True)
class Count:
    """Parameter counts of a component, and their bytes on the device during training."""

    group: str
    plugin: str
    trained: int
    frozen: int
    buffers: int
    bytes_trained: int
    bytes_fixed: int  # frozen weights and buffers
    is_resident: bool  # on the device during training


@dataclass(frozen=True)
class Sizes:
    """The largest clip size, in pixels, latents and the backbone's grid."""

    batch: int
    clip: Clip
    latents: Clip
    grid: Clip
    slots: Slots

    @classmethod
    def of(cls, wiring: Wiring) -> Sizes:
        numbers = [c.frames * c.height * c.width for c in wiring.clips]
        i = numbers.index(max(numbers))
        batch = wiring.root.data.batch_size
        return cls(batch, wiring.clips[i], wiring.latents[i], wiring.grids[i], wiring.slots[i])


def parts_of(root: Root, checkpointing: bool | None = None, half: bool = False) -> dict[str, Any]:
    """Components by group, on the meta device.

    `checkpointing` overrides the backbone's setting; `half`: trained weights in `root.precision`,
    as with DeepSpeed.
    """
    backbone = root.backbone
    name = checkpointing_field(root)
    if checkpointing is not None and name is not None:
        backbone = replace(backbone, **{name: checkpointing})
    # a placeholder: neither weights nor cached latents are read on the meta device
    root = replace(root, backbone=backbone, vae=replace(root.vae, weights="planned"))
    with torch.device("meta"):
        parts = {
            g: registry.create(getattr(root, g))
            for g in ("vae", "conditioning", "backbone", "schedule", "loss", "method")
        }
        parts["vae"].requires_grad_(False).eval()
        parts["features"] = root.features and freeze(registry.create(root.features))
        if root.adapter is not None:
            adapter = registry.create(replace(root.adapter, weights=None))
            adapter.apply(parts["backbone"], root.backbone.adapter_targets(), dtype_of(root))
    if half:
        for part in modules_of(parts):
            for parameter in part.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype_of(root))
    return parts


def networks_of(root: Root) -> dict[str, dict[str, Any]]:
    """Backbone, conditioning and slots of each role of the method, by role, on the meta device.

    The network of a run has the sizes and slots recorded there; other slots are those of the
    student, None. The EMA has no entry: it has no weights beyond those of the average.
    """
    roles, found = root.method.roles(), {}
    for name, role in roles.items():
        if role.kind == AVERAGE:
            continue
        path = Path((role if role.kind == FROZEN else roles.get(role.start, role)).weights or "")
        run = wire(read_root(path)) if (path / "config.yaml").is_file() else None
        parts = parts_of(replace(run.root if run else root, adapter=None))
        found[name] = {g: parts[g] for g in ("conditioning", "backbone")}
        found[name]["slots"] = run.slots[0] if run else None
        for module in modules_of(found[name]):
            module.requires_grad_(False)
    return found


def trained_in(root: Root, networks: dict[str, dict[str, Any]]) -> list[nn.Module]:
    """Modules of the networks that train in turn with the student."""
    roles = root.method.roles()
    return [m for n, own in networks.items() if roles[n].kind == TRAINED for m in modules_of(own)]


def dtype_of(root: Root) -> torch.dtype:
    return DTYPES[root.precision]


def checkpointing_field(root: Root) -> str | None:
    """Name of the backbone's activation checkpointing setting; None without one."""
    names = {f.name for f in fields(root.backbone)}
    return next((name for name in CHECKPOINTING if name in names), None)


def modules_of(parts: dict[str, Any]) -> list[nn.Module]:
    return [parts[g] for g in GROUPS if isinstance(parts.get(g), nn.Module)]


def needs_first_stage(root: Root) -> bool:
    """Whether a training step runs the first stage."""
    return "stored" not in root.data.provides() or root.conditioning.encodes()


def counts(root: Root, parts: dict[str, Any]) -> list[Count]:
    """A row per component with weights."""
    rows = []
    for group in GROUPS:
        module = parts[group]
        if not isinstance(module, nn.Module):
            continue
        trained = [p for p in module.parameters() if p.requires_grad]
        frozen = [p for p in module.parameters() if not p.requires_grad]
        buffers = list(module.buffers())
        numbers = [sum(x.numel() for x in xs) for xs in (trained, frozen, buffers)]
        if any(numbers):
            rows.append(Count(
                group, getattr(root, group).plugin.rpartition("/")[2], *numbers,
                bytes_trained=_bytes(trained), bytes_fixed=_bytes([*frozen, *buffers]),
                is_resident=group != "vae" or needs_first_stage(root),
            ))  # fmt: skip
    for name, own in networks_of(root).items():
        weights = [p for m in modules_of(own) for p in m.parameters()]
        buffers = [b for m in modules_of(own) for b in m.buffers()]
        numbers = [sum(x.numel() for x in xs) for xs in (weights, buffers)]
        is_trained = root.method.roles()[name].kind == TRAINED
        rows.append(Count(
            "method", name, numbers[0] * is_trained, numbers[0] * (not is_trained), numbers[1],
            bytes_trained=_bytes(weights) * is_trained,
            bytes_fixed=_bytes(weights) * (not is_trained) + _bytes(buffers), is_resident=True,
        ))  # fmt: skip
    return rows


def _bytes(tensors: list[Any]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def optimizer_bytes(root: Root, parts: dict[str, Any]) -> int:
    """Bytes of the optimizer state, after a first step on meta tensors."""
    modules = [*modules_of(parts), *(m.train() for m in trained_in(root, networks_of(root)))]
    for module in modules[len(modules_of(parts)) :]:
        module.requires_grad_(True)
    named = [(n, p) for m in modules for n, p in m.named_parameters() if p.requires_grad]
    optimizer = registry.create(root.optimizer).build(named, 1e-4)
    for _, parameter in named:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    kept = [x for state in optimizer.state.values() for x in state.values()]
    return _bytes([x for x in kept if isinstance(x, Tensor) and x.ndim])  # without step counters


def ema_bytes(root: Root, parts: dict[str, Any]) -> int:
    """Bytes of the EMA weights; 0 without EMA."""
    average = EMA.of(nn.ModuleList(modules_of(parts)), registry.create(root.ema))
    return 0 if average is None else _bytes([x for one in average.averages() for x in one.values()])


def largest_unit(parts: dict[str, Any]) -> int:
    """Trained parameters of the largest block, which FSDP gathers at a time."""
    blocks = [
        block
        for part in modules_of(parts)
        for module in part.modules()
        if isinstance(module, nn.ModuleList)
        for block in module
    ]
    sizes = [sum(p.numel() for p in b.parameters() if p.requires_grad) for b in blocks]
    return max(sizes, default=0)


# --- a step ---------------------------------------------------------------------------------------


Encoded = tuple[Measured, Tensor]  # of the first stage, and its latents


def measure_encoding(root: Root, sizes: Sizes) -> Encoded | None:
    """Measures the encoding before the backbone; None with cached latents."""
    if "stored" in root.data.provides():
        return None
    first_stage = parts_of(root)["vae"]
    made: list[Tensor] = []

    def step() -> Tensor:
        made.append(latents())
        return made[0]

    with plain_kernels(), on_fake_device(first_stage):
        latents, inputs = first_stage_step(first_stage, sizes)
        return measure_as(root, step, [first_stage], inputs), made[0]


def measure_step(
    root: Root,
    sizes: Sizes,
    checkpointing: bool | None = None,
    half: bool = False,
    before: Encoded | None = None,
) -> Measured:
    """Measures one training step of `root` (model.latent_diffusion), forward and backward.

    Conditions are empty tensors of the right shapes; their encoders are not measured. Deep networks
    are extrapolated from three small depths if possible. `before`: from `measure_encoding`.
    """
    before = before or measure_encoding(root, sizes)

    def at(backbone: Any) -> Measured:
        return step_of(replace(root, backbone=backbone), sizes, checkpointing, half, before)

    found = from_shallow(root.backbone, at) or at(root.backbone)
    return found if before is None else before[0].then(found)


def from_shallow(backbone: Any, at: Callable[[Any], Measured]) -> Measured | None:
    """Extrapolates `at(backbone)`; None if it is not deep, or the extrapolation fails."""
    name, period = backbone.layers()
    if name is None:
        return None
    layers = getattr(backbone, name)
    first = 2 * period + layers % period
    depths = [first + i * period for i in range(3)]
    if layers <= sum(depths):
        return None
    return extrapolate(
        [at(replace(backbone, **{name: n})) for n in depths], (layers - first) // period
    )


def step_of(
    root: Root, sizes: Sizes, checkpointing: bool | None, half: bool, before: Encoded | None
) -> Measured:
    """Measures the step after the first stage, at the configured depth."""
    parts, networks = parts_of(root, checkpointing, half), networks_of(root)
    others = [m for own in networks.values() for m in modules_of(own)]
    modules = [*modules_of(parts), *others]
    with plain_kernels(), on_fake_device(*modules):
        conditioning = parts["conditioning"]
        weights = conditioning.parameters() if isinstance(conditioning, nn.Module) else ()
        cond = conditions(sizes, any(p.requires_grad for p in weights))
        step, inputs = training_step(root, parts, sizes, cond, before, networks)
        held = [*inputs, *(x for _, x in cond.tensors())]
        found = measure_as(root, step, modules, held)
        trained = trained_in(root, networks)
        for module in trained:
            module.requires_grad_(True)
        for name, role in root.method.roles().items():
            if role.kind == TRAINED:
                own = training_step(root, parts, sizes, cond, before, networks, name)[0]
                found = found.and_then(measure_as(root, own, modules, held), role.turns)
        return found


def measure_as(
    root: Root, step: Callable[[], Tensor], modules: list[nn.Module], inputs: list[Tensor]
) -> Measured:
    """Measures a step with the precision and the device of `root`."""
    narrow = None if root.precision == "fp32" else dtype_of(root)
    return measure(step, modules, inputs, narrow, root.trainer.accelerator != "cpu")


def plain_kernels() -> Any:
    """A context in which kernels run eagerly: fused ones need their device."""
    eager = replace(
        registry.default("kernels", "auto"), group_norm="eager", temporal_attention="eager"
    )
    return registry.create(eager).apply()


def first_stage_step(first_stage: Any, sizes: Sizes) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A function that encodes one micro-batch, and its input pixels."""
    clip = sizes.clip
    video = torch.empty(sizes.batch, clip.channels, clip.frames, clip.height, clip.width)

    def latents() -> Tensor:
        with torch.no_grad():
            posterior = first_stage.encode(video)
            z = first_stage.scaled(posterior.sample(torch.empty_like(posterior.mean)))
        padding = sizes.grid.frames - z.shape[2]
        return torch.cat([z[:, :, :1].expand(-1, -1, padding, -1, -1), z], 2) if padding else z

    return latents, [video]


def training_step(
    root: Root,
    parts: dict[str, Any],
    sizes: Sizes,
    cond: Conditions,
    before: Encoded | None = None,
    networks: Mapping[str, dict[str, Any]] | None = None,
    role: str = STUDENT,
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A function that computes the loss of one micro-batch for a role, and its input tensors.

    `before`: use empty latents of its layout instead of encoding.
    """
    networks = networks or {}
    backbones = {n: own["backbone"] for n, own in networks.items()}
    conds = {n: conditions(replace(sizes, slots=own["slots"] or sizes.slots))
             for n, own in networks.items()}  # fmt: skip
    backbones = {STUDENT: parts["backbone"].train(), **backbones}
    model = PlannedModel(parts, backbones, root.backbone)
    method, draws = parts["method"], EmptyDraws(sizes.batch)
    if "stored" in root.data.provides():
        z = sizes.grid
        stored = torch.empty(sizes.batch, z.channels, z.frames, z.height, z.width)
        latents, inputs = (lambda: stored), [stored]
    elif before is not None:
        z0 = before[1]
        layout = z0.shape, z0.stride()
        latents, inputs = (lambda: torch.empty_strided(*layout, dtype=z0.dtype)), []
    else:
        latents, inputs = first_stage_step(parts["vae"], sizes)

    def step() -> Tensor:
        z0 = latents()
        read = partial(planned_features, parts["features"], z0, sizes.clip)
        signals = root.conditioning.signals()
        example = PlannedExample(z0, {STUDENT: cond, **conds}, signals, read)
        if role == STUDENT:
            return method(model, example, draws).total
        return method.update(role, 0, model, example, draws).total

    return step, inputs
