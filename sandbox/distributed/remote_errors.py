"""Errors that are raised again in another process."""

import pickle

from sandbox.contracts import SandboxError

ADVICE = (
    "look for a stopped or overloaded process or machine, or raise trainer.timeout; the same "
    "command resumes"
)


class RankError(SandboxError):
    """An unexpected error in a rank; its cause is the RemoteTraceback there, if there is one."""


class RankLost(RankError):
    """A rank was killed from outside, or does not answer: not a bug, so no traceback is shown."""

    exit_code = 5


def shortened(text: str) -> str:
    """The first line of an error of a library."""
    line = text.partition("\n")[0]
    return line if len(line) <= 120 else f"{line[:117]}..."


class RemoteTraceback(Exception):
    """The cause of an error from another process: its traceback there, as text."""

    def __str__(self) -> str:
        return self.args[0]


def is_picklable(error: BaseException) -> bool:
    """Whether pickling and unpickling `error` works."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever the class of the error raises
        return False
    return True
