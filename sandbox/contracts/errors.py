"""Errors by who can fix them; each ends the program with its own exit code."""

from typing import ClassVar


class SandboxError(Exception):
    """An error that ends the program with `exit_code`.

    All its data are in `args`, so that it survives pickling.
    """

    exit_code: ClassVar[int] = 1


class ConfigError(SandboxError):
    """The settings are wrong (exit code 2); one line for each problem, with its fix."""

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
        Exception.__init__(self, field, value, rule)  # pickling calls __init__ with these
        self.field, self.value, self.rule = field, value, rule

    @property
    def problems(self) -> tuple[str, ...]:
        return (str(self),)

    def __str__(self) -> str:
        return f"{self.field}={self.value}: want {self.rule}"


class PluginError(SandboxError):
    """A plugin is missing, broken or registered twice (exit code 2)."""

    exit_code = 2


class PluginFault(SandboxError):
    """The code of a plugin raised an unexpected error (exit code 1); `traceback`: where."""

    def __init__(self, message: str, traceback: str = "") -> None:
        super().__init__(message, traceback)

    @property
    def traceback(self) -> str:
        return self.args[1]

    def __str__(self) -> str:
        return self.args[0]


class DataError(SandboxError):
    """The data are missing, empty, or have more bad items than allowed (exit code 3)."""

    exit_code = 3


class Diverged(SandboxError):
    """The loss or a gradient is not finite (exit code 4)."""

    exit_code = 4


class StorageError(SandboxError):
    """A file cannot be written, is broken, or has another format (exit code 5)."""

    exit_code = 5


class Preempted(SandboxError):
    """The run received a stop request and saved; the same command resumes it (exit code 75)."""

    exit_code = 75


class BadItem(Exception):
    """An item of a data set is unusable (corrupt, too short).

    The loader skips it, counts it and lists it.
    """
