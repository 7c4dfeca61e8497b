"""Every recipe is planned at full size (with fewer repeated layers), without optional packages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox.cli.jobs import perform
from sandbox.config.paths import CONF
from tests.helpers import composed

pytestmark = pytest.mark.slow
RECIPES = sorted(p.stem for p in (CONF / "experiment").glob("*.yaml"))
FEWER = {  # their layers repeat; dynamicrafter_512 is measured at full depth
    "cogvideox": ("backbone.num_layers=2",),
    "dynamicrafter_1024": ("backbone.num_res_blocks=1",),
    "dynamicrafter_512_interp": ("backbone.num_res_blocks=1",),
}
IN_CI = (  # one of each system; the others differ in sizes
    "cogvideox_1_5_5b_i2v_lora", "digits_long", "dynamicrafter_512_interp", "easyanimate_v2_stage3",
    "ldm_celebahq_vq4", "ldm_celebahq_vq4_first_stage_tiny",
)  # fmt: skip
OPTIONAL = ("wandb", "av", "open_clip", "lightning")


def named(name: str):
    return name if name in IN_CI else pytest.param(name, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize("name", [named(name) for name in RECIPES])
def test_every_recipe_is_planned(name, tmp_path, capsys):
    fewer = [w for prefix, words in FEWER.items() if name.startswith(prefix) for w in words]
    perform(composed(f"experiment={name}", "task=plan", f"task.to={tmp_path}", *fewer))
    found = json.loads((tmp_path / "plan.json").read_text())
    assert [c["what"] for c in found["objective"]["checks"] if not c["holds"]] == []
    assert all(cost["forward"] > 0 < cost["backward"] for cost in found["costs"].values())
    assert all(m["total"] > 0 for m in found["memory"])
    assert name in capsys.readouterr().out


def test_a_plan_needs_no_tracker_video_decoder_or_tokenizer(tmp_path):
    """DynamiCrafter uses all three for training."""
    code = f"""
import sys
sys.modules |= dict.fromkeys({OPTIONAL!r})
from sandbox.main import main
main(["task=plan", "experiment=dynamicrafter_512_tiny", "task.to={tmp_path}"])
"""
    home = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plan.html").is_file()
