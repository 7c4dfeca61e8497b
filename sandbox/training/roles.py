"""Builds the networks of the roles that a training method and a guidance declare."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandbox.config import registry
from sandbox.config.root import Root
from sandbox.config.wiring import wire
from sandbox.contracts import FROZEN, STUDENT, TRAINED, ConfigError, Role, SandboxError
from sandbox.model.components import use_kernels
from sandbox.model.devices import use_threads
from sandbox.model.roles import Network, NetworkUpdate
from sandbox.runs.lookup import check_same_system, find_run, read_root
from sandbox.runs.run import Run
from sandbox.weights.init_from import check_first_stage, load_weights

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sandbox.model.latent_diffusion import LatentDiffusion

SHARED = ("vae", "schedule")  # groups in which a network of a role equals the student's


def check_roles(root: Root) -> None:
    """Raises ConfigError where the run of a role does not fit this system.

    It has another latent space or target, conditions that this data lacks, or a network that takes
    further numbers. Reads the recorded settings of the runs alone.
    """
    for role in _frozen_roles(root):
        path = Path(role.weights or "")
        if not Run(path).config_file.is_file():
            continue
        with _named(role):
            own = read_root(find_run(root.out, str(path)))
            check_same_system(path, own, root, SHARED)
            wire(replace(own, data=root.data))
            if numbers := ", ".join(own.method.scalars()):
                method = own.method.plugin.rpartition("/")[2]
                raise ConfigError(
                    f"its network takes {numbers} of method={method}; want a run of a method "
                    "without further numbers, such as method=denoising"
                )


def add_guides(system: LatentDiffusion) -> None:
    """Adds the networks of the guidance, which sampling uses."""
    for name, role in system.root.guidance.roles().items():
        system.guides[name] = _loaded(system, role)


def add_networks(system: Any) -> None:
    """Adds the networks of the training method, once the student has its initial weights."""
    method = getattr(system, "method", None)
    roles: Mapping[str, Role] = method.cfg.roles() if method else {}
    for name, role in roles.items():
        if role.kind == FROZEN:
            system.networks[name] = _loaded(system, role)
    for name, role in roles.items():
        if role.kind == TRAINED:
            start = Network(system.backbone, system.conditioner)
            start = start if role.start == STUDENT else system.networks[role.start]
            system.networks[name] = start.copy()
            system.updates[name] = NetworkUpdate(system.networks[name], role.lr)
    if roles:
        system.forget_hashes()


def _loaded(system: LatentDiffusion, role: Role) -> Network:
    """The frozen network with the EMA weights of a run, or with those of a file.

    A run has its own sizes and conditioning, a file those of the student. Raises StorageError where
    its first stage is another one.
    """
    from sandbox.training.build import build_system, load_system

    path, root = Path(role.weights or ""), system.wiring.root
    with _named(role):
        if Run(path).config_file.is_file():
            found = load_system(path)
            system.check_frozen(system.frozen_hashes() | found.first_stage_hash())
        else:
            parts = {"method": "denoising", "guidance": "none"}
            plain = {group: registry.default(group, name) for group, name in parts.items()}
            own = replace(root, adapter=None, **plain)
            found = build_system(replace(system.wiring, root=own), empty=True)
            load_weights(found, path)
            check_first_stage(found, path)
    use_threads(root)  # instead of those of the run
    use_kernels(root)
    return Network(found.backbone, found.conditioner).freeze().cpu()


def _frozen_roles(root: Root) -> Iterator[Role]:
    roles = (*root.method.roles().values(), *root.guidance.roles().values())
    yield from (role for role in roles if role.kind == FROZEN)


@contextmanager
def _named(role: Role) -> Iterator[None]:
    """Errors inside the block name the setting of the role."""
    where = f"{role.setting}={role.weights}"
    try:
        yield
    except SandboxError as e:
        lines = [str(text).replace("init_from=", f"{role.setting}=") for text in e.args]
        raise type(e)(*(x if role.setting in x else f"{where}: {x}" for x in lines)) from e
