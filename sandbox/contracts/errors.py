"""What goes wrong, by whose cure it is: each ends the program with an exit code of its own."""

from __future__ import annotations

from typing import ClassVar


class SandboxError(Exception):
    """An error that ends the program with its own exit code; survives pickling (all of it is in
    args).
    """

    exit_code: ClassVar[int] = 1


class ConfigError(SandboxError):
    """The user's settings are wrong (exit code 2); one line per problem, each with its cure."""

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)

    @property
    def problems(self) -> tuple[str, ...]:
        return self.args

    def __str__(self) -> str:
        return "\n".join(self.args)


class SizeError(ConfigError):
    """A component cannot process a clip of this size.

    `field` is frames, height, width or channels, and `rule` describes the allowed values. The
    wiring adds the name of the setting and searches for the nearest valid values.
    """

    def __init__(self, field: str, value: int, rule: str) -> None:
        Exception.__init__(self, field, value, rule)  # `problems` is derived from these

    @property
    def field(self) -> str:
        return self.args[0]

    @property
    def value(self) -> int:
        return self.args[1]

    @property
    def rule(self) -> str:
        return self.args[2]

    @property
    def problems(self) -> tuple[str, ...]:
        return (str(self),)

    def __str__(self) -> str:
        return f"{self.field}={self.value}: want {self.rule}"


class PluginError(SandboxError):
    """A plugin is missing, broken, or there twice (exit code 2)."""

    exit_code = 2


class DataError(SandboxError):
    """The data are missing, empty, or worse than the limit allows (exit code 3)."""

    exit_code = 3


class Diverged(SandboxError):
    """The loss or a gradient is not finite (exit code 4)."""

    exit_code = 4


class StorageError(SandboxError):
    """A file cannot be written, or one that is read is broken or foreign (exit code 5)."""

    exit_code = 5


class Preempted(SandboxError):
    """The run was asked to stop, has saved, and continues when started again (exit code 75)."""

    exit_code = 75


class BadItem(Exception):
    """One item of a data set cannot be used (corrupt, too short); the loader skips, counts and
    lists it.
    """
