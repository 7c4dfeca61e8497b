"""Weight files of any format: atomic, with reproducible bytes, never executed."""

import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from sandbox.contracts import StorageError
from sandbox.storage import weight_files
from tests.bad_files import (
    DAMAGES,
    flip_a_byte,
    largest_file,
    names,
    plain_pickle,
    torch_legacy,
    torch_zip,
)

# --- writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [weight_files.LIVE, weight_files.AVERAGED])
def test_exported_weights_are_read_again(tmp_path, name):
    weights = {"a.weight": torch.randn(3, 4).t(), "b": torch.arange(3)}
    path = weight_files.write(weights, tmp_path / "export" / name, {"step": "7"})
    found = weight_files.read(path)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[k], weights[k]) for k in weights)
    assert names(path.parent) == [name]


def test_the_same_weights_and_texts_are_the_same_bytes_in_every_process(tmp_path):
    """safetensors alone writes texts in a random order."""
    from safetensors import safe_open

    texts = {name: f"{name} \u00e4" for name in "abcdef"}
    written = set()
    for i in range(8):
        weights = {"w": torch.ones(2), "b": torch.zeros(3)}
        path = weight_files.write(weights, tmp_path / f"{i}.safetensors", texts)
        written.add(path.read_bytes())
    assert len(written) == 1
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", **texts}
        assert file.get_tensor("w").tolist() == [1, 1]


def test_exported_metadata_is_in_the_header(tmp_path):
    from safetensors import safe_open

    path = weight_files.write({"a": torch.ones(1)}, tmp_path / "w.safetensors", {"step": "7"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "step": "7"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_not_read(tmp_path, damage):
    weights = {"a": torch.randn(40, 4), "half": torch.randn(64).half()}
    path = weight_files.write(weights, tmp_path / "w.safetensors", {"step": "7"}, hashed=True)
    assert torch.equal(weight_files.read(path)["a"], weights["a"])
    damage(path)
    for read in (weight_files.read, lambda p: weight_files.read(p, mapped=True)):
        with pytest.raises(StorageError, match=path.name):
            read(path)


def test_every_flipped_byte_is_noticed(tmp_path):
    """Also those of the header, such as a name or a shape; a blank after it may change."""
    path = weight_files.write({"a": torch.ones(9)}, tmp_path / "w.safetensors", hashed=True)
    content = path.read_bytes()
    blanks = range(len(content[:-36].rstrip()), len(content) - 36)
    key = range(content.index(b'"sha256"'), content.index(b'"sha256"') + 8)
    for i in (i for i in range(len(content)) if i not in (*blanks, *key)):
        path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        with pytest.raises(StorageError):
            weight_files.read(path)


def test_the_hash_of_the_content_is_the_same_with_and_without_the_hash_in_it(tmp_path):
    weights = {"a": torch.ones(3)}
    one, other = (
        weight_files.write(weights, tmp_path / f"{h}.safetensors", hashed=h) for h in (False, True)
    )
    assert one.read_bytes() != other.read_bytes()
    assert weight_files.content_hash(one) == weight_files.content_hash(other)
    flip_a_byte(one)
    assert weight_files.content_hash(one) != weight_files.content_hash(other)


def test_weights_that_share_storage_are_exported(tmp_path):
    table = torch.randn(4, 2)
    path = weight_files.write({"in": table, "out": table}, tmp_path / "w.safetensors")
    assert torch.equal(weight_files.read(path)["out"], table)


def test_export_to_a_full_disk_leaves_the_old_file(tmp_path):
    path = weight_files.write({"a": torch.ones(1)}, tmp_path / "w.safetensors")
    with largest_file(10_000), pytest.raises(StorageError):
        weight_files.write({"a": torch.ones(100_000)}, path)
    assert torch.equal(weight_files.read(path)["a"], torch.ones(1))
    assert names(tmp_path) == ["w.safetensors"]


# --- reading --------------------------------------------------------------------------------------


def test_numbers_of_a_mapped_file_are_read_when_they_are_looked_at(tmp_path):
    """Names and shapes of a file are known without reading it: here its numbers change after."""
    path, zeros = tmp_path / "model.ckpt", bytes(4 * 4096)
    torch.save({"state_dict": {"a": torch.zeros(4096)}}, path)
    found = weight_files.read(path, mapped=True)
    changed = path.read_bytes().replace(zeros, b"\x01" * len(zeros))
    with path.open("r+b") as file:
        file.write(changed)
    assert found["a"].all()


@pytest.mark.parametrize("key", [None, "state_dict", "module", "model"])
def test_weights_are_found_in_a_foreign_training_checkpoint(tmp_path, key):
    weights = {"w": torch.randn(2)}
    whole = weights if key is None else {key: weights, "epoch": 3, "global_step": torch.tensor(1)}
    torch.save(whole, tmp_path / "model.ckpt")
    found = weight_files.read(tmp_path / "model.ckpt")
    assert list(found) == ["w"] and torch.equal(found["w"], weights["w"])


def not_weights(path: Path) -> None:
    torch.save({"epoch": 3}, path)


def text(path: Path) -> None:
    path.write_text("version https://example.org/spec\n")


def half_a_zip(path: Path) -> None:
    torch.save({"w": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a", "b")


def nothing(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("write", [not_weights, text, half_a_zip, other_zip, nothing, Path.mkdir])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_is_no_weights_file_is_a_storage_error(tmp_path, write, suffix):
    path = tmp_path / f"model{suffix}"
    write(path)
    for mapped in (False, True):
        with pytest.raises(StorageError, match="model"):
            weight_files.read(path, mapped)


@pytest.mark.parametrize("name", ["missing.pt", "missing.safetensors", "weights.npz"])
def test_missing_and_unknown_files_are_storage_errors(tmp_path, name):
    with pytest.raises(StorageError, match=name):
        weight_files.read(tmp_path / name)


@pytest.mark.parametrize("seed", range(40))
def test_damaged_foreign_files_are_storage_errors_or_weights(tmp_path, seed):
    """Whatever byte is wrong, no other error gets out."""
    path = tmp_path / "model.pt"
    torch.save({"state_dict": OrderedDict(w=torch.zeros(3), v=torch.ones(2))}, path)
    content = bytearray(path.read_bytes())
    made = torch.Generator().manual_seed(seed)
    for _ in range(8):
        at, to = (int(torch.randint(n, (), generator=made)) for n in (len(content), 256))
        content[at] = to
    path.write_bytes(content)
    try:
        weight_files.read(path)
    except StorageError as e:
        assert "model.pt" in str(e)


# --- malice ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [plain_pickle, torch_zip, torch_legacy])
@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".safetensors"])
def test_payload_in_a_foreign_file_is_not_run(tmp_path, write, suffix):
    path, marker = tmp_path / f"model{suffix}", tmp_path / "owned"
    write(path, marker)
    for mapped in (False, True):
        with pytest.raises(StorageError, match="model"):
            weight_files.read(path, mapped)
    assert not marker.exists()
