"""task=encode: what it stores and makes anew, what a kill leaves; and training on it."""

import json
import os
import signal
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from sandbox.config import registry
from sandbox.config.root import Root, to_container
from sandbox.config.wiring import wire
from sandbox.contracts import BadItem, Clip, ConfigError, DataError, StorageError
from sandbox.distributed.rank import Rank
from sandbox.distributed.supervisor import launch
from sandbox.evaluation.evaluate import first_clips
from sandbox.evaluation.prompts import data_batch, user_batch
from sandbox.model.cached_latents import CachedLatents, source
from sandbox.pipelines.encode import Networks, encode_all, to_half_if_lossless, to_uint8_if_lossless
from sandbox.reports.media import write_video
from sandbox.storage import weight_files
from sandbox.tasks.train import train as train_task
from sandbox.training.build import build_system, load_system
from tests.bad_files import DAMAGES
from tests.helpers import TINY, composed, sampled, train
from tests.inputs import video
from tests.plugins.conditioning.test_t5 import released, write_tokenizer
from tests.training_sessions import differing, train_until

VAES = {
    "kl": ("vae.ch=8", "vae.num_groups=4", "vae.scale_factor=1.0", "vae.shift=0.0"),
    "vq": ("vae.ch=8", "vae.num_groups=4", "vae.scale_factor=1.0", "vae.shift=0.0"),
    "cogvideox": ("vae.scaling_factor=0.7", "vae.block_out_channels=[8,8,8]"),
    "pca": ("vae.weights=auto",),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six moving digits as mp4, listed as CogVideoX's fine-tuning wants them."""
    root = tmp_path / "digits"
    (root / "videos").mkdir(parents=True)
    digits = registry.create(composed().data).split("val")
    clips = first_clips(digits, 6, 0)
    for i, clip in enumerate(clips.video):
        write_video(root / f"videos/{i}.mp4", clip, 8.0)
    (root / "prompts.txt").write_text("\n".join(clips.captions))
    (root / "videos.txt").write_text("\n".join(f"videos/{i}.mp4" for i in range(6)))
    return root


def settings(folder: Path, *more: str, vae: str = "kl") -> Root:
    """A tiny system on the folder's clips; with `conditioning` in `more` the published kind."""
    own = [*TINY, f"vae={vae}", *VAES[vae], "data=cogvideox_folder", "data.val_fraction=0.3",
           "data.num_prompts=2", "task=encode", "vae.one_by_one=true", *more]  # fmt: skip
    absent = ["data.clips_per_epoch"]
    if any(o.startswith("conditioning=") for o in more):
        absent += ["conditioning.width", "conditioning.buckets"]
    if "backbone=cogvideox" in more:
        absent += ["backbone.width", "backbone.num_blocks", "backbone.time_features"]
        own += ["backbone.num_layers=1", "backbone.time_embed_dim=16"]
    last = {o.partition("=")[0]: o for o in own}
    root = composed(*(o for name, o in last.items() if name not in absent))
    root.data.root, root.task.to = str(folder), str(folder.parent / "cache")
    return wire(replace(root, cache=str(folder.parent / "first stages"))).root


def encoded(folder: Path, *more: str) -> dict[str, Any]:
    return encode_all(settings(folder, *more), Rank())


def from_cache(root: Root, **data: Any) -> Root:
    """The same run on what task=encode has stored."""
    latents = registry.default("data", "latents")
    same = {n: getattr(root.data, n) for n in ("frames", "height", "width", "batch_size")}
    return replace(root, data=replace(latents, root=root.task.to, num_prompts=2, **same, **data))


def losses(root: Root, out: Path) -> list[float]:
    return train(wire(replace(root, steps=4)), out).losses


# --- the same training ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vae", "more"),
    [("kl", ()), ("kl", ("precision=bf16",)), ("cogvideox", ()), ("pca", ()), ("vq", ())],
)
def test_cached_and_uncached_training_have_the_same_losses(folder, tmp_path, vae, more):
    root = settings(folder, *more, vae=vae)
    encode_all(root, Rank())
    uncached = losses(root, tmp_path / "a")
    assert len(uncached) == 4
    assert losses(from_cache(root), tmp_path / "b") == uncached


def test_clips_of_several_sizes_are_stored_in_them_and_have_the_same_losses(folder, tmp_path):
    name = registry.create(settings(folder).data).split("train").rows[0].video
    write_video(folder / name, video(Clip(3, 9, 16, 32), 1)[0], 8.0)
    root = settings(folder, "data.buckets=[9x16x32]", "data.bucket_batch_sizes=[1]")
    encode_all(root, Rank())
    cached = from_cache(root, buckets=("9x16x32",), bucket_batch_sizes=(1,))
    items = registry.create(cached.data).split("train")
    widths = {items.load(i, None)["stored"].shape[-1] for i in range(len(items))}
    assert widths == {4, 8}
    assert losses(cached, tmp_path / "b") == losses(root, tmp_path / "a")
    with pytest.raises(DataError, match=r"also has clips of 9x16x32"):
        registry.create(from_cache(root).data).split("train")


def test_what_an_epoch_draws_is_stored_once_and_that_is_said(folder, capsys):
    """Uncached training sees another part of a long video in each epoch."""
    root = settings(folder)
    encode_all(root, Rank())
    assert "at random" not in capsys.readouterr().out
    name = registry.create(root.data).split("train").rows[0].video
    for path in (folder / "videos").iterdir():
        path.with_suffix(".txt").write_text("a digit")
    write_video(folder / name, video(Clip(3, 12, 16, 16), 1)[0], 8.0)
    files = replace(registry.default("data", "video_folder"), root=str(folder), frames=9, height=16,
                    width=16, batch_size=1)  # fmt: skip
    for start, count in [("random", 1), ("random", 1), ("centre", 0)]:  # made, found again, other
        encode_all(replace(root, data=replace(files, start=start)), Rank())
        said = "1 of 6 clips are randomised per epoch" in capsys.readouterr().out
        index = json.loads((folder.parent / "cache" / "index.json").read_text())
        drawn = [row.get("drawn", False) for row in index["splits"]["train"]]
        assert (said, sum(drawn)) == (bool(count), count)


def with_t5(folder: Path, tmp_path: Path, *more: str) -> Root:
    """A system with a small released text encoder."""
    cfg = released(tmp_path / "t5")
    write_tokenizer(tmp_path / "t5" / "tokenizer")
    sizes = ("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "vocab_size",
             "relative_attention_num_buckets", "relative_attention_max_distance")  # fmt: skip
    t5 = [f"conditioning.{name}={getattr(cfg, name)}" for name in sizes]
    return settings(folder, "conditioning=t5", "backbone=cogvideox", *t5,
                    f"conditioning.weights={tmp_path / 't5'}", "conditioning.length=6",
                    "conditioning.drop_text=0.5", *more)  # fmt: skip


def test_frozen_text_from_the_cache_has_the_same_losses(folder, tmp_path):
    root = with_t5(folder, tmp_path)
    encode_all(root, Rank())
    uncached = losses(root, tmp_path / "a")
    cached = from_cache(root, text=True)
    assert losses(cached, tmp_path / "b") == uncached
    none = replace(cached.conditioning, weights="cached", drop_text=0.0)
    assert build_system(wire(replace(cached, conditioning=none))).conditioner.encoder is None


def test_validation_needs_no_text_encoder_and_changes_nothing(folder, tmp_path):
    root = with_t5(folder, tmp_path, "task.prompts=[a blue 7]")
    encode_all(root, Rank())
    cached = replace(from_cache(root, text=True), steps=2)
    conditioning = replace(cached.conditioning, weights="cached", drop_text=0.0)
    cached = wire(replace(cached, conditioning=conditioning)).root
    watching = replace(registry.default("callbacks", "samples"), every=1, count=2)
    plain = train(wire(cached), tmp_path / "a")
    watched = train(wire(replace(cached, callbacks={"samples": watching})), tmp_path / "b")
    own, other = plain.system.state_dict(), watched.system.state_dict()
    assert differing(own, other) == []
    videos = [{p.name for p in (watched.folder / "samples" / f"step_0000000{i}").glob("*.mp4")}
              for i in (1, 2)]  # fmt: skip
    assert videos[0] == videos[1] and len(videos[0]) == 2
    assert all(p.is_meta for p in watched.system.first_stage._network[0].encoder.parameters())

    with pytest.raises(ConfigError, match=r"no embedding of \['unheard of'\]"):
        data_batch(cached, ["unheard of"], 1)
    system = load_system(watched.folder)
    stored = system.sample(data_batch(cached, ["a blue 7"], 1))
    # a text encoder in the place of what is stored: any prompt, and the same clip for this one
    with_encoder = replace(conditioning, weights=str(tmp_path / "t5"))
    sampling = wire(replace(cached, conditioning=with_encoder))
    system = load_system(watched.folder, wiring=sampling)
    assert torch.equal(system.sample(user_batch(sampling.root, ["a blue 7"])), stored)
    assert system.sample(user_batch(sampling.root, ["unheard of"])).isfinite().all()


def test_image_to_video_from_stored_pictures_has_the_same_losses(folder, tmp_path):
    root = settings(folder, "conditioning=t5", "backbone=cogvideox",
                    "conditioning.image=first_frame")  # fmt: skip
    encode_all(root, Rank())
    cached = from_cache(root, image=True)
    assert not isinstance(build_system(wire(cached)).first_stage, CachedLatents)
    assert losses(cached, tmp_path / "b") == losses(root, tmp_path / "a")
    pictures = first_clips(registry.create(root.data).split("val"), 2, 0).video[:, :, :1]
    assert torch.equal(data_batch(cached, (), 2).image, pictures)  # conditions of validation


def test_pictures_have_to_be_asked_for_where_conditioning_encodes_them(folder):
    root = settings(folder, "conditioning=t5", "backbone=cogvideox",
                    "conditioning.image=first_frame")  # fmt: skip
    with pytest.raises(ConfigError, match=r"data\.image=true"):
        wire(from_cache(root))


def test_training_on_latents_holds_no_first_stage_until_pixels_are_wanted(folder, tmp_path):
    root = settings(folder)
    encode_all(root, Rank())
    trained = train(wire(replace(from_cache(root), steps=2)), tmp_path / "run")
    stage = trained.system.first_stage
    assert list(stage.parameters()) == []
    assert all(p.is_meta for p in stage._network[0].encoder.parameters())
    system = load_system(trained.folder, "live")
    video = sampled(system)
    assert video.shape == (2, 3, 9, 16, 16)
    assert video.isfinite().all()


def test_a_run_on_latents_finishes_with_scores_and_samples(folder, tmp_path):
    root = from_cache(settings(folder))
    encoded(folder)
    task = replace(registry.default("task", "train"), score_clips=2, samples=1, untrained=True)
    root = wire(replace(root, task=task, out=str(tmp_path / "out"))).root
    result = train_task({"root": to_container(root), "overrides": [], "group": None}, Rank())
    found = json.loads((Path(result["folder"]) / "metrics.json").read_text())
    assert found["first_stage_psnr_db"] is None
    assert (Path(result["folder"]) / "samples.png").is_file()


# --- what is made, and when -----------------------------------------------------------------------


def test_nothing_is_made_twice(folder):
    assert encoded(folder)["made"] == 6
    before = (folder.parent / "cache/index.json").read_bytes()
    assert encoded(folder) == {"folder": str(folder.parent / "cache"), "clips": 6, "made": 0,
                               "bad": 0}  # fmt: skip
    assert (folder.parent / "cache/index.json").read_bytes() == before


def test_clips_that_are_stored_are_not_even_decoded(folder, monkeypatch):
    encoded(folder)
    root = settings(folder)
    items = registry.create(root.data).split("train")
    monkeypatch.setattr(type(items), "load", None)
    assert encode_all(root, Rank())["made"] == 0


def latents(folder: Path) -> list[torch.Tensor]:
    data = from_cache(settings(folder)).data
    items = registry.create(data).split("train")
    return [items.load(i, None)["stored"] for i in range(len(items))]


@pytest.mark.parametrize(
    ("change", "made"),
    [
        (("data.resize=stretch", "data.width=8", "data.height=8"), 6),
        (("data.frames=5",), 6),
        (("vae.ch=4",), 6),
        (("vae.scale_factor=0.5",), 6),
        (("seed=1",), 6),  # other random weights
        (("precision=bf16",), 6),
        (("lr=0.1",), 0),
        (("data.val_fraction=0.6",), 0),  # the same clips on other sides
    ],
)
def test_what_decides_a_latent_makes_it_anew_and_nothing_else_does(folder, change, made):
    encoded(folder)
    assert encoded(folder, *change)["made"] == made


def test_a_changed_video_alone_is_made_anew_and_its_old_latents_are_not_used(folder):
    encoded(folder)
    name = registry.create(settings(folder).data).split("train").rows[0].video
    before = latents(folder)
    write_video(folder / name, torch.zeros(3, 9, 16, 16), 8.0)
    assert encoded(folder)["made"] == 1
    after = latents(folder)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)].count(False) == 1


def test_a_changed_caption_is_the_caption_that_is_trained_on(folder):
    encoded(folder)
    words = (folder / "prompts.txt").read_text().splitlines()
    (folder / "prompts.txt").write_text("\n".join(f"new {w}" for w in words))
    assert encoded(folder)["made"] == 0  # the pixels are the same
    items = registry.create(from_cache(settings(folder)).data).split("train")
    assert all(items.load(i, None)["caption"].startswith("new ") for i in range(len(items)))


def stored_bytes(cache: Path) -> int:
    return sum(p.stat().st_size for p in cache.glob("*.tar"))


def test_pruning_deletes_what_is_stale_and_nothing_else(folder):
    encoded(folder)
    cache = folder.parent / "cache"
    before = stored_bytes(cache)
    name = registry.create(settings(folder).data).split("train").rows[0].video
    write_video(folder / name, torch.zeros(3, 9, 16, 16), 8.0)
    assert encoded(folder)["made"] == 1
    grown, kept = stored_bytes(cache), latents(folder)
    assert grown > before
    assert encoded(folder, "task.prune=true")["made"] == 0
    assert stored_bytes(cache) == before
    assert all(torch.equal(a, b) for a, b in zip(kept, latents(folder), strict=True))
    assert encoded(folder)["made"] == 0  # all of it is found again

    assert encoded(folder, "seed=1", "task.prune=true")["made"] == 6  # another first stage
    assert stored_bytes(cache) == before
    assert len([*cache.glob("first_stage-*.safetensors")]) == 1


def test_unusable_clips_are_left_out_and_named(folder):
    (folder / "videos/0.mp4").write_bytes(b"nothing")
    assert encoded(folder)["bad"] == 1
    assert [*json.loads((folder.parent / "cache/index.json").read_text())["bad"]] == [
        "videos/0.mp4"
    ]


def test_shards_are_cut_and_webdataset_reads_them(folder, monkeypatch):
    import webdataset
    from safetensors.torch import load

    monkeypatch.setattr(webdataset.utils, "enforce_security", True)  # as WDS_SECURE=1 does
    root = settings(folder)
    encode_all(root, Rank())
    shards = sorted(map(str, (folder.parent / "cache").glob("latents-*.tar")))
    found = [
        load(s["safetensors"])["stored"] for s in webdataset.WebDataset(shards, shardshuffle=0)
    ]
    assert len(found) == 6
    stored = latents(folder)
    assert all(any(torch.equal(a, b) for b in found) for a in stored)


# --- kills and damage -----------------------------------------------------------------------------


def encode_until_killed(root: Root) -> None:
    """Ends in the middle of the fourth clip, by kill -9."""
    torch.set_num_threads(1)  # a pool of threads does not live through a fork
    own, begun = Networks.latents, []

    def latents_of(self: Networks, sample: Any) -> Any:
        begun.append(sample)
        if len(begun) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return own(self, sample)

    Networks.latents = latents_of
    encode_all(root, Rank())


def test_a_kill_loses_at_most_the_clip_in_work(folder):
    root = settings(folder)
    child = get_context("fork").Process(target=encode_until_killed, args=(root,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not (folder.parent / "cache/index.json").exists()
    found = encode_all(root, Rank())
    assert (found["made"], found["clips"]) == (3, 6)


@pytest.mark.parametrize("lost", [1, 40, 1400])
def test_torn_ends_of_files_are_made_again(folder, lost):
    encoded(folder)
    before, cache = latents(folder), folder.parent / "cache"
    for name in ("latents-00-00000.tar", "latents-00.jsonl", "rows-00.jsonl"):
        size = (cache / name).stat().st_size
        os.truncate(cache / name, max(size - lost, 0))
    assert 0 < encoded(folder)["made"] <= 6
    assert all(torch.equal(a, b) for a, b in zip(before, latents(folder), strict=True))


def test_damaged_latents_are_unusable_clips(folder):
    encoded(folder)
    shard = folder.parent / "cache/latents-00-00000.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:600] + bytes(len(content) - 600))
    with pytest.raises(BadItem, match="is damaged"):
        latents(folder)


def other_digit(path: Path) -> None:
    """Another number or word in a text file that stays valid."""
    content = path.read_bytes()
    for old, new in ((b"red", b"tan"), (b", 512, ", b", 513, "), (b'": 8', b'": 9')):
        content = content.replace(old, new)
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [*DAMAGES, other_digit, Path.unlink])
@pytest.mark.parametrize(
    "name", ["index.json", "latents-*.tar", "latents-*.jsonl", "rows-*.jsonl", "first_stage-*"]
)
def test_damage_is_noticed_and_mended_by_encoding_again(folder, name, damage):
    """Never another number: what is read is what was stored, or an error."""
    encoded(folder)
    cache = folder.parent / "cache"
    root = from_cache(settings(folder))

    def seen() -> list[Any]:
        items = registry.create(root.data).split("train")
        samples = [items.load(i, None) for i in range(len(items))]
        path, _ = source(root)
        build_system(wire(root)).first_stage.full(torch.device("cpu"))
        weights = {k: x.clone() for k, x in weight_files.read(path).items()}  # the file changes
        return [*((s["stored"].tolist(), s["caption"]) for s in samples), weights]

    def same(one: list[Any], other: list[Any]) -> bool:
        return one[:-1] == other[:-1] and not differing(one[-1], other[-1])

    before = seen()
    (path,) = cache.glob(name)
    damage(path)
    try:
        assert same(seen(), before)
    except (DataError, StorageError, BadItem) as e:
        assert path.name in str(e) or "index.json" in str(e)
    encoded(folder)
    assert same(seen(), before)
    assert encoded(folder)["made"] == 0


@pytest.mark.slow
def test_two_processes_store_what_one_does(folder):
    encoded(folder)
    one = latents(folder)
    (folder.parent / "cache").rename(folder.parent / "first")
    root = settings(folder, "trainer=ddp", "trainer.processes=2", "trainer.accelerator=cpu")
    launch("sandbox.tasks.encode:encode", {"root": to_container(root)}, 2)
    assert all(torch.equal(a, b) for a, b in zip(one, latents(folder), strict=True))


def test_another_first_stage_is_refused(folder):
    encoded(folder)
    root = from_cache(settings(folder, "vae.scale_factor=0.5"))
    with pytest.raises(ConfigError, match=r"vae\.scale_factor=0\.5"):
        build_system(wire(root))


def test_other_weights_are_refused(folder, tmp_path):
    encoded(folder)
    root = from_cache(settings(folder))
    other = build_system(wire(settings(folder, "seed=1"))).first_stage
    path = weight_files.write(other.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(StorageError, match="not the weights that made the latents"):
        build_system(wire(replace(root, vae=replace(root.vae, weights=str(path)))))


def test_half_precision_is_used_where_nothing_is_lost():
    assert to_half_if_lossless(torch.tensor([0.5, 3.0])).dtype == torch.bfloat16
    assert to_half_if_lossless(torch.tensor([1 + 2**-9])).dtype == torch.float16
    assert to_half_if_lossless(torch.tensor([1 + 2**-20])).dtype == torch.float32
    assert to_uint8_if_lossless(torch.arange(256) / 127.5 - 1).dtype == torch.uint8
    assert to_uint8_if_lossless(torch.tensor([0.1234])).dtype == torch.float32


# --- resume ---------------------------------------------------------------------------------------


def test_training_on_latents_continues_bit_for_bit(folder, tmp_path):
    encoded(folder)
    root = replace(wire(from_cache(settings(folder))).root, steps=6)
    root = replace(root, task=registry.default("task", "train"))
    uninterrupted = train_until(None, root, tmp_path / "uninterrupted")
    train_until(3, root, tmp_path / "cut")  # in the middle of an epoch
    assert differing(train_until(None, root, tmp_path / "cut"), uninterrupted) == []
