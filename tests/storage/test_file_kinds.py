"""What a file is by its bytes: a message about wrong weights names it."""

import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from sandbox.contracts import StorageError
from sandbox.storage import weight_files
from sandbox.storage.file_kinds import PICKLE, SAFETENSORS, TORCH, kind_of_file

TENSORS = {"a.weight": torch.arange(100.0), "b": torch.ones(2, dtype=torch.int32)}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 11251234567\n"


def torch_bytes(**settings) -> bytes:
    out = io.BytesIO()
    torch.save(TENSORS, out, **settings)
    return out.getvalue()


def archive() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("weights/model.safetensors", save(TENSORS))
    return out.getvalue()


def tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        info = tarfile.TarInfo("model.ckpt")
        info.size = 3
        file.addfile(info, io.BytesIO(b"abc"))
    return out.getvalue()


def image(kind: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4)).save(out, kind)
    return out.getvalue()


def arrays(save_to, *given) -> bytes:
    out = io.BytesIO()
    save_to(out, *given)
    return out.getvalue()


WHOLE = save(TENSORS)
DAMAGED = WHOLE[:20] + b"\x00" * 20 + WHOLE[40:]
KINDS = {
    "safetensors": (WHOLE, SAFETENSORS),
    "torch": (torch_bytes(), TORCH),
    "torch before 1.6": (torch_bytes(_use_new_zipfile_serialization=False), PICKLE),
    "pickle": (pickle.dumps({"a": 1}), PICKLE),
    "Git LFS": (LFS, r"a Git LFS pointer of a file of 11,251\.2 MB; .*git lfs pull"),
    "git-annex": (b"../.git/annex/objects/Kj/0p/SHA256E-s1--2", "a git-annex pointer"),
    "HTML": (b"\n<!DOCTYPE html><html><title>Sign in</title>", "an HTML page"),
    "HTML, upper case": (b"<HTML><HEAD>404 Not Found", "an HTML page"),
    "XML error": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "XML .*Error"),
    "JSON error": (b'{"error": "Invalid credentials"}', "a JSON text"),
    "index": (json.dumps({"weight_map": {"a": "b"}}).encode(), "the index of weights .*folder"),
    "config": (json.dumps({"_class_name": "UNet"}).encode(), "the configuration of a model"),
    "text": (b"Entry not found", "a text .*Entry not found"),
    "empty": (b"", "an empty file"),
    "zeros": (bytes(5000), "a file of zeros"),
    "safetensors cut in its tensors": (WHOLE[:-8], r"cut short \(\d+ of \d+ bytes\)"),
    "safetensors cut in its header": (WHOLE[:30], "cut short in its header"),
    "safetensors with a damaged header": (DAMAGED, "header is damaged"),
    "torch cut short": (torch_bytes()[:900], "cut short or damaged"),
    "zip": (archive(), "a zip archive; unpack"),
    "tar": (tar(), "a tar archive"),
    "gzip": (gzip.compress(WHOLE), "a gzip archive"),
    "npz": (arrays(np.savez, np.zeros(2)), "NumPy"),
    "npy": (arrays(np.save, np.zeros(2)), "a NumPy array"),
    "GGUF": (b"GGUF" + struct.pack("<IQQ", 3, 1, 0), "a GGUF file"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(50), "an HDF5 file"),
    "PNG": (image("PNG"), "a PNG image"),
    "WebP": (image("WEBP"), "a WebP image"),
    "MP4": (b"\x00\x00\x00\x20ftypisom" + bytes(50), "an MP4"),
    "noise": (bytes(range(7, 255)), "unknown kind"),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_kind_of_a_file_is_known_by_its_bytes(tmp_path, name):
    content, want = KINDS[name]
    path = tmp_path / "file"
    path.write_bytes(content)
    if want in (SAFETENSORS, TORCH, PICKLE):
        assert kind_of_file(path) == want
    else:
        with pytest.raises(StorageError, match=want):
            weight_files.read(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt", ".bin", ".pth", ".sft", ""])
@pytest.mark.parametrize("name", ["safetensors", "torch", "torch before 1.6"])
@pytest.mark.parametrize("mapped", [False, True])
def test_the_content_decides_how_a_file_is_read(tmp_path, name, suffix, mapped):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(KINDS[name][0])
    found = weight_files.read(path, mapped)
    assert all(torch.equal(found[k], v) for k, v in TENSORS.items())


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize(
    "name", [k for k, v in KINDS.items() if v[1] not in (SAFETENSORS, TORCH, PICKLE)]
)
def test_no_library_is_asked_about_another_kind_of_file(tmp_path, name, suffix):
    """No "header too large", and no advice to convert what is no pickle."""
    path = tmp_path / f"model{suffix}"
    path.write_bytes(KINDS[name][0])
    with pytest.raises(StorageError, match="not a readable") as e:
        weight_files.read(path)
    assert "header too large" not in str(e.value) and "Convert" not in str(e.value)


def test_a_folder_is_called_a_folder(tmp_path):
    with pytest.raises(StorageError, match="it is a folder"):
        weight_files.read(tmp_path)


def test_a_header_that_never_ends_is_no_recursion_error(tmp_path):
    path: Path = tmp_path / "deep.safetensors"
    text = b'{"a":' + b"[" * 100_000
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(StorageError, match="header is damaged"):
        weight_files.read(path)
