"""trainer.low_vram: frozen modules are on the device only while used; results are equal."""

from __future__ import annotations

import torch

from sandbox.config.root import Root
from sandbox.config.wiring import wire
from sandbox.model.offload import freeze
from sandbox.training.build import build_system
from tests.helpers import TINY, composed
from tests.inputs import video
from tests.training_sessions import differing, train_until

META = torch.device("meta")


def coded(*overrides: str) -> Root:
    """A tiny system with a first stage and a text encoder."""
    kept = [o for o in TINY if not o.startswith("conditioning.")]
    return composed(
        *kept, "vae=kl", "vae.ch=8", "vae.ch_mult=[1,1]", "vae.scale_factor=1", "vae.shift=0",
        "conditioning=t5", "conditioning.d_model=16", *overrides,
    )  # fmt: skip


def places(part) -> set[str]:
    return {x.device.type for x in (*part.parameters(), *part.buffers())}


def test_frozen_networks_wait_on_the_cpu_and_are_copied_for_their_work():
    """The meta device stands for a GPU: it shows where weights are, and computes shapes."""
    wiring = wire(coded("trainer.low_vram=true"))
    system = build_system(wiring)
    freeze(system.conditioner.encoder)
    own = dict(system.named_parameters())
    system.to(META)
    assert system.device == META
    assert places(system.backbone) == {"meta"}
    assert places(system.first_stage) == places(system.conditioner.encoder) == {"cpu"}
    clips = video(wiring.clips[0]).to(META)
    with system.on_device(system.first_stage):
        assert places(system.first_stage) == {"meta"}
        assert places(system.conditioner.encoder) == {"cpu"}  # one at a time
        assert system.first_stage.encode(clips).mean.device == META
    with system.on_device(system.conditioner):
        tied = system.conditioner.encoder
        assert places(tied) == {"meta"} and tied.encoder.embed_tokens is tied.shared
    for name, parameter in system.named_parameters():  # its own weights, not copies of copies
        assert (
            not name.startswith(("first_stage.", "conditioner.encoder.")) or parameter is own[name]
        )


def test_without_it_all_of_a_system_moves():
    system = build_system(wire(coded()))
    system.to(META)
    assert places(system) == {"meta"}
    with system.on_device(system.first_stage):
        assert places(system.first_stage) == {"meta"}


def test_training_is_the_same_bit_for_bit(tmp_path):
    plain = train_until(None, coded(), tmp_path / "plain")
    tight = train_until(None, coded("trainer.low_vram=true"), tmp_path / "tight")
    assert not differing(plain, tight)
    assert {p.parent.name for p in tmp_path.glob("*/*/config.yaml")} == {
        p.parent.name for p in (tmp_path / "plain").glob("*/config.yaml")
    }  # one identity: a run may resume with the other setting
