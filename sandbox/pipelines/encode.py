"""task=encode: encodes each clip with the first stage and each caption with the text encoder, once,
into shards addressed by content hashes.

A key hashes the input pixels, the settings and weights of the network, and the precision; equal
keys are reused. A second key, of source files and data settings, avoids decoding again. The index
is written last, atomically. Random choices of the data are cached as in epoch 0, and marked by
`drawn` in the row of the clip.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, closing
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sandbox.config import registry
from sandbox.config.added_settings import without_added
from sandbox.config.root import Root, to_container
from sandbox.contracts import (
    NUMBERS,
    BadItem,
    ConfigError,
    DataError,
    Hashed,
    Items,
    Preempted,
    Sample,
    StorageError,
    TextEncoder,
)
from sandbox.data.checks import check_sample
from sandbox.data.randomness import keyed
from sandbox.distributed.rank import Rank
from sandbox.model.cached_latents import settings_of
from sandbox.model.components import DTYPES, build, use_kernels
from sandbox.model.devices import device_of, use_threads
from sandbox.model.offload import freeze
from sandbox.model.trainable import fingerprint
from sandbox.reports.pages import render
from sandbox.reports.progress import Progress
from sandbox.storage import weight_files
from sandbox.storage.atomic import (
    HASH_KEY,
    has_right_hash,
    storage_errors,
    with_hash,
    write_with_hash,
)
from sandbox.storage.first_stage_files import data_identity
from sandbox.storage.locks import locked
from sandbox.storage.shards import Journal, Place, Shards, present, read_journal, read_member
from sandbox.training.first_stage import prepare_first_stage

FORMAT = 1
KINDS = ("latents", "text")

log = logging.getLogger(__name__)


def encode_all(root: Root, rank: Rank) -> dict[str, Any]:
    """Encodes the splits of `root.data` into `root.task.to`, a share per rank.

    Returns the folder and the numbers of clips in total, encoded now, and unusable. Raises
    ConfigError, DataError, StorageError, and Preempted on a stop request.
    """
    if "video" not in root.data.provides():
        raise ConfigError(
            f"data={root.data.plugin.split('/')[1]}: has no pixels to encode; choose other data"
        )
    folder = Path(root.task.to).expanduser()
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    use_kernels(root)
    use_threads(root)
    with rank.rank0_first():  # creates the first stage if needed; other ranks load it
        networks = Networks(root, rank)
    weights = f"first_stage-{networks.digest[:12]}.safetensors"
    source = registry.create(root.data)
    with ExitStack() as opened:
        opened.enter_context(locked(folder / f"rank-{rank.index:02}.json"))
        if rank.index == 0 and not is_intact(folder / weights):
            state = networks.first_stage.state_dict()
            weight_files.write(state, folder / weights, hashed=True)
        writer = Writer(folder, root, networks, rank, opened)
        shares = {name: writer.share(name, source.split(name)) for name in root.task.splits}
        no_text = writer.text("") if networks.conditioner is not None else None
        prompts = {p: writer.text(p) for p in root.task.prompts} if no_text else {}
    rank.wait_for_all()
    parts = rank.gather_plain([shares, writer.made, writer.bad])
    bad = {k: v for _, _, found in parts for k, v in found.items()}
    made = sum(number for _, number, _ in parts)
    splits = {}
    for name in root.task.splits:
        rows = sorted((row for share, _, _ in parts for row in share[name]), key=itemgetter(0))
        splits[name] = [row for _, row in rows]
    clip = root.data.clips()[0]
    index = {
        "format": FORMAT,
        "clip": [clip.channels, clip.frames, clip.height, clip.width],
        "vae": settings_of(root),
        "first_stage": {"file": weights, "sha256": networks.digest},
        "precision": root.precision,
        "text": networks.conditioner is not None,
        "image": root.conditioning.encodes(),
        "no_text": no_text,
        "prompts": prompts,
        "data": to_container(root.data),
        "bad": bad,
        "splits": splits,
    }
    if rank.index == 0:
        with storage_errors(folder):
            write_with_hash(folder / "index.json", index)
            if root.task.prune:
                with locked(folder / "rank-00.json"):
                    prune(folder, index, root.task.shard_mb * 1_000_000)
        _report(folder, index, made)
    count = sum(map(len, splits.values()))
    return {"folder": str(folder), "clips": count, "made": made, "bad": len(bad)}


def _report(folder: Path, index: dict[str, Any], made: int) -> None:
    rows = [row for split in index["splits"].values() for row in split]
    sizes = {"x".join(map(str, row["size"])) for row in rows}
    text = render(
        "encoded.txt", folder=folder, index=index, made=made, rows=rows,
        drawn=sum(row.get("drawn", False) for row in rows),
        buckets=sorted(sizes - {"x".join(map(str, index["clip"][1:]))}),
    )  # fmt: skip
    print(text, flush=True)


def prune(folder: Path, index: dict[str, Any], shard_bytes: int) -> None:
    """Deletes entries that the index does not reference.

    Live entries of mixed shards are copied to new shards, and the index is updated, before old
    shards are deleted: an interrupted prune leaves a valid index.
    """
    rows = [row for split in index["splits"].values() for row in split]
    named = [(row, kind) for row in rows for kind in KINDS if row[kind]]
    named += [(index["prompts"], caption) for caption in index["prompts"]]
    named += [(index, "no_text")] if index["no_text"] else []
    live = {tuple(of[name]) for of, name in named}
    moved: dict[tuple, Place] = {}
    stale: set[str] = set()
    for journal in sorted(p for kind in KINDS for p in folder.glob(f"{kind}-*.jsonl")):
        stored = {key: place for key, *place in read_journal(journal)}
        own = {place[0] for place in stored.values()} - {place[0] for place in live}
        mixed = {p[0] for p in stored.values() if tuple(p) not in live} - own
        if mixed:
            with Shards(folder, journal.stem, shard_bytes) as shards:
                shards.begin_shard()
                for key, (file, at, size, crc) in stored.items():
                    if file in mixed and (file, at, size, crc) in live:
                        payload = read_member(folder, [file, at, size, crc])
                        if payload is None:
                            raise StorageError(
                                f"{folder / file}: damaged at byte {at}; run task=encode again"
                            )
                        moved[file, at, size, crc] = shards.put(key, payload)
        stale |= own | mixed
    for of, name in named:
        of[name] = moved.get(tuple(of[name]), of[name])
    if moved:
        write_with_hash(folder / "index.json", index)
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    kept = index["first_stage"]["file"]
    for path in folder.glob("first_stage-*.safetensors"):
        if path.name != kept:
            path.unlink()


class Networks:
    """The first stage, and the conditioning's text encoder if it is frozen."""

    def __init__(self, root: Root, rank: Rank) -> None:
        self.device, self.precision = device_of(root, rank.local), root.precision
        self.first_stage: Any = build("vae", root)
        prepare_first_stage(root, self.first_stage, None, rank)
        freeze(self.first_stage)
        self.digest = fingerprint(self.first_stage)
        self.keeps_image = root.conditioning.encodes()
        self.of_latents = _hash(settings_of(root), self.digest, self.precision, self.keeps_image)
        self.conditioner: TextEncoder | None = None
        self.of_text = ""
        if root.conditioning.embeds():
            conditioner: Any = freeze(build("conditioning", root))
            settings = without_added(to_container(root.conditioning))
            self.of_text = _hash(settings, fingerprint(conditioner))
            self.conditioner = conditioner.to(self.device)
        self.first_stage.to(self.device)

    @torch.no_grad()
    def latents(self, sample: Sample) -> dict[str, Tensor]:
        """Encodes as the training step does: in its precision; keeps the posterior."""
        video = sample["video"][None].to(self.device)
        dtype = DTYPES[self.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            stored = self.first_stage.encode(video).stored
        tensors = {"stored": stored[0].cpu()}
        return tensors | (
            {"image": to_uint8_if_lossless(image_of(sample))} if self.keeps_image else {}
        )

    @torch.no_grad()
    def text(self, caption: str) -> dict[str, Tensor]:
        assert self.conditioner is not None
        embedding, mask = self.conditioner.encoded([caption])
        return {"text": to_half_if_lossless(embedding[0].cpu()), "text_mask": mask[0].cpu()}


class Writer:
    """One rank's share: finds cached entries in the folder and adds missing ones.

    `opened` closes its files.
    """

    def __init__(
        self, folder: Path, root: Root, networks: Networks, rank: Rank, opened: ExitStack
    ) -> None:
        self.root, self.networks, self.rank = root, networks, rank
        self.made = 0
        self.bad: dict[str, str] = {}
        size = root.task.shard_mb * 1_000_000
        self.shards = {
            k: opened.enter_context(Shards(folder, f"{k}-{rank.index:02}", size)) for k in KINDS
        }
        self.rows = opened.enter_context(closing(Journal(folder / f"rows-{rank.index:02}.jsonl")))
        self.places: dict[str, dict[str, Place]] = {}
        for kind, own in self.shards.items():
            others = (present(folder, [*read_journal(p)]) for p in folder.glob(f"{kind}-*.jsonl"))
            self.places[kind] = {k: v for part in others for k, v in part.items()} | own.places
        journals = folder.glob("rows-*.jsonl")
        pairs = (pair for path in journals for pair in read_journal(path))
        known = {p[0]: p[1] for p in pairs if isinstance(p, list) and isinstance(p[1], dict)}
        # rows of earlier versions have no hash
        intact = {k: row for k, row in known.items() if HASH_KEY not in row or has_right_hash(row)}
        self.known = {
            k: {n: v for n, v in row.items() if n != HASH_KEY} for k, row in intact.items()
        }
        self.folder, self.intact = folder, set[tuple[str, str]]()

    def share(self, name: str, items: Items) -> list[list[Any]]:
        """[index, row] for each usable clip of this rank's share."""
        mine = range(self.rank.index, len(items), self.rank.world)
        found: list[list[Any]] = []
        with Progress(f"encoding {name}", len(mine), "clip") as progress:
            for done, index in enumerate(mine, 1):
                if self.rank.stop_signal:
                    raise Preempted(
                        f"stopped by {self.rank.stop_signal}; finished clips are cached; run the "
                        "same command to resume"
                    )
                try:
                    found.append([index, self.row(items, index)])
                except BadItem as e:
                    self._count(items.id(index), str(e))
                progress.update(done, new=str(self.made))
        return found

    def row(self, items: Items, index: int) -> dict[str, Any]:
        """A clip's entry of the index. Raises BadItem."""
        key = self._files_key(items, index)
        row = self.known.get(key) if key else None
        if row is None or "size" not in row or not self._has("latents", row["latents"]):
            row = self._encoded(items, index)
            if key:
                self.rows.add([key, with_hash(row)])
        text = row["caption"] or ""
        return row | {
            "id": items.id(index),
            "latents": self.places["latents"][row["latents"]],
            "text": self.text(text) if self.networks.conditioner is not None else None,
        }

    def text(self, caption: str) -> Place:
        """The place of a caption's embedding, which is computed if missing."""
        key = _hash(self.networks.of_text, caption)
        if not self._has("text", key):
            self.places["text"][key] = self.shards["text"].add(key, self.networks.text(caption))
        return self.places["text"][key]

    def _has(self, kind: str, key: str) -> bool:
        """Whether an entry is cached and its bytes, which are read once, are those of its CRC."""
        place = self.places[kind].get(key)
        if place is not None and (kind, key) not in self.intact:
            if read_member(self.folder, place) is None:
                log.warning("%s is damaged at byte %d: made again", *place[:2])
                del self.places[kind][key]
                return False
            self.intact.add((kind, key))
        return place is not None

    def _files_key(self, items: Items, index: int) -> str | None:
        """Key of a clip's source files and all settings; None if data have no content hashes."""
        if not isinstance(items, Hashed):
            return None
        return _hash(
            self.networks.of_latents, data_identity(self.root.data), self.root.seed,
            items.id(index), items.content(index),
        )  # fmt: skip

    def _encoded(self, items: Items, index: int) -> dict[str, Any]:
        key_of_draws = self.root.seed, "data", 0, items.id(index)
        rng = keyed(*key_of_draws)
        sample = items.load(index, rng)
        if not self.made:
            check_sample(items.id(index), sample, self.root.data)
        is_drawn = rng.random() != keyed(*key_of_draws).random()  # loading drew numbers
        key = _hash(self.networks.of_latents, *pixel_hashes(sample))
        if not self._has("latents", key):
            tensors = self.networks.latents(sample)
            self.places["latents"][key] = self.shards["latents"].add(key, tensors)
            self.made += 1
        scalars = {name: float(sample[name]) for name in sorted(NUMBERS.intersection(sample))}
        size = list(sample["video"].shape[1:])
        row = {"caption": sample.get("caption"), "scalars": scalars, "latents": key, "size": size}
        return row | ({"drawn": True} if is_drawn else {})

    def _count(self, name: str, reason: str) -> None:
        self.bad[name] = reason
        if len(self.bad) > self.root.data.max_bad:
            first = "; ".join(f"{k}: {v}" for k, v in [*self.bad.items()][:5])
            raise DataError(
                f"{len(self.bad)} clips are unusable, more than data.max_bad="
                f"{self.root.data.max_bad}: fix or remove them, or raise the limit: {first}"
            )


def is_intact(weights: Path) -> bool:
    """Whether a file of weights is there, undamaged."""
    try:
        return weights.is_file() and bool(weight_files.read(weights))
    except StorageError:
        return False


def image_of(sample: Sample) -> Tensor:
    """(3, N, H, W): the clip's image, else its first frame."""
    return sample["image"] if "image" in sample else sample["video"][:, :1]


def to_uint8_if_lossless(image: Tensor) -> Tensor:
    """uint8 if that is lossless (x / 127.5 - 1), else unchanged."""
    found = ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return found if torch.equal(found / 127.5 - 1, image) else image.contiguous()


def to_half_if_lossless(x: Tensor) -> Tensor:
    """In half precision if that is lossless."""
    halves = (x.to(dtype) for dtype in (torch.bfloat16, torch.float16))
    return next((half for half in halves if torch.equal(half.float(), x)), x)


def pixel_hashes(sample: Sample) -> Iterator[str]:
    """Hashes of a clip's pixels."""
    for name in ("video", "image"):
        if name in sample:
            tensor = sample[name].contiguous()
            yield f"{name} {list(tensor.shape)} {hashlib.sha256(tensor.numpy().data).hexdigest()}"


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
