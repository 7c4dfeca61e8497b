"""LoRA: recorded outputs, files in both directions, and training on a frozen backbone."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from plugins.adapter.lora import FILE, METADATA, LoRA
from plugins.backbone.cogvideox import CogVideoX
from sandbox import build, compose
from sandbox.config import discovery, registry
from sandbox.config.wiring import wire
from sandbox.contracts import Conditions, ConfigError, StorageError
from sandbox.data.loader import batches
from sandbox.storage import checkpoint
from tests.helpers import composed, preset, sampled, train, wired_around
from tests.inputs import conditions, sizes, tensor

GOLDEN = Path(__file__).parents[2] / "golden/cogvideox"
discovery.setup()
TINY = (
    "vae.weights=null", "backbone.width=16", "backbone.num_blocks=1", "conditioning.width=16",
    "conditioning.buckets=32", "data.batch_size=2", "data.clips_per_epoch=16", "logger=null",
    "steps=2",
)  # fmt: skip
needs_peft = pytest.mark.usefixtures("peft")


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def recorded() -> tuple[CogVideoX, dict[str, Tensor], dict]:
    """The tiny 5b transformer with its weights, and the LoRA fixture."""
    with safe_open(GOLDEN / "transformer_5b.safetensors", "pt") as file:
        settings = json.loads(file.metadata()["meta"])["config"]
    known = {k: v for k, v in settings.items() if k in CogVideoX.Config.__dataclass_fields__}
    model = CogVideoX(CogVideoX.Config(**known, vector_dim=0, rope_grid="fitted"))
    state = load_file(GOLDEN / "transformer_5b.safetensors")
    model.load_state_dict({k[11:]: v for k, v in state.items() if k.startswith("state_dict/")})
    path = GOLDEN / "lora_5b.safetensors"
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["meta"])
    return model.eval(), load_file(path), meta


def adapted(model: nn.Module, **settings) -> LoRA:
    lora = LoRA(LoRA.Config(**{"rank": 4} | settings))
    targets = model.cfg.adapter_targets() if hasattr(model, "cfg") else ()
    lora.apply(model, targets, torch.float32)
    return lora


def output(model: CogVideoX, fixture: dict[str, Tensor]) -> Tensor:
    cond = Conditions(context=fixture["encoder_hidden_states"])
    with torch.no_grad():
        out = model(fixture["hidden_states"].transpose(1, 2), fixture["timestep"], cond)
    return out.transpose(1, 2)


def file_of(fixture: dict[str, Tensor], folder: Path, alpha: float | None) -> Path:
    """Writes the recorded LoRA to a file, with its alpha as metadata unless that is None."""
    path = folder / "lora.safetensors"
    metadata = {"transformer.r": 4, "transformer.lora_alpha": alpha}
    header = {METADATA: json.dumps(metadata)} if alpha is not None else {}
    tensors = {k[5:]: v for k, v in fixture.items() if k.startswith("lora/")}
    save_file(tensors, path, {"format": "pt", **header})
    return path


# outputs


@needs_peft
def test_a_new_adapter_does_not_change_the_output() -> None:
    model, fixture, meta = recorded()
    adapted(model)
    torch.testing.assert_close(output(model, fixture), fixture["output_base"], **meta["tolerance"])


@needs_peft
@pytest.mark.parametrize(
    ("alpha", "name"), [(2, "output_lora_alpha_over_r"), (None, "output_lora_scale_1")]
)
@pytest.mark.parametrize("own_alpha", [None, 2.0, 7.0])
def test_a_file_keeps_its_scale(tmp_path, alpha, name, own_alpha) -> None:
    model, fixture, meta = recorded()
    adapted(model, weights=str(file_of(fixture, tmp_path, alpha)), alpha=own_alpha)
    torch.testing.assert_close(output(model, fixture), fixture[name], **meta["tolerance"])


@needs_peft
def test_merged_equals_applied(tmp_path) -> None:
    model, fixture, meta = recorded()
    lora = adapted(model, weights=str(file_of(fixture, tmp_path, 2)), alpha=2.0)
    lora.merge(model)
    want = fixture["output_lora_alpha_over_r"]
    torch.testing.assert_close(output(model, fixture), want, **meta["tolerance"])
    merged = model.transformer_blocks[0].attn1.to_q.base_layer.weight
    plain, _, _ = recorded()
    assert not torch.equal(merged, plain.transformer_blocks[0].attn1.to_q.weight)


# files


@needs_peft
def test_an_exported_file_equals_the_loaded_one(tmp_path) -> None:
    model, fixture, _ = recorded()
    lora = adapted(model, weights=str(file_of(fixture, tmp_path, 2)), alpha=2.0)
    name, state, header = lora.exported(model)
    assert name == FILE
    assert state.keys() == {k[5:] for k in fixture if k.startswith("lora/")}
    assert all(torch.equal(v, fixture[f"lora/{k}"]) for k, v in state.items())
    assert json.loads(header[METADATA]) == {
        "transformer.r": 4,
        "transformer.lora_alpha": 2.0,
        "transformer.target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
    }


@needs_peft
def test_the_published_size_has_the_published_names_and_shapes() -> None:
    with torch.device("meta"):
        model = CogVideoX(preset("backbone", "cogvideox_2b"))
        _, state, _ = adapted(model, rank=128).exported(model)
    manifest = json.loads((GOLDEN / "cogvideox_2b_lora_r128.json").read_text())
    assert {k: list(v.shape) for k, v in state.items()} == {
        k: shape for k, (shape, _) in manifest.items()
    }


@needs_peft
def test_a_file_of_another_rank_or_of_no_lora_is_refused(tmp_path) -> None:
    model, fixture, _ = recorded()
    path = file_of(fixture, tmp_path, 2)
    with pytest.raises(StorageError, match=r"adapter\.rank=2: want 4, the rank of the file"):
        adapted(model, rank=2, weights=str(path))
    path.write_bytes(b"nothing")
    with pytest.raises(StorageError, match="it is a text"):
        adapted(recorded()[0], weights=str(path))


# training on a frozen backbone


@needs_peft
def test_only_the_adapter_trains_and_the_backbone_has_the_given_dtype() -> None:
    model, _, _ = recorded()
    lora = LoRA(LoRA.Config(rank=2))
    lora.apply(model, model.cfg.adapter_targets(), torch.bfloat16)
    for name, weight in model.named_parameters():
        is_adapter = ".lora_" in name
        assert weight.requires_grad == is_adapter, name
        assert weight.dtype == (torch.float32 if is_adapter else torch.bfloat16), name


@needs_peft
def test_published_name_recovers_the_names_of_the_backbone() -> None:
    model, _, _ = recorded()
    before = set(model.state_dict())
    lora = adapted(model)
    names = {lora.published_name(name) for name in model.state_dict()}
    assert names - {None} == before


@needs_peft
def test_a_run_starts_from_a_trained_backbone_and_does_not_change_it(tmp_path) -> None:
    base = train(wire(composed(*TINY)), tmp_path)
    words = (*TINY, "adapter=lora", f"init_from={base.folder}")
    run = train(wire(composed(*words)), tmp_path / "lora")
    ema = checkpoint.load(checkpoint.newest(base.folder / "checkpoints"))["ema"]["average"]
    for name, weight in run.system.base_state().items():
        assert torch.equal(weight, ema.get(f"backbone.{name}", weight)), name
    saved = checkpoint.load(checkpoint.newest(run.folder / "checkpoints"))["weights"]
    trained = {k for k in saved if k.startswith("backbone.")}
    assert trained and all(".lora_" in k for k in trained)

    again = build(run.folder, "live")
    own, other = run.system.backbone.state_dict(), again.backbone.state_dict()
    assert all(torch.equal(own[k], other[k]) for k in own)
    assert any(v.any() for k, v in other.items() if ".lora_B." in k)


@needs_peft
def test_a_half_precision_backbone_trains_validates_and_samples(tmp_path) -> None:
    base = train(wire(composed(*TINY)), tmp_path)
    words = (*TINY, "adapter=lora", f"init_from={base.folder}", "precision=bf16")
    run = train(wire(composed(*words)), tmp_path / "lora")
    kinds = {x.dtype for x in run.system.base_state().values()}
    assert kinds == {torch.bfloat16}
    assert sampled(run.system).isfinite().all()
    batch = next(iter(batches(registry.create(run.system.root.data).split("val"), 2, 0)))
    terms = run.system.step(batch, run.system.draws(batch))  # outside the trainer's autocast
    assert terms.total.isfinite()
    assert terms.total.dtype == torch.float32


@needs_peft
@pytest.mark.parametrize("name", [p.name for p in registry.plugins("backbone")])
def test_every_backbone_supports_an_adapter_at_its_targets(name) -> None:
    wiring = wired_around("backbone", registry.default("backbone", name))
    cfg, (grid, *_), (slots, *_) = wiring.root.backbone, wiring.grids, wiring.slots
    model = registry.create(cfg)
    lora = LoRA(LoRA.Config(rank=2))
    assert not list(lora.cfg.accepts(cfg))
    lora.apply(model, cfg.adapter_targets(), torch.float32)
    for weight_name, weight in model.named_parameters():
        if ".lora_" not in weight_name:
            torch.nn.init.normal_(weight, std=0.1)  # many start at zero and block gradients
    z = tensor(2, *sizes(grid))
    model(z, torch.tensor([10.0, 900.0]), conditions(slots, grid)).square().mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert grads and all(".lora_" in n for n in grads)
    assert all(g is not None for g in grads.values()), "DDP would wait for these gradients"
    assert any(g.any() for n, g in grads.items() if ".lora_B." in n)


@needs_peft
@pytest.mark.parametrize("name", [p.name for p in registry.plugins("backbone")])
def test_dropout_of_an_adapter_is_the_same_with_checkpointing(name) -> None:
    wiring = wired_around("backbone", registry.default("backbone", name))
    cfg, (grid, *_), (slots, *_) = wiring.root.backbone, wiring.grids, wiring.slots
    switch = "use_checkpoint" if hasattr(cfg, "use_checkpoint") else "gradient_checkpointing"
    grads = []
    for on in (False, True):
        torch.manual_seed(0)
        model = registry.create(replace(cfg, **{switch: on}))
        adapted(model, rank=2, dropout=0.5)
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.1)
        z = tensor(2, *sizes(grid))
        model(z, torch.tensor([10.0, 900.0]), conditions(slots, grid)).square().mean().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for n, grad in grads[0].items():
        torch.testing.assert_close(grads[1][n], grad, msg=lambda m, n=n: f"{n}: {m}")


def test_an_adapter_needs_pretrained_weights() -> None:
    with pytest.raises(ConfigError, match="needs a pretrained backbone: set init_from=FOLDER"):
        compose(*TINY, "adapter=lora")


def test_resuming_accepts_init_from_with_an_adapter() -> None:
    cfg = compose(*TINY, "adapter=lora", "init_from=base", "resume.run=stopped")
    assert (cfg.init_from, cfg.resume.run) == ("base", "stopped")  # type: ignore[union-attr]


def test_without_peft_the_error_says_how_to_install_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RuntimeError, match="extra `lora`"):
        adapted(recorded()[0])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rank": 0}, "rank=0: want >= 1"),
        ({"alpha": 0.0}, "alpha=0.0: want > 0"),
        ({"dropout": 1.0}, "dropout=1.0: want 0 to 0.99"),
        ({"targets": ()}, "targets=[]: want names of layers"),
        ({"layout": "webui"}, "layout='webui': want one of ['diffusers', 'kohya']"),
        ({"prefix": "a.b"}, "prefix='a.b': want a name such as transformer"),
    ],
)
def test_a_bad_setting_is_reported(changes, problem) -> None:
    problems = list(replace(LoRA.Config(), **changes).problems())
    assert any(p.startswith(problem) for p in problems), problems
