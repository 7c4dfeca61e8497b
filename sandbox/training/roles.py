"""Builds the networks of the roles that a training method and a guidance declare."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandbox.config.root import Root
from sandbox.contracts import FROZEN, STUDENT, TRAINED, ConfigError, Role, SandboxError
from sandbox.model.roles import Network, NetworkUpdate
from sandbox.runs.lookup import check_same_system, find_run, read_root
from sandbox.runs.run import Run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sandbox.model.latent_diffusion import LatentDiffusion

SHARED = ("vae", "schedule")  # groups in which a network of a role equals the student's


def check_roles(root: Root) -> None:
    """Raises ConfigError where a role's run has another latent space or another target.

    Reads the recorded settings of the runs alone.
    """
    for role in _frozen_roles(root):
        path = Path(role.weights or "")
        if Run(path).config_file.is_file():
            with _named(role):
                folder = find_run(root.out, str(path))
                check_same_system(folder, read_root(folder), root, SHARED)


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
    from sandbox.training.build import initialised_system, load_system

    path = Path(role.weights or "")
    with _named(role):
        if Run(path).config_file.is_file():
            found = load_system(path)
            system.check_frozen(system.frozen_hashes() | found.first_stage_hash())
        else:
            found = initialised_system(_of_file(system, path))
    return Network(found.backbone, found.conditioner).freeze()


def _of_file(system: LatentDiffusion, path: Path) -> Any:
    """The wiring of the student with weights from a file and without roles."""
    from dataclasses import replace

    from sandbox.config import registry

    plain = {
        "method": registry.default("method", "denoising"),
        "guidance": registry.default("guidance", "none"),
    }
    root = replace(system.wiring.root, init_from=str(path), adapter=None, **plain)
    return replace(system.wiring, root=root)


def _frozen_roles(root: Root) -> Iterator[Role]:
    roles = (*root.method.roles().values(), *root.guidance.roles().values())
    yield from (role for role in roles if role.kind == FROZEN)


@contextmanager
def _named(role: Role) -> Iterator[None]:
    """Errors inside the block name the setting of the role."""
    try:
        yield
    except SandboxError as e:
        lines = [str(text).replace("init_from=", f"{role.setting}=") for text in e.args]
        prefixed = [
            x if role.setting in x else f"{role.setting}={role.weights}: {x}" for x in lines
        ]
        raise (ConfigError if isinstance(e, ConfigError) else type(e))(*prefixed) from e
