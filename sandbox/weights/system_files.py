"""Published systems in one file: reading and writing their parts (group `layout`).

Reading takes tensors only and executes nothing; every name and shape must match. Frozen parts are
loaded by settings of their own (`vae.weights=FILE`, `conditioning.weights=FILE`, the same file), so
that a resumed run finds them again; here they are only compared.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sandbox.config.root import Root
from sandbox.contracts import ConfigError, State, StorageError
from sandbox.model.cached_latents import CachedLatents
from sandbox.model.latent_diffusion import LatentDiffusion
from sandbox.model.trainable import FILE_SETTINGS, Trainable
from sandbox.storage import weight_files
from sandbox.storage.published import parts_of
from sandbox.storage.weight_check import check_values, differences

ATTRIBUTES = {  # part of a layout -> attribute of a system
    "backbone": "backbone",
    "vae": "first_stage",
    "conditioning": "conditioner",
    "loss": "loss",
}
OURS = ("backbone.", "conditioner.", "loss.")  # prefixes in exported weights of this program
OTHERS = ("first_stage.", "conditioner.", "loss.")  # prefixes of all parts but the backbone
TOLERANCE = 1e-5  # of float32 tables that were computed in another order


def read(path: Path, mapped: bool = False) -> dict[str, State] | None:
    """The parts of the published file at `path`; None for other files and folders.

    `mapped` memory-maps the tensors. Raises StorageError.
    """
    if not path.is_file() or (path.suffix != ".json" and path.with_suffix(".json").is_file()):
        return None
    with weight_files.named("init_from"):
        state = weight_files.read(path, mapped)
    if all(name.startswith(OURS) for name in state):
        return None
    return parts_of(state, f"init_from={path}")


def check_sources(root: Root) -> None:
    """Raises ConfigError where a first stage would be trained although `init_from` has one."""
    if root.init_from is None or root.vae.weights != "auto" or root.vae.fitted() == "none":
        return
    if root.data.stored() is not None:
        return  # the first stage is that of the cached latents
    parts = read(Path(root.init_from), mapped=True)
    if parts and parts["vae"]:
        raise ConfigError(
            f"vae.weights=auto: init_from={root.init_from} is a published system with a first "
            f"stage of its own: use vae.weights={root.init_from}"
        )


def load_parts(system: Trainable, parts: dict[str, State], path: Path) -> str:
    """Loads the parts of the published file `path`; returns "EMA" or "live".

    Strict. Raises StorageError with the first names that differ, for another schedule, and,
    unless the system is on the meta device, where a frozen part differs from the file's.
    """
    assert isinstance(system, LatentDiffusion)
    average = {k: v for k, v in parts["ema"].items() if k not in ("decay", "num_updates")}
    parts = parts | {"backbone": parts["backbone"] | average}
    own = {k: v for k, v in system.state_dict().items() if k.startswith(OTHERS)}
    if isinstance(system.first_stage, CachedLatents):
        parts |= {"vae": {}}
        own = {k: v for k, v in own.items() if not k.startswith("first_stage.")}
    given = {
        f"{attribute}.{name}": tensor
        for part, attribute in ATTRIBUTES.items()
        for name, tensor in parts[part].items()
    }
    backbone = {f"backbone.{k}": v for k, v in system.base_state().items()}
    own |= backbone
    _check_names(given, own, path, system.root)
    check_values(f"init_from={path}", given, own)
    _check_tables(parts["schedule"], tables(system), path)
    loaded = {k: own[k] for k in own.keys() & system.trainable_state().keys()} | backbone
    for name in own.keys() - loaded.keys():
        if not own[name].is_meta and not torch.equal(own[name].cpu().float(), given[name].float()):
            part = name.partition(".")[0]
            raise StorageError(
                f"init_from={path}: {name} is frozen and differs from the file; use "
                f"{FILE_SETTINGS.get(part, part)}={path}"
            )
    for name, tensor in loaded.items():
        tensor.detach().copy_(given[name])
    system.forget_hashes()
    return "EMA" if average else "live"


def _check_names(given: State, own: State, path: Path, root: Root) -> None:
    found = differences(own, given, place="this system")
    if not found:
        return
    wrong = [k for k in own.keys() | given.keys() if k not in own or k not in given]
    wrong += [k for k in own.keys() & given.keys() if own[k].shape != given[k].shape]
    counts = Counter(name.partition(".")[0] for name in wrong)
    groups = {attribute: group for group, attribute in ATTRIBUTES.items()}
    of = ", ".join(
        f"{count} of {groups[part]}={getattr(root, groups[part]).plugin.rpartition('/')[2]}"
        for part, count in counts.most_common()
    )
    raise StorageError(
        f"init_from={path}: {found.count} names or shapes differ from this system ({of}); choose "
        f"the components and sizes of the recipe that the file is of{found.lines}"
    )


def _check_tables(given: State, own: State, path: Path) -> None:
    """A file may lack the schedule's tables, but those that it has must be equal."""
    for name in sorted(given):
        if name not in own:
            raise StorageError(
                f"init_from={path}: it has the table {name}, which this schedule lacks"
            )
        if given[name].shape != own[name].shape or not torch.allclose(
            given[name].float(), own[name], rtol=TOLERANCE, atol=TOLERANCE
        ):
            raise StorageError(
                f"init_from={path}: its table {name} differs from that of this schedule; choose "
                "the schedule that it was trained with"
            )


def tables(system: LatentDiffusion) -> State:
    """Constants of the schedule that published files contain; empty where it has none."""
    found = getattr(system.schedule, "tables", None)
    return found() if found else {}


def split(system: LatentDiffusion, ema: dict[str, Any] | None = None) -> dict[str, State]:
    """The parts of a system, for `Layout.join`; `ema` is the state of its EMA, if any.

    As published, the EMA has the backbone's weights alone.
    """
    parts = {part: _state(getattr(system, name)) for part, name in ATTRIBUTES.items()}
    parts["backbone"] = {k: v.detach() for k, v in system.base_state().items()}
    if isinstance(system.first_stage, CachedLatents):
        parts["vae"] = _state(system.first_stage.full(system.device))
    parts["schedule"], parts["ema"] = tables(system), {}
    if ema:
        parts["ema"] = {
            "decay": torch.tensor(float(getattr(system.root.ema, "decay", 0.0))),
            "num_updates": torch.tensor(ema["updates"], dtype=torch.int32),
        } | {
            k.removeprefix("backbone."): v
            for k, v in ema["average"].items()
            if k.startswith("backbone.")
        }
    return parts


def _state(part: Any) -> dict[str, Tensor]:
    has_state = callable(getattr(part, "state_dict", None))
    return {k: v.detach() for k, v in part.state_dict().items()} if has_state else {}
