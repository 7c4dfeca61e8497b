"""The tiny recipes of CelebAHQ-LDM-VQ-4: they train, sample, score, and run their callbacks.

With fewer steps than the recipes, so that the file takes a minute.
"""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from sandbox.cli.jobs import perform, resolve_run
from sandbox.config import registry
from sandbox.storage import checkpoint
from tests.helpers import composed

pytestmark = pytest.mark.slow
STEPS = 60
OFTEN = (
    f"steps={STEPS}", "logger=null", "trainer.threads=1", "checkpoint.every=10",
    "callbacks.val_loss.every=10", "callbacks.images.every=30", "callbacks.images.max_images=4",
)  # fmt: skip
ROWS = {
    "samples": "sheet.png",
    "reconstruction": "reconstruction.png",
    "diffusion_row": "diffusion_row.png",
    "progressive_row": "progressive_row.png",
    "samples_x0_quantized": "samples_x0_quantized.png",
    "samples_inpainting": "samples_inpainting.png",
    "samples_outpainting": "samples_outpainting.png",
}


def places(folder: Path) -> list[str]:
    return [f"out={folder}", f"cache={folder}/cache"]


def metrics(folder: Path) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["step"], {}).update(row)
    return found


def kept(folder: Path) -> dict[int, dict[str, float]]:
    """Checkpoint step -> notes of its manifest."""
    said = [checkpoint.manifest(p) for p in checkpoint.checkpoints(folder / "checkpoints")]
    return {m["step"]: m["notes"] for m in said}


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory) -> Path:
    """Folder of a trained first stage."""
    root = composed(
        "experiment=ldm_celebahq_vq4_first_stage_tiny",
        *places(tmp_path_factory.mktemp("first_stage")), *OFTEN,
    )  # fmt: skip
    return Path(perform(root)["folder"])


@pytest.fixture(scope="module")
def run(first_stage, tmp_path_factory) -> Path:
    """Folder of a system that was trained on it."""
    weights = first_stage / "first_stage.safetensors"
    root = composed(
        "experiment=ldm_celebahq_vq4_tiny", f"vae.weights={weights}",
        *places(tmp_path_factory.mktemp("run")), *OFTEN,
    )  # fmt: skip
    return Path(perform(root)["folder"])


def test_a_first_stage_learns_with_its_discriminator(first_stage):
    rows = metrics(first_stage)
    assert rows[STEPS]["rec_loss"] < 0.7 * rows[1]["rec_loss"]
    assert rows[STEPS]["disc_loss"] > 0
    assert json.loads((first_stage / "result.json").read_text())["psnr_db"] > 10


def test_a_first_stage_keeps_the_last_and_the_three_best_by_rec_loss(first_stage):
    measured = {
        s: m["val/rec_loss"] for s, m in metrics(first_stage).items() if "val/rec_loss" in m
    }
    assert [*measured] == [*range(10, STEPS + 1, 10)]
    best = sorted(measured, key=measured.__getitem__)[:3]
    assert set(kept(first_stage)) == {*best, STEPS}


def test_reconstructions_are_saved_while_a_first_stage_trains(first_stage):
    names = sorted(p.name for p in (first_stage / "samples").iterdir())
    assert names == ["step_00000030", "step_00000060"]
    assert Image.open(first_stage / "samples/step_00000030/reconstruction.png").size[0] > 50


def test_a_system_learns(run):
    """A network that outputs zero has loss 1."""
    rows = metrics(run)
    assert rows[1]["loss_simple"] > 0.9
    assert rows[STEPS]["val/loss_simple"] < 0.7


def test_a_system_keeps_the_last_and_the_three_best_by_the_published_name(run):
    name = "val/loss_simple_ema"
    measured = {s: m[name] for s, m in metrics(run).items() if name in m}
    best = sorted(measured, key=measured.__getitem__)[:3]
    assert set(kept(run)) == {*best, STEPS}
    assert all(notes[name] == measured[step] for step, notes in kept(run).items())


def test_the_image_logger_shows_the_published_rows(run):
    for step in (30, 60):
        shown = {p.name for p in (run / f"samples/step_{step:08}").iterdir()}
        assert set(ROWS.values()) <= shown


def test_faces_are_sampled_without_prompts_as_images(run, tmp_path, capsys):
    from sandbox.contracts import ConfigError

    words = ["task=sample", f"task.run={run}", "task.count=3", f"task.to={tmp_path}"]
    perform(resolve_run(composed(*words), words))
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["000-clip.png", "001-clip.png", "002-clip.png", "samples.json", "sheet.png"]
    images = [Image.open(tmp_path / name) for name in names[:3]]
    assert {image.size for image in images} == {(16, 16)}
    assert len({image.tobytes() for image in images}) == 3
    assert "sampling" in capsys.readouterr().out
    words = ["task=sample", f"task.run={run}", "task.prompts=[a face]"]
    with pytest.raises(ConfigError, match="conditioning=none uses no captions"):
        perform(resolve_run(composed(*words), words))


def test_a_run_is_scored(run, tmp_path):
    """Without captions, the scores are the loss and the first stage's PSNR."""
    words = ["task=evaluate", f"task.run={run}", "task.clips=8", "task.untrained=false"]
    perform(resolve_run(composed(*words), words))
    found = json.loads(next((run / "evaluations").glob("*.json")).read_text())
    assert found["clips"] == 8
    assert found["protocols"]["first_stage_psnr_db"]["clips"] == 8
    assert found["first_stage_psnr_db"] > 10


def test_a_run_is_exported_in_the_original_format(run, tmp_path):
    to = tmp_path / "model.ckpt"
    words = ["task=export", f"task.run={run}", f"task.to={to}"]
    perform(resolve_run(composed(*words), words))
    state = torch.load(to, weights_only=True)["state_dict"]
    layout = registry.default("layout", "compvis")
    assert layout.recognises(frozenset(state))
    assert state["model_ema.num_updates"].item() == STEPS  # after every micro-batch
