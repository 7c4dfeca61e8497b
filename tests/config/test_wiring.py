"""What fits, what does not, and what is said about it; from Configs alone."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import pytest

from sandbox.config import composition, discovery, registry
from sandbox.config.paths import CHECKOUT
from sandbox.config.root import Root, to_root
from sandbox.config.wiring import wire
from sandbox.contracts import (
    BackboneConfig,
    Clip,
    ConditioningConfig,
    ConfigError,
    DataConfig,
    MetricConfig,
    SizeError,
    Slots,
    Tokens,
    in_range,
    must_divide,
)
from tests.helpers import composed


@cache
def default() -> Root:
    discovery.setup()
    return to_root(composition.compose())


def root(**changes) -> Root:
    return replace(default(), **changes)


def untold():
    return registry.default("conditioning", "none")


def problems(*args, **changes) -> tuple[str, ...]:
    made = root(**changes)
    with pytest.raises(ConfigError) as e:
        wire(made, *args)
    return e.value.problems


@dataclass
class Network(BackboneConfig):
    """Takes what it is told to take."""

    plugin: str = "backbone/network"
    wants: tuple[str, ...] = ()
    must: tuple[str, ...] = ()
    divisor: int = 1
    in_channels: int | None = None
    context_dim: int | None = None

    def takes(self) -> frozenset[str]:
        return frozenset(self.wants + self.must)

    def needs(self) -> frozenset[str]:
        return frozenset(self.must)

    def grid(self, z: Clip) -> Clip:
        must_divide("width", z.width, self.divisor)
        must_divide("height", z.height, self.divisor)
        return z

    def wired(self, z: Clip, slots: Slots, outputs: int) -> Network:
        width = slots.context.width if slots.context else 0
        return self.agree(in_channels=z.channels, context_dim=width)


@dataclass
class Nothing(Network):
    """Fits nothing."""

    def grid(self, z: Clip) -> Clip:
        raise SizeError("channels", z.channels, "another number")


@dataclass
class Told(ConditioningConfig):
    """Offers a context as wide as the clip is long."""

    plugin: str = "conditioning/told"

    def needs(self) -> frozenset[str]:
        return frozenset({"video"})

    def offers(self, clip: Clip, grid: Clip) -> Slots:
        return Slots(context=Tokens(clip.frames, 4), scalars=frozenset({"fps"}))


@dataclass
class Buckets(DataConfig):
    """Two sizes, one of them an image."""

    plugin: str = "data/buckets"
    frames: int = 9

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from in_range("frames", self.frames, 1, 12)

    def clips(self) -> tuple[Clip, ...]:
        return Clip(3, self.frames, self.height, self.width), Clip(3, 1, 32, 16)


@dataclass
class Score(MetricConfig):
    plugin: str = "metric/score"

    def accepts(self, clip: Clip) -> Iterator[str]:
        if clip.frames < 20:
            yield f"score: needs 20 frames, clips have {clip.frames}"


# --- what wiring completes ------------------------------------------------------------------------


def test_numbers_that_others_decide_are_filled_in():
    wiring = wire(root())
    backbone = wiring.root.backbone
    assert wiring.clips == (Clip(3, 9, 16, 16),)
    assert wiring.latents == wiring.grids == (Clip(32, 3, 4, 4),)
    assert (backbone.in_channels, backbone.out_channels, backbone.vector_dim) == (32, 32, 64)
    assert wiring.slots == (Slots(vector=64),)


def test_a_number_that_is_stated_rightly_is_accepted():
    assert wire(root(backbone=replace(default().backbone, in_channels=32)))


def test_a_wired_configuration_wires_to_itself():
    once = wire(root()).root
    assert wire(once).root == once


def test_what_is_filled_in_is_checked_like_what_is_given():
    """Else a run would begin that cannot be loaded again."""

    @dataclass
    class Picky(Network):
        def problems(self) -> Iterator[str]:
            if self.context_dim == 0:
                yield "context_dim=0: want text"

    assert problems(backbone=Picky(), conditioning=untold()) == (
        "backbone.context_dim=0: want text",
    )


def test_the_task_decides_rate_and_steps_only_where_they_are_open():
    assert wire(root()).root.steps == 1200
    assert wire(root(steps=7, lr=0.0)).root.steps == 7
    assert wire(root(steps=7, lr=0.0)).root.lr == 0.0


def test_the_metric_is_that_of_the_data_where_none_is_chosen():
    assert wire(root()).root.metric.plugin == "metric/digits"


def test_training_a_first_stage_fills_in_its_loss_and_batch_size():
    parts = {"task": registry.default("task", "train_vae"), "vae": registry.default("vae", "vq")}
    found = wire(root(**parts)).root
    assert found.reconstruction.plugin == "reconstruction/codebook"
    assert found.data.batch_size == parts["vae"].recipe().batch_size
    assert wire(found).root == found
    assert problems(task=parts["task"], steps=0) == (
        "steps=0: want >= 1",
        "vae=pca: cannot be trained (vae.weights=auto fits it); choose another vae",
    )


def test_every_size_of_the_data_is_wired():
    wiring = wire(root(data=Buckets(), conditioning=untold()))
    assert wiring.latents == (Clip(32, 3, 4, 4), Clip(32, 1, 8, 4))


def test_wiring_needs_no_torch():
    code = (
        "import sys; from sandbox import compose; compose('vae=kl');"
        "assert not {'torch', 'numpy', 'lightning'} & sys.modules.keys();"
        "assert {m.split('.')[1] for m in sys.modules if m.startswith('plugins.')} == {'_configs'}"
    )
    subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, check=True)


# --- sizes ----------------------------------------------------------------------------------------


def test_a_size_that_does_not_fit_comes_with_the_nearest_that_go_through_everything():
    data = DataConfig("data/plain", width=20, height=14)
    vae = replace(default().vae, patch=2, components=8)
    assert problems(data=data, vae=vae, backbone=Network(divisor=4), conditioning=untold()) == (
        "data.width=20: clips of 3x9x14x20 become latents of 8x3x7x10 with vae=pca, and width 10 "
        "does not fit backbone=network, which wants a multiple of 4: use data.width=16 or "
        "data.width=24",
        "data.height=14: clips of 3x9x14x20 become latents of 8x3x7x10 with vae=pca, and height 7 "
        "does not fit backbone=network, which wants a multiple of 4: use data.height=8 or "
        "data.height=16",
    )


def test_values_that_the_data_refuse_are_not_offered():
    assert problems(data=Buckets(frames=11), conditioning=untold()) == (
        "data.frames=11 does not fit vae=pca, which wants 1 plus a multiple of 4: use "
        "data.frames=9",
    )


def test_each_size_of_the_data_is_checked_and_each_wrong_number_said_once():
    found = problems(data=Buckets(), backbone=Network(divisor=8), conditioning=untold())
    assert [p.split(":")[0] for p in found] == ["data.width=16", "data.height=16"]
    assert "3x9x16x16" in found[0] and "3x9x16x16" in found[1]
    found = problems(data=Buckets(), backbone=Network(divisor=16), conditioning=untold())
    assert [p.split(":")[0] for p in found][-1] == "data=buckets" and "height=32" in found[-1]


def test_a_size_without_a_cure_is_still_named():
    (found,) = problems(backbone=Nothing())
    assert "channels 32 does not fit backbone=network, which wants another number" in found
    assert "use" not in found


# --- slots and fields -----------------------------------------------------------------------------


def test_a_slot_that_the_backbone_does_not_take_names_both_sides():
    (found,) = problems(backbone=Network(wants=("context",)), conditioning=Told())
    assert "conditioning=told offers fps, but backbone=network takes context" in found


def test_a_slot_that_the_backbone_needs_names_both_sides():
    network = Network(wants=("context", "fps"), must=("concat",))
    (found,) = problems(backbone=network, conditioning=Told())
    assert "backbone=network needs concat" in found
    assert "conditioning=told offers context, fps" in found


def test_a_width_that_differs_comes_with_where_the_other_number_is_from():
    network = Network(wants=("context", "fps"), context_dim=77)
    (found,) = problems(backbone=network, conditioning=Told())
    assert found.startswith(
        "backbone.context_dim=77, but 9 is needed (vae=pca gives latents of 32x3x4x4"
    )
    assert "context=Tokens(width=9" in found


def test_numbers_must_be_those_of_every_size():
    network = Network(wants=("context", "fps"))
    (found,) = problems(data=Buckets(), backbone=network, conditioning=Told())
    assert found.startswith("backbone.context_dim=9, but 1 is needed")


def test_fields_that_the_data_lack_come_with_the_conditionings_that_work():
    (found,) = problems(data=Buckets())
    said = "conditioning=words needs captions, but data=buckets provides video: use conditioning="
    assert found.startswith(said) and "conditioning=none" in found


def test_a_metric_is_asked_about_fields_and_sizes():
    assert problems(metric=Score()) == ("metric=score: needs 20 frames, clips have 9",)


# --- all at once ----------------------------------------------------------------------------------


def test_a_part_that_is_wrong_itself_is_not_asked_further():
    found = problems(backbone=replace(default().backbone, width=-3, patch=3))
    assert found and all(p.startswith("backbone.width=-3") for p in found)


def test_what_is_known_to_be_wrong_is_not_said_again():
    vae = replace(default().vae, patch=-1)
    assert problems(frozenset({"lr", "vae"}), lr=-1.0, vae=vae, seed=-1) == (
        "seed=-1: want 0 to 4294967295",
    )


def test_problems_of_all_kinds_come_together_and_once():
    found = problems(
        seed=-1,
        sampler=replace(default().sampler, steps=0),
        loss=registry.default("loss", "ldm"),
        data=replace(default().data, width=18),
        metric=Score(),
    )
    assert [p.split(" ")[0] for p in found] == [
        "seed=-1:",
        "sampler.steps=0:",
        "loss=ldm:",
        "metric=score:",
        "data.width=18",
    ]


def test_an_empty_group_that_a_run_needs_is_named_with_its_options():
    found = problems(vae=None, ema=None)
    assert [p.partition(": want one of ")[0] for p in found] == ["vae=null", "ema=null"]
    assert "identity, " in found[0] and "none, " in found[1]


# --- everything with everything -------------------------------------------------------------------

WIRED = ("data", "vae", "backbone", "conditioning", "schedule")


def test_every_network_of_components_wires_or_says_why_not():
    base = default()
    choices = [[p.config(plugin=p.key) for p in registry.plugins(g) if p.config] for g in WIRED]
    wired = refused = 0
    for parts in itertools.product(*choices):
        try:
            wiring = wire(replace(base, **dict(zip(WIRED, parts, strict=True))))
        except ConfigError as e:
            refused += 1
            assert e.problems and all("=" in p for p in e.problems), parts
        else:
            wired += 1
            own, joined = wiring.grids[0].channels, wiring.slots[0].concat
            assert wiring.root.backbone.in_channels in (own, own + joined)
    assert wired > 100 and refused > 100


# --- learning rate --------------------------------------------------------------------------------


def scaled(**changes) -> Root:
    start = default()
    trainer = replace(start.trainer, accumulate=2)
    return root(trainer=trainer, data=replace(start.data, batch_size=48), **changes)


def test_base_lr_is_scaled_with_the_clips_of_an_optimizer_step_and_once():
    wired = wire(scaled(base_lr=2e-6)).root
    assert wired.lr == pytest.approx(2e-6 * 2 * 48)
    assert wire(wired).root.lr == wired.lr


def test_base_lr_of_a_first_stage_counts_the_batch_that_it_trains_with():
    start = to_root(composition.compose(["task=train_vae", "vae=kl", "task.batch_size=8"]))
    assert wire(replace(start, base_lr=1e-4)).root.lr == pytest.approx(8e-4)


def test_lr_that_contradicts_base_lr_is_refused():
    with pytest.raises(ConfigError, match=r"lr=0\.1: base_lr=2e-06 gives 0\.000192"):
        wire(scaled(base_lr=2e-6, lr=0.1))


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_base_lr_must_be_a_number_above_zero(rate):
    with pytest.raises(ConfigError, match="base_lr="):
        wire(root(base_lr=rate))


@pytest.mark.parametrize(
    "words",
    [
        "conditioning=t5_cogvideox",
        "conditioning=t5_easyanimate",
        "conditioning=t5 conditioning.weights=cached conditioning.drop_text=0",
        "conditioning=t5_cogvideox data=video_folder data.root=.",
        "conditioning=words data=video_folder data.root=. data.captions=none",
        "conditioning=t5_cogvideox data=video_folder data.root=. data.captions=none",
        "conditioning=openclip_vit_h14 data=video_folder data.root=. data.captions=none",
        "conditioning=t5_cogvideox backbone=unet2d data.frames=1 vae=kl vae.weights=null",
    ],
)
def test_a_hint_for_conditioning_names_options_that_fit(words):
    with pytest.raises(ConfigError, match="provides") as e:
        wire(composed(*words.split()))
    own = words.partition("conditioning=")[2].partition("_")[0].partition(" ")[0]
    named = re.findall(r"conditioning=(\w+)", str(e.value).partition(": use ")[2])
    assert named and own not in named
    for name in named:
        others = [w for w in words.split() if not w.startswith("conditioning")]
        wire(composed(*others, f"conditioning={name}"))
