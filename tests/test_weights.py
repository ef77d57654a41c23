"""Files of weights: what is written is read, and what is damaged, foreign or hostile is refused without running."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import hrbp
from blocksparse import BSRConv2d, BSRLinear, BSRPattern
from hrbp.__main__ import main
from hrbp.files import whole_file
from hrbp.formats import sealed
from hrbp.formats.packed import pack
from hrbp.formats.weights import (
    SAFETENSORS_DTYPES,
    layers,
    read_weights,
    saved_shape,
    sparse_layer,
    sparse_names,
    write_groupings,
)
from hrbp.structures.grouping import Grouping
from hrbp.structures.regrouping import regroup


def weights():
    generator = torch.Generator().manual_seed(0)
    return {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "half": torch.randn(5, 2, generator=generator).half(),
        "scalar": torch.tensor(3),
        "mask": torch.rand(2, 3, 1, 1, generator=generator) < 0.5,
        "empty": torch.zeros(0, 4, dtype=torch.float64),
    }


def same(found, expected):
    assert list(found) == list(expected)
    for name, t in expected.items():
        assert (found[name].dtype, found[name].shape) == (t.dtype, t.shape), name
        assert torch.equal(found[name], t), name


def refused(path, words):
    with pytest.raises(ValueError, match=words) as caught:
        read_weights(path)
    assert str(caught.value).startswith(f"read_weights(): {path} ")


def safetensors(tensors, metadata=None, pad=0):
    """The bytes of a .safetensors file, from the format's description."""
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header, data = {} if metadata is None else {"__metadata__": metadata}, b""
    for name, t in tensors.items():
        raw = bytes(t.contiguous().flatten().view(torch.uint8).tolist()) if t.numel() else b""
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode() + b" " * pad
    return struct.pack("<Q", len(text)) + text + data


# ---------------------------------------------------------------- reading what others wrote


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".pth.tar"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(tmp_path, suffix, zipped):
    path = tmp_path / f"file{suffix}"
    torch.save(weights(), path, _use_new_zipfile_serialization=zipped)
    same(read_weights(path), weights())
    same(read_weights(str(path)), weights())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_numpy_files(tmp_path, save):
    arrays = {name: t.numpy() for name, t in weights().items()}
    save(tmp_path / "file.npz", **arrays, big=arrays["conv.weight"].astype(">f4"), words=np.array(["resnet", "v2"]),
         fortran=np.asfortranarray(arrays["conv.weight"][:, :, 0, 0]))  # fmt: skip
    expected = weights()
    expected.update(big=expected["conv.weight"], fortran=expected["conv.weight"][:, :, 0, 0])
    found = read_weights(tmp_path / "file.npz")
    same(found, expected)
    assert all(t.is_contiguous() for t in found.values())


@pytest.mark.parametrize("pad", [0, 5])
def test_safetensors_files(tmp_path, pad):
    (tmp_path / "file.safetensors").write_bytes(safetensors(weights(), {"format": "pt"}, pad))
    same(read_weights(tmp_path / "file.safetensors"), weights())


@given(st.sampled_from(sorted(SAFETENSORS_DTYPES)), st.lists(st.integers(0, 3), max_size=4), st.integers(0, 2**32 - 1))
def test_every_dtype_of_safetensors(tmp_path_factory, name, shape, seed):
    dtype = SAFETENSORS_DTYPES[name]
    size = int(np.prod(shape)) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8,
                        generator=torch.Generator().manual_seed(seed))  # fmt: skip
    expected = raw.view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)
    path = tmp_path_factory.mktemp("dtypes") / "file.safetensors"
    path.write_bytes(safetensors({"one": torch.ones(1, dtype=torch.uint8), "t": expected}))
    found = read_weights(path)["t"]
    assert (found.dtype, found.shape) == (dtype, torch.Size(shape))
    assert found.flatten().view(torch.uint8).tolist() == raw.tolist()  # at an odd offset, bit for bit


def test_bools_are_zero_or_one_whatever_the_bytes(tmp_path):
    path = tmp_path / "file.safetensors"
    text = b'{"a": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}}'
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes([0, 2, 255]))
    assert read_weights(path)["a"].view(torch.uint8).tolist() == [0, 1, 1]


def test_order_in_the_header_need_not_be_the_order_of_the_data(tmp_path):
    header = {
        "b": {"dtype": "U8", "shape": [2], "data_offsets": [3, 5]},
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "file.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes([1, 2, 3, 4, 5]))
    same(read_weights(path), {"b": torch.tensor([4, 5], dtype=torch.uint8), "a": torch.tensor([1, 2, 3]).byte()})


def test_checkpoints_are_unwrapped(tmp_path):
    path = tmp_path / "file.pt"
    for wrapped in (
        {"state_dict": weights(), "epoch": 3, "optimizer": {"state": {0: {"momentum": torch.ones(3)}}}},
        {"model": {f"module.{name}": t for name, t in weights().items()}},
        {"model_state_dict": {f"module._orig_mod.{name}": t for name, t in weights().items()}},
        {"model": {"state_dict": weights()}},
        {**weights(), "note": "text", "lr": 0.1},
    ):
        torch.save(wrapped, path)
        same(read_weights(path), weights())
    mixed = {"module.a": torch.ones(2), "b": torch.ones(2)}
    torch.save(mixed, path)
    same(read_weights(path), mixed)
    torch.save({"a": nn.Parameter(torch.ones(2))}, path)
    assert not read_weights(path)["a"].requires_grad


# ---------------------------------------------------------------- refusing


class Bomb:
    """Restoring this runs a command."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_nothing_in_a_file_is_executed(tmp_path):
    mark, path, npz = tmp_path / "executed", tmp_path / "bomb.pt", tmp_path / "bomb.npz"
    for protocol in range(2, 6):
        path.write_bytes(pickle.dumps({"a": Bomb(mark)}, protocol=protocol))
        refused(path, "it needs")
        torch.save({"a": torch.ones(2), "b": Bomb(mark)}, path, pickle_protocol=protocol)
        refused(path, "it needs")
    torch.save({"a": torch.ones(2), "b": Bomb(mark)}, path)
    refused(path, r"only running code of the file could restore; it needs tensors alone: torch.save\(model.state_dict")
    torch.save(nn.Linear(2, 2), path)
    refused(path, "only running code of the file could restore")
    np.savez(npz, a=np.array([Bomb(mark)], dtype=object))
    refused(npz, "has 'a' as Python objects, which only running code of the file restores")
    with zipfile.ZipFile(npz, "w") as archive:
        archive.writestr("a", pickle.dumps(Bomb(mark)))
    refused(npz, "has 'a', which is no array")
    npz.write_bytes(pickle.dumps(Bomb(mark)))
    refused(npz, "is damaged or no .npz file")
    assert not mark.exists()
    with path.open("rb") as file:
        torch.load(file, weights_only=False)  # the bomb is live
    torch.save({"b": Bomb(mark)}, path)
    torch.load(path, weights_only=False)
    assert mark.exists()


def test_foreign_files_are_refused(tmp_path):
    for suffix in (".pt", ".npz", ".safetensors"):
        path = tmp_path / f"foreign{suffix}"
        for content in (b"", b"hello", b"\x80\x02", b"PK\x03\x04" + bytes(50), bytes(100), b"\xff" * 100):
            path.write_bytes(content)
            refused(path, "it needs")
    (tmp_path / "file.onnx").write_bytes(b"x")
    refused(tmp_path / "file.onnx", r"ends in '.onnx'; it needs .pt, .pth, .bin, .ckpt, .tar, .npz or .safetensors")
    refused(tmp_path, "is a folder; it needs a file")
    with pytest.raises(FileNotFoundError):
        read_weights(tmp_path / "missing.pt")
    path = tmp_path / "other.pt"
    for content, words in ((torch.ones(3), "holds a Tensor"), ([1], "holds a list"), ({"lr": 1}, "holds no tensors"),
                           ({"a": torch.ones(2, 2).to_sparse()}, "has 'a' as torch.sparse_coo")):  # fmt: skip
        torch.save(content, path)
        refused(path, words)
    torch.jit.script(nn.Linear(2, 2)).save(str(path))
    refused(path, "is damaged or no torch.save file")


@pytest.mark.parametrize("name", ["file.pt", "legacy.pt", "file.npz", "packed.npz", "file.safetensors"])
def test_damaged_files_raise_nothing_but_value_errors(tmp_path, name):
    path = tmp_path / name
    arrays = {key: t.numpy() for key, t in weights().items()}
    if path.suffix == ".pt":
        torch.save(weights(), path, _use_new_zipfile_serialization=name == "file.pt")
    elif path.suffix == ".npz":
        (np.savez if name == "file.npz" else np.savez_compressed)(path, **arrays)
    else:
        path.write_bytes(safetensors(weights()))
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(150):
        path.write_bytes(whole[: draw.randrange(len(whole))])
        refused(path, "it needs")
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[draw.randrange(len(whole))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            read_weights(path)  # values may differ where a format has no checksum
        except ValueError as error:
            assert str(error).startswith(f"read_weights(): {path} ")  # noqa: PT017


@pytest.mark.parametrize("name", ["file.pt", "sealed.pt", "training.pt", "file.npz", "packed.npz"])
def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path, name):
    """Anywhere in a file that has checksums: in weights, in names, in the tables of a zip."""
    path, draw = tmp_path / name, random.Random(1)
    arrays = {key: t.numpy() for key, t in weights().items()}
    if name == "sealed.pt":
        hrbp.save(hrbp.sparsify(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 4)), 0.5), path)
    elif name == "training.pt":
        path.write_bytes(sealed.sealed_bytes(sealed.TRAINING, {"model": weights(), "history": []}))
    elif name == "file.pt":
        torch.save(weights(), path)
    else:
        (np.savez if name == "file.npz" else np.savez_compressed)(path, **arrays)
    whole, expected = path.read_bytes(), read_weights(path)
    refusals = 0
    for at in draw.sample(range(8 * len(whole)), 400):
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << at % 8
        path.write_bytes(damaged)
        try:
            found = read_weights(path)
        except ValueError as error:
            assert str(error).startswith(f"read_weights(): {path} ")  # noqa: PT017
            refusals += 1
        else:
            same(found, expected)
    assert refusals > 40  # the rest hit what no reader looks at: dates, padding
    weight = next(t for t in expected.values() if t.dim() == 4).numpy().tobytes()
    at = len(whole) // 4 if name == "packed.npz" else whole.index(weight) + 3
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 8]) + whole[at + 1 :])
    for command in ("info", "regroup"):
        assert main([command, str(path)]) == 2


def test_a_file_written_without_checksums_is_read(tmp_path):
    path = tmp_path / "file.pt"
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(weights(), path)
    finally:
        torch.serialization.set_crc32_options(before)
    same(read_weights(path), weights())


def test_zips_that_lie(tmp_path):
    """Two arrays of one name; a member that claims a terabyte; a state_dict that holds itself."""
    npz, path = tmp_path / "file.npz", tmp_path / "file.pt"
    np.savez(npz, a=np.ones(3))
    member = zipfile.ZipFile(npz).read("a.npy")
    with zipfile.ZipFile(npz, "w") as archive:
        archive.writestr("a.npy", member)
        archive.writestr("a", member)
    refused(npz, "has two arrays 'a'; it needs names that occur once")
    torch.save(weights(), path)
    whole = path.read_bytes()
    name = b"file/data/0"
    at = whole.rindex(name) - 46  # of the central directory
    assert whole[at : at + 4] == b"PK\x01\x02"
    for field in (slice(at + 20, at + 24), slice(at + 24, at + 28)):
        damaged = bytearray(whole)
        damaged[field] = (2**32 - 2).to_bytes(4, "little")
        path.write_bytes(damaged)
        tracemalloc.start()
        refused(path, "is damaged")
        assert tracemalloc.get_traced_memory()[1] < 10**7
        tracemalloc.stop()
    damaged = bytearray(whole)
    damaged[at + 38] |= 0x10  # the attributes of a folder, of which torch.load reads nothing
    path.write_bytes(damaged)
    refused(path, "'file/data/0' has the attributes of a folder")
    circle = {"a": torch.ones(2, 2)}
    circle["model"] = circle
    torch.save(circle, path)
    same(read_weights(path), {"a": torch.ones(2, 2)})


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, r"shape \(2,\), torch.float32, in 4 bytes"),
        ({"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 8]}, "in 8 bytes; it needs all bytes"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}, "counts, and"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}, "counts, and"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}, "counts, and"),
        ({"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}, "counts, and"),
        ({"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}, "counts, and"),
        ({"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}, "counts, and"),
        ({"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}, "counts, and"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, "leaves a gap of 4 bytes"),
        ({"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}, "has 'a' in 'F4'; it needs one of BOOL"),
        ({"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}, r"has 'a' in \['F32'\]"),
        ({"dtype": "F32", "shape": [2]}, "it needs dtype, shape and data_offsets"),
        ([1, 2], "it needs dtype, shape and data_offsets"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "has 8 bytes of data where its header needs 4"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "has 8 bytes of data where its header needs 16"),
    ],
)
def test_hostile_safetensors_headers(tmp_path, entry, words):
    path = tmp_path / "file.safetensors"
    text = json.dumps({"a": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    refused(path, words)


def test_safetensors_headers_that_lie(tmp_path):
    path = tmp_path / "file.safetensors"

    def write(text, data=b"", length=None):
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)

    one = '{"dtype": "U8", "shape": [2], "data_offsets": [%d, %d]}'
    write(f'{{"a": {one % (0, 2)}, "b": {one % (1, 3)}}}'.encode(), bytes(3))
    refused(path, "has 'b' at bytes 1 .. 3, which overlaps the tensor before it")
    write(f'{{"a": {one % (0, 2)}, "b": {one % (0, 2)}}}'.encode(), bytes(2))
    refused(path, "overlaps")
    write(f'{{"a": {one % (0, 2)}, "a": {one % (2, 4)}}}'.encode(), bytes(4))
    refused(path, "a name occurs twice")
    write(b"{}", length=2**63)
    refused(path, "announces a header of 9223372036854775808")
    write(b"{}", length=100)
    refused(path, "has 10 bytes and announces a header of 100")
    write(b"[1]")
    refused(path, "has a header that is a list")
    write(b"[" * 200_000)
    refused(path, "has a header that is no JSON")
    write(b'{"a": ' + b"9" * 5000 + b"}")
    refused(path, "has a header that is no JSON")
    write(b"\xff{}")
    refused(path, "has a header that is no JSON")
    write(b"{}")
    refused(path, "holds no tensors")


def test_no_file_takes_more_memory_than_it_fills(tmp_path):
    """Shapes that announce terabytes, with the bytes of a few numbers."""
    path = tmp_path / "wide.pt"
    torch.save({"a": torch.ones(1).expand(10**6, 10**6)}, path)
    refused(path, r"has 'a' of shape \(1000000, 1000000\) in 4 bytes")
    npz = tmp_path / "wide.npz"
    for size in (10**12, 5):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (size,)})
        with zipfile.ZipFile(npz, "w") as archive:
            archive.writestr("a.npy", header.getvalue() + bytes(16))
        tracemalloc.start()
        refused(npz, rf"has 'a' of shape \({size},\), float32, in 16 bytes")
        assert tracemalloc.get_traced_memory()[1] < 10**7
        tracemalloc.stop()


def test_what_unpacks_beyond_the_memory_is_refused(tmp_path, monkeypatch):
    npz = tmp_path / "packed.npz"
    np.savez_compressed(npz, a=np.zeros(10**6, dtype=np.float32))
    assert npz.stat().st_size < 10**5
    monkeypatch.setattr(os, "sysconf", lambda name: 1000)
    refused(npz, r"unpacks to 0.0 GB; it needs at most the 0.0 GB of this machine")


# ---------------------------------------------------------------- layers


def test_layers_are_filter_banks():
    tensors = {
        "conv.weight": torch.ones(4, 3, 3, 3), "conv.bias": torch.ones(4), "fc.weight": torch.ones(5, 4),
        "bn.running_mean": torch.ones(4), "steps": torch.ones(2, 2, dtype=torch.int64), "raw": torch.ones(2, 2).half(),
        "conv1d.weight": torch.ones(2, 2, 3), "m.mask": torch.ones(2, 2, 1, 1, dtype=torch.bool),
        "none.weight": torch.ones(0, 2), "stored.values": torch.ones(2, 2, 3),
    }  # fmt: skip
    assert list(layers(tensors)) == ["conv", "fc", "raw", "conv1d", "m"]


def test_a_weight_beside_its_mask_is_left_to_the_mask():
    pruned = nn.Sequential(nn.Conv2d(3, 4, 3))
    prune.random_unstructured(pruned[0], "weight", 0.5)
    found = layers(pruned.state_dict())
    assert list(found) == ["0"]
    assert torch.equal(found["0"], pruned[0].weight_mask)
    masked = nn.Sequential(nn.Linear(6, 4))
    masked[0].register_buffer("mask", torch.rand(4, 6) < 0.5)  # as files of single weights have it
    assert list(layers(masked.state_dict())) == ["0"]
    assert torch.equal(layers(masked.state_dict())["0"], masked[0].mask)
    alone = {"weight": torch.ones(2, 2), "mask": torch.eye(2), "unmask": torch.ones(2, 3)}
    assert list(layers(alone)) == ["mask", "unmask"]


def test_sparse_layers_of_a_checkpoint(tmp_path):
    shape = (16, 8, 3, 3)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.05
    conv = BSRPattern.from_mask(mask, (4, 2), order)
    linear = BSRPattern.random((8, 4, 1, 1), (2, 2), 0.5)
    model = nn.ModuleDict({"conv": BSRConv2d(conv), "fc": BSRLinear(linear), "bn": nn.BatchNorm2d(4)})
    torch.save(model.state_dict(), tmp_path / "file.pt")
    tensors = read_weights(tmp_path / "file.pt")
    assert sparse_names(tensors) == ["conv", "fc"]
    assert layers(tensors) == {}
    assert sparse_layer(tensors, "conv") == sparse_layer(tensors, "conv", shape) == conv
    assert sparse_layer(tensors, "fc") == sparse_layer(tensors, "fc", (8, 4)) == linear
    assert (saved_shape(tensors, "conv"), saved_shape(tensors, "fc")) == (shape, (8, 4, 1, 1))
    with pytest.raises(ValueError, match=r"conv: the saved layer has a weight of shape .*; \(16, 2, 3, 3\) was asked"):
        sparse_layer(tensors, "conv", (16, 2, 3, 3))
    for damage in (torch.tensor([16, 8, 3]), torch.ones(4), torch.tensor([16, 8, 0, 3], dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"conv: weight_shape is .*; it needs int32 \[K, C, R, S\]"):
            sparse_layer({**tensors, "conv.weight_shape": damage}, "conv")
    # Files of older versions do not have it.
    tensors = {key: t for key, t in tensors.items() if not key.endswith("weight_shape")}
    assert saved_shape(tensors, "conv") is None
    assert sparse_layer(tensors, "conv", shape) == conv
    with pytest.raises(ValueError, match="conv: the file has no weight_shape, as those of older versions"):
        sparse_layer(tensors, "conv")
    with pytest.raises(ValueError, match=r"conv: the saved index does not fit a layer \(16, 2, 3, 3\)"):
        sparse_layer(tensors, "conv", (16, 2, 3, 3))
    own = BSRConv2d(conv).state_dict()  # a module on its own: no name
    assert sparse_names(own) == [""]
    assert sparse_layer(own, "", shape) == conv


# ---------------------------------------------------------------- writing


def test_groupings_are_written_and_read(tmp_path):
    made = {
        name: regroup(torch.rand(k, 8, 3, 3, generator=torch.Generator().manual_seed(k)), 0.5, groups=4, min_rows=2)
        for name, k in (("layer1.conv", 8), ("file", 16))
    }
    write_groupings(tmp_path / "out.npz", made)
    tensors = read_weights(tmp_path / "out.npz")
    for name, g in made.items():
        parts = [tensors[f"{name}.{part}"] for part in ("row_order", "channels", "taps")]
        again = Grouping(tuple(tensors[f"{name}.mask"].shape), *parts)
        assert torch.equal(again.mask(), tensors[f"{name}.mask"])
        assert torch.equal(again.mask(), g.mask())
        assert torch.equal(again.row_order, g.row_order)
    assert list(layers(tensors)) == ["layer1.conv", "file"]
    assert [p.name for p in tmp_path.iterdir()] == ["out.npz"]
    assert (tmp_path / "out.npz").stat().st_mode & 0o777 == 0o644


def test_a_file_is_whole_or_the_old_one(tmp_path):
    path = tmp_path / "out.npz"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as file:  # noqa: PT012
        file.write(b"half of the new")
        file.flush()
        assert path.read_bytes() == b"old"
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert [p.name for p in Path(tmp_path).iterdir()] == ["out.npz"]
    with whole_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"


# ---------------------------------------------------------------- masked layers


def packed():
    """A saved model's content with one layer of 2 x 5 single weights, three of them kept."""
    mask = torch.tensor([[1, 0, 0, 0, 1], [0, 0, 1, 0, 0]], dtype=torch.bool)
    weight = torch.arange(1.0, 11).view(2, 5)
    pattern = BSRPattern.from_mask(mask[:, :, None, None], (1, 1))
    values = pattern.values_from_dense(weight[:, :, None, None])
    state = {"a.values": values, "a.indptr": pattern.indptr, "a.indices": pattern.indices, "b": torch.ones(2)}
    return mask, weight * mask, {"state_dict": pack(state, {"a": (pattern, [2, 5])}), "masked": {"a": [2, 5]}}


def test_layers_of_single_weights_are_bits_and_what_is_kept(tmp_path):
    mask, weight, content = packed()
    assert content["state_dict"]["a.weight"].tolist() == [1, 5, 8]
    assert content["state_dict"]["a.mask"].tolist() == [0b10001001, 0]
    torch.save(content, tmp_path / "file.pt")
    same(read_weights(tmp_path / "file.pt"), {"a.weight": weight, "a.mask": mask, "b": torch.ones(2)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"masked": [1]}, "the shapes of masked layers are a list"),
        ({"masked": {"c": [2, 5]}}, "'c' of shape .* has no weight"),
        ({"masked": {"a": [2, 9]}}, "or no mask of a bit for each cell"),
        ({"masked": {"a": [2, -5]}}, "or no mask of a bit for each cell"),
        ({"masked": {"a": [10**9, 10**9]}}, "or no mask of a bit for each cell"),
        ({"a.mask": torch.tensor([0b10001001, 1], dtype=torch.uint8)}, "has .3,. weights and a mask of 3"),
        ({"a.mask": torch.tensor([0b10001000, 0], dtype=torch.uint8)}, "has .3,. weights and a mask of 2"),
        ({"a.weight": torch.ones(3, 1)}, "has .3, 1. weights"),
    ],
)
def test_damaged_masked_layers_are_refused(tmp_path, change, said):
    _, _, content = packed()
    for key, value in change.items():
        (content if key == "masked" else content["state_dict"])[key] = value
    torch.save(content, tmp_path / "file.pt")
    refused(tmp_path / "file.pt", f"is damaged: .*{said}")
