"""The base class of every plugin's Config."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from sandbox.contracts.errors import ConfigError

ADDED = "added"  # key in the metadata of a field


def added(default: Any, older: Callable[[Mapping[str, Any]], Any] | None = None) -> Any:
    """The default of a setting that joins a Config after runs were made with it.

    At this default the setting is left out of hashes: `v_posterior: float = added(0.0)`. Older runs
    count as made with the default, or with `older(settings)` where some behaved in another way.
    """
    return field(default=default, metadata={ADDED: older or (lambda _: default)})


@dataclass
class PluginConfig:
    """Base of every plugin's `Config`. The registry sets `plugin` ("vae/magvit")."""

    imports: ClassVar[tuple[str, ...]] = ()  # slow packages, which a multirun imports once
    # Settings that can change without invalidating a run's weights: training, memory, sizes. All
    # other settings of vae, conditioning, backbone and schedule must match.
    may_differ: ClassVar[tuple[str, ...]] = ()
    plugin: str = ""

    def problems(self) -> Iterator[str]:
        """Every invalid value, one line each, starting with the field: "act='relu': want ..."."""
        yield from ()

    def files(self) -> dict[str, str | None]:
        """Settings that name a file or folder that must exist before a run, with their values.

        None means that the setting is required. Relative paths are resolved against the directory
        in which the run was started. For task, conditioning, adapter, reconstruction, metric and
        data, the task that uses the files checks them: a configuration can be composed, shown,
        planned and verified on a machine without them.
        """
        return {}

    def diffusers_config(self) -> dict[str, Any]:
        """The config of the equivalent diffusers class, with "_class_name".

        Empty where diffusers has no such class. Raises ConfigError for settings that the class
        does not support.
        """
        return {}

    def agree(self, **numbers: int | None) -> Self:
        """A copy whose None fields are filled from `numbers`.

        Raises ConfigError with every field that is set to another value.
        """
        wrong = [
            f"{name}={getattr(self, name)}, but {number} is needed"
            for name, number in numbers.items()
            if getattr(self, name) not in (None, number)
        ]
        if wrong:
            raise ConfigError(*wrong)
        return replace(self, **numbers)
