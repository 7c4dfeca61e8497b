"""LoRA files of EasyAnimate: recorded outputs, published names, and round trips."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from plugins._blocks.kohya import hashes, to_kohya
from plugins._blocks.lora_files import read_lora
from plugins.adapter.lora import KOHYA_FILE, LoRA
from plugins.backbone.easyanimate import EasyAnimate
from sandbox.contracts import Clip, Conditions, Slots, StorageError, Tokens
from tests.golden_easyanimate import GOLDEN, by_rule, facts, near, recorded, stored_weights
from tests.helpers import preset

pytestmark = pytest.mark.usefixtures("peft")
SPEC = facts("lora")


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def base() -> EasyAnimate:
    names, motion = EasyAnimate.Config.__dataclass_fields__, SPEC["config"]["motion_module_kwargs"]
    cfg = EasyAnimate.Config(
        **{k: v for k, v in SPEC["config"].items() if k in names},
        motion_module="vanilla",
        motion_heads=motion["num_attention_heads"],
        motion_max_frames=motion["temporal_position_encoding_max_len"],
        vector_dim=0,
    )
    model = EasyAnimate(cfg).eval()
    model.load_state_dict(by_rule(model, SPEC["base_weight_seed"]))
    return model


def file_of(state: dict[str, Tensor], folder: Path) -> str:
    save_file(state, folder / "lora.safetensors")
    return str(folder / "lora.safetensors")


def adapted(weights: str | None = None, **settings) -> tuple[EasyAnimate, LoRA]:
    model = base()
    lora = LoRA(LoRA.Config(**{"rank": SPEC["rank"], "weights": weights} | settings))
    lora.apply(model, model.cfg.adapter_targets(), torch.float32)
    return model, lora


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    given = recorded("lora")
    mask = given["in.encoder_attention_mask"].bool()
    cond = Conditions(given["in.encoder_hidden_states"], mask)
    return model(given["in.hidden_states"], given["in.timestep"], cond)


@pytest.mark.parametrize(
    ("multiplier", "name"), [(0.0, "base"), (1.0, "multiplier_1"), (0.55, "multiplier_0p55")]
)
@pytest.mark.parametrize("own_alpha", [None, 2.0])
def test_outputs_with_a_published_file_equal_the_original(
    tmp_path, multiplier, name, own_alpha
) -> None:
    """Independent of the adapter's alpha; a multiplier scales the lora_up matrices."""
    state = stored_weights("lora")
    scaled = {k: v * multiplier if ".lora_up." in k else v for k, v in state.items()}
    model, _ = adapted(file_of(scaled, tmp_path), alpha=own_alpha)
    near(name, output(model), recorded("lora")[f"out.{name}"])


def test_a_written_file_equals_the_loaded_one(tmp_path) -> None:
    state = stored_weights("lora")
    model, lora = adapted(file_of(state, tmp_path), alpha=2.0, layout="kohya")
    name, written, header = lora.exported(model)
    assert name == KOHYA_FILE and written.keys() == state.keys()
    assert all(torch.equal(written[k], state[k]) for k in state)
    assert set(header) == {"sshs_model_hash", "sshs_legacy_hash"}


def test_a_file_of_other_layers_is_refused(tmp_path) -> None:
    state = stored_weights("lora") | {
        f"lora_unet__elsewhere.lora_{k}.weight": torch.zeros(4, 4) for k in ("up", "down")
    }
    with pytest.raises(StorageError, match="lora_unet__elsewhere"):
        adapted(file_of(state, tmp_path))


def test_the_published_size_has_the_published_names_and_shapes() -> None:
    cfg = preset("backbone", "easyanimate_v2").wired(
        Clip(4, 48, 64, 64), Slots(Tokens(4096, 120, True)), 2
    )
    with torch.device("meta"):
        layers = {n: m for n, m in EasyAnimate(cfg).named_modules() if isinstance(m, nn.Linear)}
        ours = {}
        for name, layer in layers.items():
            if any(name.endswith(t) for t in cfg.adapter_targets()):
                ours[f"{name}.lora_A.weight"] = torch.empty(128, layer.in_features)
                ours[f"{name}.lora_B.weight"] = torch.empty(layer.out_features, 128)
    manifest = json.loads((GOLDEN / "easyanimate_v2_lora_rank128.json").read_text())
    found = {k: list(v.shape) for k, v in to_kohya(ours, 64.0).items()}
    assert found == {k: shape for k, (shape, _) in manifest.items()}
    assert len(found) == 1905


def test_names_and_alphas_round_trip(tmp_path) -> None:
    ours = {"a_b.0.c.lora_A.weight": torch.ones(2, 3), "a_b.0.c.lora_B.weight": torch.ones(3, 2)}
    for prefix in ("lora_unet__", "lora_unet_"):
        path = Path(file_of(to_kohya(ours, 1.5, prefix), tmp_path))
        back, _ = read_lora(path, ["a.b", "a_b.0.c"], "transformer")
        assert {k: (u.alpha, u.strength) for k, u in back.items()} == {"a_b.0.c": (1.5, 0.75)}
        for side, tensor in back["a_b.0.c"].factors.items():
            assert torch.equal(tensor, ours[f"a_b.0.c.lora_{side}.weight"])


def test_hashes_depend_on_the_tensors_alone() -> None:
    a, b = {"x": torch.zeros(2)}, {"x": torch.ones(2)}
    assert hashes(a) == hashes({"x": torch.zeros(2)})
    assert hashes(a)["sshs_model_hash"] != hashes(b)["sshs_model_hash"]
