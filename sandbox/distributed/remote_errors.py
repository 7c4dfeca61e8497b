"""Errors that are raised again in another process."""

import pickle

from sandbox.contracts import SandboxError


class RankError(SandboxError):
    """An unexpected error in a rank; `traceback` is the rank's, if there is one."""

    traceback = ""


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
