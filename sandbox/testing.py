"""Public: what tests of plugins use besides `sandbox`, `sandbox.contracts` and `sandbox.registry`.

Keyed: random draws that depend on seed, name and position alone; open_run, open_root: run folders;
start, fit: a training run in this process; perform: the task of a configuration.
"""

from sandbox.cli.jobs import perform
from sandbox.config.root import to_container
from sandbox.data.randomness import Keyed
from sandbox.runs.run import open_root, open_run
from sandbox.training.loop import fit
from sandbox.training.state import start

__all__ = ["Keyed", "fit", "open_root", "open_run", "perform", "start", "to_container"]
