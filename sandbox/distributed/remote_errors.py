"""Errors of another process, as this one raises them."""

from __future__ import annotations

import pickle


class FarTraceback(Exception):
    """The cause of an error that came from another process: the traceback that it has there."""

    def __str__(self) -> str:
        return self.args[0]


def survives(error: BaseException) -> bool:
    """Whether it can be sent whole, as pickle does."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # of a class that does not survive it, for reasons of its own
        return False
    return True
