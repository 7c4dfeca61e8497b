"""What a user gets wrong, and what they are told: the setting as typed, and the cure.

Each row is a command line, as a shell would hand it over, with the exit code and the words that
must be said. Rows of the first table are refused before anything is built.
"""

# ruff: noqa: E501 (a row of a table is a line)
from __future__ import annotations

import os
import pickle
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox.cli.command_line import parse
from sandbox.cli.errors import BUG, report
from sandbox.cli.jobs import check
from sandbox.cli.main import _main, main
from sandbox.config import composition, discovery
from sandbox.config.paths import CHECKOUT
from sandbox.contracts import ConfigError, DataError, PluginError, SandboxError, StorageError
from sandbox.distributed.remote_errors import RankError, RemoteTraceback
from sandbox.runs.lookup import inherited_options

AT_ONCE: list[tuple[str, tuple[str, ...]]] = [
    # names
    ("backbon=dit", ("backbon", "'backbone'")),
    ("backbone=dti", ("backbone=dti: no such option", "'dit'")),
    ("vae=stable_diffusion", ("vae=stable_diffusion", "; there is ", "identity, kl")),
    ("backbone.widht=128", ("backbone.widht: backbone=dit has no such setting", "'width'")),
    ("ema=none ema.decay=0.9", ("ema.decay", "ema=none has no such setting")),
    ("width=128", ("width: no such setting of the run", "backbone.width")),
    ("task=sample prompt=[a]", ("prompt: no such setting; did you mean 'prompts'?",)),
    ("frames=16", ("frames", "did you mean data.frames?")),
    ("learning_rate=1e-4", ("learning_rate: no such setting", "lr")),
    ("optimizer.lr=1e-4", ("optimizer.lr: optimizer=adamw has no such setting",)),
    ("experiment=digitslong", ("experiment=digitslong: no such option", "'digits_long'")),
    ("debug=fst", ("debug=fst: no such option", "'fast'")),
    ("task=generate", ("task=generate: no such option", "sample")),
    ("callbacks=[sample]", ("callbacks=sample: no such option", "'samples'")),
    ("callbacks.samples.every=3", ("callbacks.samples.every=3", "add 'callbacks=[samples]'")),
    ("logger=null logger.mode=offline", ("logger.mode=offline", "logger=null has no settings", "logger=csv")),
    ("hydra/launcher=slurmm", ("hydra/launcher=slurmm: no such option", "slurm")),
    ("+notes=mine", ("notes: no such setting",)),
    ("+backbone.notes=mine", ("backbone.notes: no such setting",)),
    ("--multirum lr=1,2", ("--multirum: no such flag", "'--multirun'")),
    # how it is written
    ("lr", ("lr: want NAME=VALUE",)),
    ("lr = 1e-4", ("lr = 1e-4: no spaces around '='", "lr=1e-4")),
    ("lr=", ("lr=: want a number or null",)),
    ("lr=1e-4 lr=1e-5", ("lr=1e-4 lr=1e-5: lr is given twice; keep one",)),
    ("lr=1e-4,1e-5", ("lr=1e-4,1e-5: several values need -m",)),
    ("task=sample prompts=[a red 3, a blue 4]", ("prompts=[a red 3, a blue 4]: quote it for the shell",)),
    ("task=sample 'prompts=a red 3'", ("prompts=a red 3: want a list: 'task.prompts=[a red 3]'",)),
    ("task=sample 'prompts=[a red 3'", ("prompts=[a red 3: unclosed bracket or quote",)),
    ("'optimizer.betas=(0.9,0.99)'", ("want a list in brackets: 'optimizer.betas=[0.9,0.99]'",)),
    ("backbone={widht:64}", ("backbone={widht:64}: no such setting 'widht'; did you mean 'width'?",)),
    ("backbone=64", ("backbone=64: no such option; there is ", "dit, ")),
    ("'backbone=[dit,dit_b2]'", ("backbone=[dit,dit_b2]: want one option, not a list",)),
    ("logger=None", ("logger=None: no such option", "; write logger=null to leave the group empty")),
    ("vae.weights=None", ("vae.weights='None'", "want null for an empty value")),
    ("lr=None", ("lr=None: want a number or null; write null for an empty value",)),
    ("~backbone.width", ("~backbone.width: a setting cannot be removed",)),
    ("+experiment=digits_long", ("write it without +: experiment=digits_long",)),
    ("'lr=${peak}'", ("lr", "Interpolation key 'peak' not found")),
    # types and ranges
    ("lr=fast", ("lr=fast: want a number or null",)),
    ("lr=nan", ("lr=nan: want a number >= 0",)),
    ("lr=-1e-4", ("lr=-0.0001: want a number >= 0",)),
    ("steps=0", ("steps=0: want >= 1",)),
    ("steps=1e3", ("steps=1e3: want an integer or null",)),
    ("seed=-1", ("seed=-1: want 0 to 4294967295",)),
    ("precision=fp8", ("precision='fp8': want one of ['fp32', 'bf16', 'fp16']",)),
    ("backbone.width=64.5", ("backbone.width=64.5: want an integer",)),
    ("optimizer.betas=[0.9]", ("optimizer.betas=[0.9]: want 2 entries",)),
    ("optimizer.betas=0.9", ("optimizer.betas=0.9: want a list: 'optimizer.betas=[0.9]'",)),
    ("ema.decay=1.5", ("ema.decay=1.5: want",)),
    ("sampler.steps=0", ("sampler.steps=0: want 1 to",)),
    ("trainer.clip=nan", ("trainer.clip=nan",)),
    ("data.batch_size=0", ("data.batch_size=0: want >= 1",)),
    ("recipe=my/run", ("recipe='my/run'", "it names a folder")),
    # sizes that do not fit
    ("data.width=32 data.frames=8", ("data.frames=8 does not fit vae=pca, which wants 1 plus a multiple of 4",
                       "use data.frames=5 or data.frames=9")),
    ("vae=magvit data.frames=7", ("data.frames=7 does not fit vae=magvit", "data.frames=9")),
    ("vae=kl data.height=18", ("data.height=18 does not fit vae=kl, which wants a multiple of 4",
                               "use data.height=16 or data.height=20")),
    ("data.height=18 data.width=30", ("data.height=18 does not fit", "data.width=30 does not fit")),
    ("backbone.patch=3", ("data.height=16: clips of 3x9x16x16 become latents of 32x3x4x4 with vae=pca",
                          "height 4 does not fit backbone=dit, which wants a multiple of 3", "data.height=24")),
    ("backbone.num_heads=3", ("backbone.width=64: want a multiple of num_heads=3",)),
    # what does not go together
    ("backbone.context_dim=99", ("backbone.context_dim=99, but 0 is needed", "conditioning=words offers vector=64",
                                 "null derives the value")),
    ("backbone.scalars=[fps]", ("backbone=dit needs fps", "conditioning=words offers vector")),
    ("data=video_folder data.captions=none", ("conditioning=words needs captions, but data=video_folder provides",
                                              "conditioning=none or other data")),
    ("schedule=ddpm schedule.zero_terminal_snr=true", ("schedule.prediction='eps'", "zero_terminal_snr=false")),
    ("loss=ldm", ("loss=ldm: needs a schedule with integer times; want schedule=ddpm", "schedule=flow")),
    ("sampler=cogvideox_dpm", ("sampler=cogvideox_dpm: needs integer times; want schedule=ddpm",)),
    ("trainer.processes=2", ("trainer.processes=2: want 1, or trainer=ddp",)),
    ("metric=digits data=video_folder", ("metric=digits needs", "data=video_folder provides", "metric=null")),
    ("resume.allow=[lr]", ("resume.allow=['lr']: only with resume.run=FOLDER",)),
    ("init_from=a.ckpt resume.run=b", ("init_from=a.ckpt and resume.run=b", "starts a new run at step 0")),
    ("backbone=null", ("backbone=null: want one of ", "dit, ")),
    ("data.root=/somewhere", ("data.root='/somewhere': want null",)),
    # what is not there
    ("init_from=lost.ckpt", ("init_from=lost.ckpt: no such file",)),
    ("vae=kl vae.weights=lost.safetensors", ("vae.weights=lost.safetensors: no such file",)),
    ("task=sample", ("no finished run in out=outputs", "python run.py")),
    ("task=evaluate run=lost", ("task.run=lost: no run there",)),
    ("plugins_path=lost", ("plugins_path=lost: no such folder", "GROUP/NAME.py")),
    ("-cd lost", ("--config-dir lost: no such folder",)),
    ("-cn lost", ("--config-name lost: no such file; there is config",)),
    ("task=new", ("task.group=null", "task.name=null")),
]  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check_line(words: list[str]) -> None:
    """What the command does before it starts anything."""
    line = parse(words)
    discovery.setup(line.overrides)
    overrides = composition.expand_shorthands(line.overrides)
    check(line.compose([*inherited_options(overrides), *overrides]), overrides)


@pytest.mark.parametrize(("typed", "said"), AT_ONCE, ids=lambda v: v if isinstance(v, str) else "")
def test_a_mistake_is_named_with_its_cure_before_anything_is_built(here, typed, said):
    with pytest.raises((ConfigError, PluginError)) as e:
        check_line(shlex.split(typed))
    text = str(e.value)
    for words in said:
        assert words in text, text
    assert e.value.exit_code == 2
    assert all(len(p) <= 400 for p in e.value.args), "at most five lines of 80"
    assert not list(here.iterdir())


def test_what_a_machine_cannot_do_is_said():
    """On a machine with Triton and a GPU the same line runs."""
    typed = ["kernels=triton"]
    try:
        check_line(typed)
    except ConfigError as e:
        assert "kernels.group_norm=triton" in str(e) and "kernels=" in str(e)


# --- while it runs --------------------------------------------------------------------------------


class Payload:
    """A pickle of this would write a file."""

    def __reduce__(self):
        return (open, ("ran", "w"))


def make_files(folder: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"first.basis": np.zeros((2, 2), "float32")}, folder / "foreign.safetensors")
    (folder / "payload.ckpt").write_bytes(pickle.dumps(Payload(), protocol=2))
    (folder / "notes.txt").write_text("no weights")
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "broken.mp4").write_bytes(b"not a video")
    (folder / "file").write_text("a file and not a folder")


FAST = ["debug=fast", "vae.weights=null", "task.untrained=false", "task.samples=0", "data.batch_size=2",
        "backbone.width=8", "conditioning.width=8"]  # fmt: skip
WHILE_RUNNING: list[tuple[str, type[SandboxError], tuple[str, ...]]] = [
    ("data=video_folder data.root=lost", ConfigError, ("data.root=lost: no such file or folder",)),
    ("data=video_folder", ConfigError, ("data.root=null: name the file or folder",)),
    ("data=webvid data.root=full data.meta_path=lost.csv", ConfigError,
     ("data.meta_path=lost.csv: no such file or folder",)),
    ("data=video_folder data.root=empty", DataError, ("data.root=empty: no file for 'train'",)),
    ("data=video_folder data.root=file", DataError, ("data.root=file",)),
    ("data=moving_digits data.clips_per_epoch=64 data.batch_size=100", DataError,
     ("data.batch_size=100 needs 100 clips, there are 64: set data.batch_size=64",)),
    ("out=file", StorageError, ("file: cannot be written", "out=")),
    ("out=file/below", StorageError, ("file/below: cannot be written",)),
    ("vae.weights=foreign.safetensors", StorageError,
     ("vae.weights=foreign.safetensors", "names or shapes differ", "first.basis")),
    ("vae.weights=payload.ckpt", StorageError, ("payload.ckpt", "none of it was run", ".safetensors")),
    ("vae.weights=notes.txt", StorageError, ("notes.txt: not a readable file of weights: it is a text",)),
    ("cache=file vae.weights=auto", ConfigError, ("cache=file: cannot be written",)),
    ("resume.run=lost", ConfigError, ("resume.run=lost: no run there",)),
    ("task=train_vae vae=pca", ConfigError, ("vae=pca: cannot be trained",)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("typed", "kind", "said"), WHILE_RUNNING, ids=lambda v: v if isinstance(v, str) else ""
)
def test_a_mistake_that_shows_only_in_the_world_has_its_exit_code(here, typed, kind, said):
    make_files(here)
    words = shlex.split(typed)
    given = {w.partition("=")[0] for w in words}
    fast = [] if "task" in given else [w for w in FAST if w.partition("=")[0] not in given]
    with pytest.raises(kind) as e:
        _main([*words, *fast])
    for text in said:
        assert text in str(e.value), str(e.value)
    assert not (here / "ran").exists()


# --- the whole program ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "code", "said"),
    [
        ("backbone.widht=3 lrr=1", 2, ["2 errors:", "  - backbone.widht", "  - lrr"]),
        ("seed=-1", 2, ["error: seed=-1: want 0 to 4294967295"]),
        ("-m lr=1e-5,abc", 2, ["error: job 1: lr=abc: want a number or null", "none of the 2 jobs was started"]),
    ],
)  # fmt: skip
def test_a_shell_sees_a_short_message_and_the_exit_code(tmp_path, typed, code, said):
    done = subprocess.run(
        [sys.executable, str(CHECKOUT / "run.py"), *shlex.split(typed)], cwd=tmp_path,
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    lines = done.stderr.splitlines()
    assert done.returncode == code and done.stdout == ""
    assert len(lines) == len(said) and all(
        a.startswith(b) for a, b in zip(lines, said, strict=True)
    )


def test_an_error_keeps_to_one_line_for_each_problem(here, capsys):
    with pytest.raises(SystemExit) as e:
        main(["lrr=3", "vae=kl", "data.height=18", "seed=-1"])
    assert e.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 4


def test_an_unexpected_error_of_a_worker_process_is_shown_with_its_traceback(capsys):
    error = RankError("rank 1: ValueError: x")
    error.__cause__ = RemoteTraceback("rank 1:\nin the middle of a step\n")
    report(error)
    said = capsys.readouterr().err
    assert said == f"rank 1:\nin the middle of a step\nerror: rank 1: ValueError: x\n{BUG}\n"
