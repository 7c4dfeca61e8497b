"""CogVideoX's tiny recipes end to end, from a folder of videos.

All weights (2b), a LoRA on them, and an image-to-video LoRA (1.5) train, validate and sample. Their
first stage is untrained, to save time.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from sandbox.cli.jobs import perform
from sandbox.config.root import to_container
from sandbox.config.wiring import wire
from sandbox.distributed.rank import Rank
from sandbox.runs.run import Run
from sandbox.tasks.train import train as train_task
from tests.helpers import composed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with moving digits as videos in `clips`."""
    found = tmp_path_factory.mktemp("cogvideox")
    perform(wire(composed("task=clips", f"task.to={found / 'clips'}", "task.count=64")).root)
    return found


def trained(place: Path, recipe: str, *more: str) -> Path:
    root = composed(f"experiment={recipe}", f"data.root={place / 'clips'}", "logger=null",
                    "trainer.threads=1", "vae.weights=null", *more)  # fmt: skip
    root = wire(replace(root, out=str(place / "out"), cache=str(place / "cache"))).root
    done = train_task({"root": to_container(root), "overrides": [], "group": None}, Rank())
    return Path(done["folder"])


def losses(run: Path) -> list[float]:
    return [m["loss"] for m in Run(run).metrics().values() if "loss" in m]


def validated(run: Path) -> set[str]:
    return {p.name for p in (run / "samples").glob("step_*") if len([*p.glob("*.mp4")]) == 2}


@pytest.fixture(scope="module")
def whole(place) -> Path:
    return trained(place, "cogvideox_2b_sft_tiny")


def test_all_weights_learn_and_validate(whole):
    found = losses(whole)
    assert sum(found[-10:]) < 0.8 * sum(found[:10])
    assert validated(whole) == {"step_00000050", "step_00000100"}


def test_a_lora_learns_on_trained_weights(place, whole):
    run = trained(place, "cogvideox_2b_lora_tiny", "steps=50", f"init_from={whole}")
    assert len(losses(run)) == 50
    assert validated(run) == {"step_00000050"}
    with safe_open(run / "pytorch_lora_weights.safetensors", "pt") as file:
        assert any(file.get_tensor(k).any() for k in file.keys() if ".lora_B." in k)  # noqa: SIM118


def test_an_image_to_video_lora_starts_from_an_image_to_video_network(place):
    recipe = "cogvideox_1_5_5b_i2v_lora_tiny"
    base = trained(place, recipe, "adapter=null", "steps=5", "callbacks=[]")
    run = trained(place, recipe, "steps=50", f"init_from={base}")
    assert validated(run) == {"step_00000050"}
