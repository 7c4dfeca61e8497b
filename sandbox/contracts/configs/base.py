"""What the Config of every plugin has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from sandbox.contracts.errors import ConfigError


@dataclass
class PluginConfig:
    """Base of every plugin's `Config`. `plugin` ("vae/magvit") is written by the registry, never by
    a user.
    """

    imports: ClassVar[tuple[str, ...]] = ()  # slow packages of its; a multirun imports them once
    # Settings with other values of which a run's weights still mean the same: of training alone, of
    # memory, of sizes. Of vae, conditioning, backbone and schedule no other may differ.
    may_differ: ClassVar[tuple[str, ...]] = ()
    plugin: str = ""

    def problems(self) -> Iterator[str]:
        """Every bad range, choice, length or NaN, one line each, starting with the field:
        "act='relu': want ...".
        """
        yield from ()

    def files(self) -> dict[str, str | None]:
        """Settings that name a file or folder that must be there before a run, with their values.

        Relative ones are found from the folder that the run was started from. Those of task,
        conditioning, adapter, reconstruction, metric and data are looked for where the task uses
        them, not by `problems`: a configuration can be composed, shown, planned and verified
        on a machine that has none of them. None: the setting must be given.
        """
        return {}

    def diffusers_config(self) -> dict[str, Any]:
        """What describes it in a folder of diffusers: "_class_name" and the settings of that class.

        Empty where diffusers has no such class; raises ConfigError for settings that it has not.
        """
        return {}

    def agree(self, **numbers: int | None) -> Self:
        """A copy with the fields that are None filled from `numbers`.

        Raises ConfigError that names every field whose stated value differs from the number.
        """
        wrong = [
            f"{name}={getattr(self, name)}, but {number} is needed"
            for name, number in numbers.items()
            if getattr(self, name) not in (None, number)
        ]
        if wrong:
            raise ConfigError(*wrong)
        return replace(self, **numbers)
