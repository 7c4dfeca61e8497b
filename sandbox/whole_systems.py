"""Whole systems in one published file: into our parts, and out of them (group `layout`).

Reading takes tensors only and runs nothing; every name and shape must fit. Frozen parts come from
settings of their own (`vae.weights=FILE`, `conditioning.weights=FILE`, the same file), so that a
resumed run finds them again; here they are only compared.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sandbox import weight_files
from sandbox.config import Root
from sandbox.contracts import ConfigError, State, StorageError
from sandbox.latent_diffusion import LatentDiffusion
from sandbox.module import Trainable
from sandbox.published import parts_of
from sandbox.stored import StoredLatents

PLACES = {  # part of a layout -> attribute of a system
    "backbone": "backbone",
    "vae": "first_stage",
    "conditioning": "conditioner",
    "loss": "loss",
}
OURS = ("backbone.", "conditioner.", "loss.")  # names of exported weights of this program
OTHERS = ("first_stage.", "conditioner.", "loss.")  # names of all but the network
CURES = {"first_stage": "vae.weights", "conditioner": "conditioning.weights"}
TABLE_ERROR = 1e-5  # of float32 tables that were computed in another order


def read(path: Path, mapped: bool = False) -> dict[str, State] | None:
    """The parts of the published file at `path`; None where it is no file, ours, or of no layout.

    `mapped`: numbers are read when they are looked at. Raises StorageError.
    """
    if not path.is_file() or path.with_suffix(".json").is_file():
        return None
    state = weight_files.read(path, mapped)
    if all(name.startswith(OURS) for name in state):
        return None
    return parts_of(state, f"init_from={path}")


def check_sources(root: Root) -> None:
    """Raises ConfigError where a first stage would be trained only to differ from the file's."""
    if root.init_from is None or root.vae.weights != "auto" or root.vae.fitted() == "none":
        return
    if root.data.stored() is not None:
        return  # latents are those of the first stage that comes with them
    parts = read(Path(root.init_from), mapped=True)
    if parts and parts["vae"]:
        raise ConfigError(
            f"vae.weights=auto: init_from={root.init_from} is a published system with a first "
            f"stage of its own: use vae.weights={root.init_from}"
        )


def put(system: Trainable, parts: dict[str, State], path: Path) -> str:
    """Puts the parts of the published file `path` into `system`; says which: averaged or live.

    Strict. Raises StorageError with the first ten names that differ, where the schedule is another,
    or where a frozen part is not the file's, which a system on the meta device cannot tell.
    """
    assert isinstance(system, LatentDiffusion)
    average = {k: v for k, v in parts["ema"].items() if k not in ("decay", "num_updates")}
    parts = parts | {"backbone": parts["backbone"] | average}
    own = {k: v for k, v in system.state_dict().items() if k.startswith(OTHERS)}
    if isinstance(system.first_stage, StoredLatents):
        parts |= {"vae": {}}
        own = {k: v for k, v in own.items() if not k.startswith("first_stage.")}
    given = {
        f"{place}.{name}": tensor
        for part, place in PLACES.items()
        for name, tensor in parts[part].items()
    }
    network = {f"backbone.{k}": v for k, v in system.base_state().items()}
    own |= network
    _same_names(given, own, path, system.root)
    _same_tables(parts["schedule"], tables(system), path)
    begun = {k: own[k] for k in own.keys() & system.trainable_state().keys()} | network
    for name in own.keys() - begun.keys():
        if not own[name].is_meta and not torch.equal(own[name].cpu().float(), given[name].float()):
            place = name.partition(".")[0]
            setting = CURES.get(place, place)
            raise StorageError(
                f"init_from={path}: {name} is frozen and not that of the file; use {setting}={path}"
            )
    for name, tensor in begun.items():
        tensor.detach().copy_(given[name])
    system.forget_fingerprints()
    return "averaged" if average else "live"


def _same_names(given: State, own: State, path: Path, root: Root) -> None:
    differing = {k: f"{k} is missing" for k in own if k not in given}
    differing |= {k: f"{k} is not in this system" for k in given if k not in own}
    differing |= {
        k: f"{k} is {list(given[k].shape)} and {list(own[k].shape)} here"
        for k in own.keys() & given.keys()
        if given[k].shape != own[k].shape
    }
    if not differing:
        return
    counts = Counter(name.partition(".")[0] for name in differing)
    groups = {place: group for group, place in PLACES.items()}
    of = ", ".join(
        f"{count} of {groups[place]}={getattr(root, groups[place]).plugin.rpartition('/')[2]}"
        for place, count in counts.most_common()
    )
    raise StorageError(
        f"init_from={path}: {len(differing)} names or shapes differ from this system ({of}): "
        f"{', '.join(sorted(differing.values())[:10])}; choose the components and sizes of the "
        "recipe that the file is of"
    )


def _same_tables(given: State, own: State, path: Path) -> None:
    """A file without tables is taken; one with others was trained with another schedule."""
    for name in sorted(given):
        if name not in own:
            raise StorageError(f"init_from={path}: has the table {name}, this schedule has not")
        same = given[name].shape == own[name].shape and torch.allclose(
            given[name].float(), own[name], rtol=TABLE_ERROR, atol=TABLE_ERROR
        )
        if not same:
            raise StorageError(
                f"init_from={path}: its table {name} is not that of this schedule; choose the "
                "schedule that it was trained with"
            )


def tables(system: LatentDiffusion) -> State:
    """Constants of the schedule that published files hold; empty where it has none."""
    found = getattr(system.schedule, "tables", None)
    return found() if found else {}


def taken_apart(system: LatentDiffusion, ema: dict[str, Any] | None = None) -> dict[str, State]:
    """The parts of a system, for `Layout.join`; `ema` is the state of its average, if any.

    As published the average is that of the network alone.
    """
    parts = {part: _state(getattr(system, place)) for part, place in PLACES.items()}
    parts["backbone"] = {k: v.detach() for k, v in system.base_state().items()}
    if isinstance(system.first_stage, StoredLatents):
        parts["vae"] = _state(system.first_stage.whole())
    parts["schedule"], parts["ema"] = tables(system), {}
    if ema:
        decay = float(getattr(system.root.ema, "decay", 0.0))
        own = {
            k.removeprefix("backbone."): v
            for k, v in ema["average"].items()
            if k.startswith("backbone.")
        }
        counters = {
            "decay": torch.tensor(decay),
            "num_updates": torch.tensor(ema["updates"], dtype=torch.int32),
        }
        parts["ema"] = counters | own
    return parts


def _state(part: Any) -> dict[str, Tensor]:
    return (
        {k: v.detach() for k, v in part.state_dict().items()}
        if callable(getattr(part, "state_dict", None))
        else {}
    )
