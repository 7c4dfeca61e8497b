"""Errors that are raised again in another process."""

import pickle

from sandbox.contracts import SandboxError


class RankError(SandboxError):
    """An unexpected error in a rank; its cause is the RemoteTraceback there, if there is one."""


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
