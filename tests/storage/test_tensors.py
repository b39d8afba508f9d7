"""safetensors files as this project writes and maps them, held against the library's own."""

import hashlib
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from toolkit.storage import manifest
from toolkit.storage.manifest import check_files, entry_of, write_checked
from toolkit.storage.tensors import DTYPES, mapped, write_safetensors


def tensors():
    torch.manual_seed(0)
    found = {str(dtype): (torch.rand(3, 5) * 100).to(dtype) for dtype in DTYPES}
    return found | {"empty": torch.empty(0, 4), "scalar": torch.tensor(2.5), "turned": torch.rand(4, 6).T}


def equal(found, wanted):
    return found.keys() == wanted.keys() and all(
        found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]) for name in wanted
    )


def test_what_is_written_is_read_by_the_library_and_mapped_alike(tmp_path):
    digest = write_safetensors(tmp_path / "own", list(tensors().items()))
    assert digest == hashlib.sha256((tmp_path / "own").read_bytes()).hexdigest()
    assert equal(load_file(tmp_path / "own"), tensors()) and equal(mapped(tmp_path / "own"), tensors())
    save_file({name: tensor.contiguous() for name, tensor in tensors().items()}, tmp_path / "theirs")
    assert equal(mapped(tmp_path / "theirs"), tensors())


def test_a_mapped_file_takes_no_memory_until_it_is_used_and_no_file_descriptor(tmp_path):
    file, size = tmp_path / "large", 2**25
    write_safetensors(file, [("x", torch.zeros(size, dtype=torch.uint8)), ("y", torch.ones(8))])

    def resident_bytes():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident_bytes()
    found = mapped(file)
    assert found["y"].sum() == 8 and resident_bytes() - before < size / 8
    assert str(file) in Path("/proc/self/maps").read_text()
    assert not any(str(file) == os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists())
    found["y"][0] = 5  # a copy of this process's own
    assert load_file(file)["y"][0] == 1


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: b"", lambda raw: b"\x80\x04K\x01." + raw[5:]])
def test_what_is_no_safetensors_file_is_named(tmp_path, damage):
    write_safetensors(tmp_path / "x", [("a", torch.rand(20))])
    (tmp_path / "x").write_bytes(damage((tmp_path / "x").read_bytes()))
    with pytest.raises(ValueError, match=f"{tmp_path}/x is not a safetensors file"):
        mapped(tmp_path / "x")


def test_storage_that_gives_back_other_bytes_is_found_out(tmp_path, monkeypatch):
    entry = write_checked(tmp_path / "x", [("a", torch.rand(20))])
    assert entry == entry_of(tmp_path / "x")
    check_files(tmp_path, {"x": entry})
    write = manifest.write_safetensors

    def spoiled(path, tensors):
        digest = write(path, tensors)
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
        return digest

    monkeypatch.setattr(manifest, "write_safetensors", spoiled)
    with pytest.raises(ValueError, match="reads back other than it was written"):
        write_checked(tmp_path / "x", [("a", torch.rand(20))])
    with pytest.raises(ValueError, match=r"x has SHA-256 .* its manifest says"):
        check_files(tmp_path, {"x": entry})
    with pytest.raises(ValueError, match="x has 152 bytes, its manifest says 3"):
        check_files(tmp_path, {"x": {"bytes": 3, "sha256": entry["sha256"]}})
