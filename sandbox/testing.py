"""Public helpers for tests of plugins, in addition to `sandbox`, `.contracts` and `.registry`.

Keyed: random draws that depend only on seed, name and position. open_run, open_root: open a run
folder. start, fit: train in this process. perform: run the task of a configuration.
"""

from sandbox.cli.jobs import perform
from sandbox.config.root import to_container
from sandbox.data.randomness import Keyed
from sandbox.runs.resume import open_root, open_run
from sandbox.training.loop import fit
from sandbox.training.setup import start

__all__ = ["Keyed", "fit", "open_root", "open_run", "perform", "start", "to_container"]
