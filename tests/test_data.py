"""Images are what was on disk or was drawn; batches are a function of seed, epoch and position, on every rank."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import os
import pickle
import random
import struct
import sys
import tarfile
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hrbp import data
from hrbp.data import Batches, MemorySet, cifar, folders, load, sets, shapes

CUDA = [pytest.param("cuda", marks=pytest.mark.gpu)]


def numbered(count: int, size: tuple[int, int] = (16, 16)) -> MemorySet:
    """Random images whose label is their own number."""
    images = torch.from_numpy(np.random.default_rng(count).integers(1, 256, (count, 3, *size), dtype=np.uint8))
    return MemorySet(images, torch.arange(count), [str(i) for i in range(count)])


def test_grey_images_need_no_mean():
    grey = MemorySet(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), "ab")
    assert (grey.mean, grey.std) == ((0.5,), (0.25,))


def labels_of(batches: Batches, epoch: int = 0, start: int = 0) -> list[list[int]]:
    return [y.tolist() for _, y in batches.epoch(epoch, start)]


def flat(lists) -> list:
    return list(itertools.chain.from_iterable(lists))


def pixels(batches: Batches, x: torch.Tensor) -> torch.Tensor:
    """What x was before it was normalised."""
    return (x * batches.std + batches.mean).round().to(torch.uint8)


def same_batches(ours, theirs) -> bool:
    ours, theirs = list(ours), list(theirs)
    return len(ours) == len(theirs) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(ours, theirs, strict=True)
    )


# ---------------------------------------------------------------- batches

counts = st.integers(1, 40)
worlds = st.integers(1, 4)
seeds = st.integers(0, 2**32 - 1)


@given(counts, worlds, st.integers(1, 5), seeds, st.integers(0, 1000))
def test_ranks_share_every_global_batch(count, world, each, seed, epoch):
    """Training: what the ranks see together is what one rank would see, and no image comes twice."""
    size = min(world * each, count // world * world)
    if size == 0:
        return
    images = numbered(count)
    alone = labels_of(Batches(images, size, train=True, seed=seed), epoch)
    ranks = [Batches(images, size, train=True, seed=seed, rank=r, world=world) for r in range(world)]
    shares = [labels_of(b, epoch) for b in ranks]
    assert [flat(batch) for batch in zip(*shares, strict=True)] == alone
    assert all(len(part) == size // world for share in shares for part in share)
    assert len(alone) == count // size == len(ranks[0])
    seen = flat(alone)
    assert len(set(seen)) == len(seen)


@given(counts, worlds, st.integers(1, 5))
def test_to_test_is_every_image_once(count, world, each):
    images = numbered(count)
    ranks = [Batches(images, world * each, train=False, rank=r, world=world) for r in range(world)]
    seen = flat(flat(labels_of(b)) for b in ranks)
    assert sorted(seen) == list(range(count))
    assert labels_of(Batches(images, each, train=False)) == [
        list(range(i, min(i + each, count))) for i in range(0, count, each)
    ]
    assert len(ranks[0]) == -(-count // (world * each)) >= len(labels_of(ranks[0]))


@given(st.integers(4, 40), st.integers(1, 4), seeds, st.integers(0, 9), st.integers(0, 40), st.booleans())
def test_any_batch_can_be_the_first(count, size, seed, epoch, start, train):
    """Resuming gives the remaining batches bit for bit, in a new object too."""
    images = numbered(count)
    batches = Batches(images, size, train=train, seed=seed)
    start = min(start, len(batches))
    whole = list(batches.epoch(epoch))
    assert len(whole) == len(batches)
    assert same_batches(Batches(images, size, train=train, seed=seed).epoch(epoch, start), whole[start:])


def test_ranks_augment_as_one_would():
    images = numbered(24)
    alone = list(Batches(images, 8, train=True, seed=5).epoch(2))
    ranks = [list(Batches(images, 8, train=True, seed=5, rank=r, world=2).epoch(2)) for r in range(2)]
    joined = [(torch.cat([a, c]), torch.cat([b, d])) for (a, b), (c, d) in zip(*ranks, strict=True)]
    assert same_batches(joined, alone)


def test_seed_and_epoch_change_order_and_augmentation():
    images = numbered(64)
    first = Batches(images, 64, train=True, seed=0)
    orders = [labels_of(first, e)[0] for e in range(5)]
    orders += [labels_of(Batches(images, 64, train=True, seed=s))[0] for s in range(1, 5)]
    assert len({tuple(o) for o in orders}) == len(orders)
    assert all(sorted(o) == list(range(64)) for o in orders)
    shown = []
    for epoch in range(3):
        ((x, y),) = first.epoch(epoch)
        shown.append(x[y.argsort()])
    assert not torch.equal(shown[0], shown[1])
    assert not torch.equal(shown[1], shown[2])


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (8, 24)])
def test_augmentation_moves_and_flips_and_does_nothing_else(size):
    """Every augmented image is one of the images that padding, cropping and flipping can make; all of them occur."""
    images = numbered(3, size)
    h, w = size
    pad_h, pad_w = h // 8, w // 8
    padded = torch.nn.functional.pad(images.images, (pad_w, pad_w, pad_h, pad_h))
    possible = {}
    for i in range(3):
        for top in range(2 * pad_h + 1):
            for left in range(2 * pad_w + 1):
                crop = padded[i, :, top : top + h, left : left + w]
                possible[i, crop.numpy().tobytes()] = (top, left, False)
                possible[i, crop.flip(2).numpy().tobytes()] = (top, left, True)
    batches, seen = Batches(images, 3, train=True), set()
    for epoch in range(400):
        for x, y in batches.epoch(epoch):
            for image, label in zip(pixels(batches, x), y.tolist(), strict=True):
                seen.add(possible[label, image.numpy().tobytes()])
    tops, lefts, flips = (set(values) for values in zip(*seen, strict=True))
    assert tops == set(range(2 * pad_h + 1))
    assert lefts == set(range(2 * pad_w + 1))
    assert flips == {False, True}


def test_to_test_images_are_normalised_and_otherwise_untouched():
    plain = numbered(10)
    images = MemorySet(plain.images, plain.labels, plain.classes, mean=(0.1, 0.4, 0.6), std=(0.2, 0.3, 0.5))
    ((x, _),) = Batches(images, 10, train=False).epoch()
    mean, std = (torch.tensor(t)[:, None, None] for t in (images.mean, images.std))
    torch.testing.assert_close(x, (plain.images / 255 - mean) / std)
    assert x.dtype == torch.float32


def test_global_random_state_is_neither_read_nor_written(tmp_path):
    folder = picture_folder(tmp_path, size=80)

    def everything():
        for images in (shapes("train", count=20), load(str(folder), "train", image_size=72, workers=0)):
            yield from Batches(images, 4, train=True, seed=1).epoch(1)

    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    before = torch.get_rng_state(), pickle.dumps(np.random.get_state())  # noqa: NPY002
    first = list(everything())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert pickle.dumps(np.random.get_state()) == before[1]  # noqa: NPY002
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    assert same_batches(everything(), first)


@pytest.mark.parametrize("device", CUDA)
def test_a_gpu_sees_the_same_batches(device):
    images = numbered(20, (32, 32))
    ours = Batches(images, 5, train=True, device=device)
    assert ours.images.images.is_cuda
    moved = [(x.cpu(), y.cpu()) for x, y in ours.epoch(3)]
    theirs = list(Batches(images, 5, train=True).epoch(3))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(moved, theirs, strict=True))
    for (x, _), (u, _) in zip(moved, theirs, strict=True):
        torch.testing.assert_close(x, u, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "world": 2}, "rank is 2 of 2; it needs 0 <= rank < world"),
        ({"world": 3}, r"batch_size is 4 for 3 ranks together; it needs a positive multiple of 3"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 11}, "batch_size is 11 and there are 10 images"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_batches_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        Batches(numbered(10), **{"batch_size": 4, "train": True, **options})


def test_epochs_refuse_what_they_do_not_have():
    batches = Batches(numbered(10), 4, train=True)
    assert labels_of(batches, 0, 2) == []
    for epoch, start in ((-1, 0), (0, 3), (0, -1)):
        with pytest.raises(ValueError, match=f"batch {start} of epoch {epoch}; an epoch has 2 batches"):
            batches.epoch(epoch, start)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 3, 4, 4)}, r"images is torch.float32 \(2, 3, 4, 4\); it needs uint8 \[N, C, H, W\]"),
        ({"images": torch.zeros(0, 3, 4, 4, dtype=torch.uint8)}, "none of them 0"),
        ({"labels": torch.tensor([0, 1], dtype=torch.int32)}, r"labels is torch.int32 \(2,\); it needs int64 \[2\]"),
        ({"labels": torch.tensor([0])}, r"it needs int64 \[2\]"),
        ({"labels": torch.tensor([0, 2])}, "labels run from 0 to 2; 2 classes need 0 to 1"),
        ({"labels": torch.tensor([-1, 0])}, "labels run from -1 to 0"),
        ({"mean": (0.5,)}, "images of 3 channels need as many"),
    ],
)
def test_sets_refuse(change, message):
    good = {"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "labels": torch.tensor([0, 1]), "classes": "ab"}
    MemorySet(**good)
    with pytest.raises(ValueError, match=message):
        MemorySet(**{**good, **change})


# ---------------------------------------------------------------- the generated set


def test_generated_images_depend_on_split_seed_and_number_alone():
    train, test, other = shapes("train", count=600), shapes("test", count=600), shapes("train", count=600, seed=1)
    assert torch.equal(shapes("train", count=70).images, train.images[:70])
    assert torch.equal(shapes("train", count=501).labels, train.labels[:501])
    every = torch.cat([s.images for s in (train, test, other)]).flatten(1)
    assert len({row.numpy().tobytes() for row in every}) == 1800
    assert (len(load("shapes", "train")), len(load("shapes", "test"))) == (5000, 2000)
    assert load("shapes", "test", image_size=24, count=9).images.shape == (9, 3, 24, 24)
    assert train.shape == (3, 16, 16)


def test_generated_images_do_not_depend_on_threads():
    before, ours = torch.get_num_threads(), shapes("train", count=300, image_size=32).images
    try:
        torch.set_num_threads(before + 2)
        assert torch.equal(shapes("train", count=300, image_size=32).images, ours)
    finally:
        torch.set_num_threads(before)


def test_generated_classes_are_equally_many_and_named():
    images = shapes("train", count=5000)
    share = images.labels.bincount(minlength=10) / 5000
    assert share.min() > 0.08
    assert share.max() < 0.12
    assert len(set(images.classes)) == 10
    assert images.classes[3] == "checked square"


def test_a_generated_class_is_its_outline():
    """The mean of many images of a class, which is brighter than the ground, shows the shape: a ring has a hole."""
    images = shapes("train", count=5000)
    grey = images.images.float().mean(1)
    mean = {name: grey[images.labels == i].mean(0) for i, name in enumerate(images.classes)}
    for texture in ("striped", "checked"):
        centre = {s: mean[f"{texture} {s}"][7:9, 7:9].mean() for s in ("square", "disc", "cross", "ring")}
        edge = {s: mean[f"{texture} {s}"][[0, 0, -1, -1], [0, -1, 0, -1]].mean() for s in centre}
        assert all(centre[s] - edge[s] > 25 for s in ("square", "disc", "cross"))
        assert centre["ring"] - edge["ring"] < 15


# ---------------------------------------------------------------- CIFAR: files as Python 2 pickled them


class Python2Pickle:
    """Writes protocol 2 as Python 2 wrote it: str as bytes (SHORT_BINSTRING, BINSTRING), numpy's old module name."""

    def __init__(self) -> None:
        self.out = io.BytesIO()

    def dumps(self, value) -> bytes:
        self.out.write(b"\x80\x02")
        self.write(value)
        self.out.write(b".")
        return self.out.getvalue()

    def write(self, value) -> None:
        out = self.out.write
        if isinstance(value, dict):
            out(b"}(")
            for item in value.items():
                self.write(item[0])
                self.write(item[1])
            out(b"u")
        elif isinstance(value, list):
            out(b"](")
            for item in value:
                self.write(item)
            out(b"e")
        elif isinstance(value, bytes):
            out(b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value)))
            out(value)
        elif isinstance(value, int):
            out(b"J" + struct.pack("<i", value))
        else:
            out(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n(K\x00tU\x01b\x87R(K\x01")
            self.write(value.shape[0])
            self.write(value.shape[1])
            out(b"\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb")
            out(b"\x88" if np.isfortran(value) else b"\x89")
            self.write(value.tobytes("A"))
            out(b"tb")


def dumps2(value) -> bytes:
    return Python2Pickle().dumps(value)


def cifar_contents(name: str, each: int = 7) -> tuple[dict[str, dict], str]:
    """What the files of a small archive in the official format hold, and the name of its folder."""
    random = np.random.default_rng(0)

    def batch(keys):
        pixels = random.integers(0, 256, (each, 3072), dtype=np.uint8)
        entries = {b"data": pixels, b"batch_label": b"a batch", b"filenames": [b"%d.png" % i for i in range(each)]}
        return {**entries, **{key: random.integers(0, n, each).tolist() for key, n in keys.items()}}

    if name == "cifar10":
        files = {f: batch({b"labels": 10}) for f in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]}
        files["batches.meta"] = {b"num_cases_per_batch": each, b"label_names": [b"class %d" % i for i in range(10)]}
        return files, "cifar-10-batches-py"
    files = {f: batch({b"fine_labels": 100, b"coarse_labels": 20}) for f in ("train", "test")}
    names = {b"fine_label_names": [b"fine %d" % i for i in range(100)], b"coarse_label_names": [b"c"] * 20}
    return {**files, "meta": names}, "cifar-100-python"


def archive_name(folder: str) -> str:
    return folder.replace("-batches-py", "-python") + ".tar.gz"


def write_cifar(root: Path, folder: str, files: dict[str, bytes], packed: bool) -> Path:
    if not packed:
        (root / folder).mkdir()
        for name, content in files.items():
            (root / folder / name).write_bytes(content)
        return root / folder
    with tarfile.open(root / archive_name(folder), "w:gz") as tar:
        for name, content in [*files.items(), ("readme.html", b"<html>")]:
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return root / archive_name(folder)


@pytest.mark.filterwarnings("ignore:numpy.core:DeprecationWarning")
def test_the_python_2_writer_writes_what_pickle_reads():
    contents, _ = cifar_contents("cifar10")
    back = pickle.loads(dumps2(contents["test_batch"]), encoding="bytes")
    assert np.array_equal(back.pop(b"data"), contents["test_batch"].pop(b"data"))
    assert back == contents["test_batch"]


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "archive"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_what_was_in_the_files(tmp_path, name, packed):
    contents, folder = cifar_contents(name)
    place = write_cifar(tmp_path, folder, {f: dumps2(c) for f, c in contents.items()}, packed)
    key, names = (b"labels", b"label_names") if name == "cifar10" else (b"fine_labels", b"fine_label_names")
    meta = contents["batches.meta" if name == "cifar10" else "meta"]
    for split in ("train", "test"):
        files = [c for f, c in contents.items() if split in f or (split == "train" and "data" in f)]
        pixels = np.concatenate([c[b"data"] for c in files])
        for root in (tmp_path, place):
            images = load(name, split, root=root)
            # red, green and blue planes follow each other, each row by row
            assert np.array_equal(images.images.numpy(), pixels.reshape(-1, 3, 32, 32))
            assert images.images[2, 1, 4, 5] == pixels[2, 1024 + 4 * 32 + 5]
            assert images.labels.tolist() == flat(c[key] for c in files)
            assert images.classes == tuple(n.decode() for n in meta[names])
            assert (images.name, images.shape) == (name, (3, 32, 32))


def test_fortran_order_is_understood(tmp_path):
    contents, folder = cifar_contents("cifar100")
    pixels = contents["test"][b"data"]
    contents["test"][b"data"] = np.asfortranarray(pixels)
    write_cifar(tmp_path, folder, {f: dumps2(c) for f, c in contents.items()}, packed=False)
    assert np.array_equal(load("cifar100", "test", root=tmp_path).images.numpy(), pixels.reshape(-1, 3, 32, 32))


def test_missing_cifar_says_what_to_put_where(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"cifar10 is not in .*; put cifar-10-python\.tar\.gz .* there, or pass"
    ):
        load("cifar10", "train", root=tmp_path)
    (tmp_path / "cifar-100-python").mkdir()
    with pytest.raises(FileNotFoundError, match="has no train, meta; extract the archive again"):
        load("cifar100", "train", root=tmp_path)


@given(share=st.floats(0, 0.999), flip=st.booleans())
@settings(max_examples=60)
def test_damaged_archives_are_refused(tmp_path_factory, share, flip):
    """Cut short anywhere, or with any one byte of the compressed data changed."""
    tmp_path = tmp_path_factory.mktemp("cifar")
    contents, folder = cifar_contents("cifar100", each=2)
    path = write_cifar(tmp_path, folder, {f: dumps2(c) for f, c in contents.items()}, packed=True)
    whole = bytearray(path.read_bytes())
    header = 10 + len(path.name.removesuffix(".gz")) + 1  # time and file name, which nothing protects
    at = header + int(share * (len(whole) - header))
    if flip:
        whole[at] ^= 0x10
    path.write_bytes(whole if flip else whole[:at])
    with pytest.raises(ValueError, match=r"cifar-100-python.tar.gz is cut short, damaged or no .tar.gz"):
        load("cifar100", "test", root=tmp_path)


@given(share=st.floats(0, 0.999))
@settings(max_examples=60)
def test_files_cut_short_are_refused(tmp_path_factory, share):
    tmp_path = tmp_path_factory.mktemp("cifar")
    contents, folder = cifar_contents("cifar100", each=2)
    files = {f: dumps2(c) for f, c in contents.items()}
    files["test"] = files["test"][: int(share * len(files["test"]))]
    write_cifar(tmp_path, folder, files, packed=False)
    with pytest.raises(ValueError, match="test is damaged or foreign"):
        load("cifar100", "test", root=tmp_path)


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_runs_nothing(tmp_path, packed, protocol):
    victim = tmp_path / "victim"
    evil = pickle.dumps({"data": Touch(victim)}, protocol=protocol)
    pickle.loads(evil)
    assert victim.exists(), "the pickle does run something where it is let"
    victim.unlink()
    contents, folder = cifar_contents("cifar10")
    files = {f: dumps2(c) for f, c in contents.items()}
    write_cifar(tmp_path, folder, {**files, "test_batch": evil}, packed)
    with pytest.raises(ValueError, match=r"test_batch is damaged or foreign \(it names \w+.system, which no file of"):
        load("cifar10", "test", root=tmp_path)
    assert not victim.exists()


@pytest.mark.parametrize("module", ["builtins\neval", "numpy\nload", "numpy.core.multiarray\nfromfile", "os\nsystem"])
def test_no_other_name_is_looked_up(module):
    with pytest.raises(ValueError, match="which no file of CIFAR does"):
        cifar._unpickle(b"\x80\x02c" + module.encode() + b"\nU\x011\x85R.", "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop(b"data"), "has no matrix of bytes under b'data'"),
        (lambda c: c.update({b"data": [1, 2]}), "has no matrix of bytes under b'data'"),
        (
            lambda c: c.update({b"data": np.zeros((7, 3071), np.uint8)}),
            r"has data of shape \(7, 3071\); cifar100 needs",
        ),
        (lambda c: c.pop(b"fine_labels"), "has no list of 7 ints under b'fine_labels'"),
        (lambda c: c[b"fine_labels"].pop(), "has no list of 7 ints"),
        (lambda c: c[b"fine_labels"].__setitem__(3, b"dog"), "has no list of 7 ints"),
        (lambda c: c[b"fine_labels"].__setitem__(3, 100), r"has labels \d+ to 100; cifar100 has 100 classes"),
        (lambda c: c[b"fine_labels"].__setitem__(3, -1), "has labels -1 to"),
    ],
)
def test_foreign_contents_are_refused(tmp_path, change, message):
    contents, folder = cifar_contents("cifar100")
    change(contents["test"])
    write_cifar(tmp_path, folder, {f: dumps2(c) for f, c in contents.items()}, packed=False)
    with pytest.raises(ValueError, match=message):
        load("cifar100", "test", root=tmp_path)


def test_foreign_arrays_are_refused():
    """Another dtype, and a shape that the bytes do not fill: nothing is read past them."""
    good = dumps2({b"data": np.ones((2, 3), np.uint8)})
    assert cifar._byte_matrix(cifar._unpickle(good, "here")[b"data"], "here").tolist() == [[1] * 3] * 2
    for old, new in ((b"u1", b"f4"), (b"u1", b"O8"), (struct.pack("<i", 3), struct.pack("<i", 4))):
        assert good.count(old) == 1
        with pytest.raises(ValueError, match="has no matrix of bytes"):
            cifar._byte_matrix(cifar._unpickle(good.replace(old, new), "here")[b"data"], "here")


def test_foreign_archives_are_refused(tmp_path):
    contents, _ = cifar_contents("cifar100")
    path = tmp_path / "cifar-10-python.tar.gz"
    write_cifar(tmp_path, "cifar-100-python", {f: dumps2(c) for f, c in contents.items()}, packed=True).rename(path)
    with pytest.raises(ValueError, match=r"has no cifar-10-batches-py/test_batch, .*; it is not the archive"):
        load("cifar10", "test", root=tmp_path)
    for content in (b"<html>not found</html>", b"", gzip.compress(b"no tar" * 1000)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cut short, damaged or no .tar.gz|has no cifar-10-batches-py"):
            load("cifar10", "test", root=tmp_path)


def archive_of(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], **options) -> None:
    with tarfile.open(path, "w:gz", **options) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_archives_that_claim_more_than_they_have_are_refused(tmp_path, monkeypatch):
    """A sparse member of a terabyte of zeros; one that is cut; one that unpacks to too much."""
    path, name = tmp_path / "cifar-10-python.tar.gz", "cifar-10-batches-py/test_batch"

    def refused(message):
        tracemalloc.start()
        with pytest.raises(ValueError, match=message):
            load("cifar10", "test", root=tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 10**8
        tracemalloc.stop()

    terabyte = tarfile.TarInfo(name)
    terabyte.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.name": name,
                            "GNU.sparse.size": str(10**12), "GNU.sparse.map": "0,3"}  # fmt: skip
    archive_of(path, [(terabyte, b"abc")], format=tarfile.PAX_FORMAT)
    refused(f"{name} claims 1000000000000 bytes")
    archive_of(path, [(tarfile.TarInfo(name), bytes(100))])
    whole = gzip.decompress(path.read_bytes())
    long = tarfile.TarInfo(name)
    long.size = 10**12
    path.write_bytes(gzip.compress(long.tobuf(tarfile.GNU_FORMAT) + whole[512:]))
    refused(f"{name} claims 1000000000000 bytes")
    monkeypatch.setattr(cifar, "MOST_ARCHIVE", 10**6)
    path.write_bytes(gzip.compress(whole[:512] + bytes(10**7)))
    refused("unpacks to more than 1000000 bytes")
    monkeypatch.setattr(cifar, "MOST_FILE", 100)
    (tmp_path / "cifar-10-batches-py").mkdir()
    for file in ("test_batch", "batches.meta"):
        (tmp_path / "cifar-10-batches-py" / file).write_bytes(bytes(101))
    refused("test_batch has 101 bytes; no file of CIFAR has more than 100")


def test_a_pickle_takes_no_more_memory_than_it_has(tmp_path):
    """Numbers in it that name places in memory, or the lengths of what follows."""
    for content in (b"\x80\x02]r\xff\xff\xff\x7f.", b"\x80\x04\x8e" + (10**12).to_bytes(8, "little") + b"abc.",
                    b"\x80\x04\x95" + (10**12).to_bytes(8, "little") + b"N."):  # fmt: skip
        tracemalloc.start()
        with pytest.raises(ValueError, match=r"here (is damaged or foreign|holds a)"):
            cifar._unpickle(content, "here")
        assert tracemalloc.get_traced_memory()[1] < 10**6
        tracemalloc.stop()


def test_damaged_archives_and_pickles_raise_nothing_but_value_errors(tmp_path):
    contents, folder = cifar_contents("cifar10")
    files = {f: dumps2(c) for f, c in contents.items()}
    draw = random.Random(0)
    place = write_cifar(tmp_path, folder, files, packed=True)
    whole = gzip.decompress(place.read_bytes())
    for i in range(300):
        damaged = bytearray(whole if i % 2 else whole[: draw.randrange(len(whole))])
        for _ in range(draw.randrange(1, 4) if i % 2 else 0):
            damaged[draw.randrange(min(len(damaged), 4096) if i % 4 == 1 else len(damaged))] = draw.randrange(256)
        place.write_bytes(gzip.compress(damaged, 1))
        with contextlib.suppress(ValueError, FileNotFoundError):  # what is harmless is read
            load("cifar10", "test", root=tmp_path)
    for _ in range(2000):
        damaged = bytearray(files["test_batch"])
        for _ in range(draw.randrange(1, 4)):
            damaged[draw.randrange(min(len(damaged), 200))] = draw.randrange(256)
        with contextlib.suppress(ValueError):
            cifar._byte_matrix(cifar._unpickle(bytes(damaged), "here").get(b"data"), "here")


def test_sizes_that_no_machine_holds_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"shapes\(\): 5000 images of 1000000x1000000 need \d+ GB; this machine has"):
        load("shapes", "train", image_size=10**6)
    folder = picture_folder(tmp_path, 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sets, "memory_bytes", lambda: 10**4)
        with pytest.raises(ValueError, match="8 images of 32x32 need 0 GB; this machine has 0 GB"):
            load(str(folder), "train", image_size=32)


@pytest.mark.parametrize("name", ["Shapes", "SHAPES"])
def test_names_in_any_case(name):
    assert load(name, "test", count=5).name == "shapes"
    with pytest.raises(FileNotFoundError, match="cifar10 is not in"):
        load("CIFAR10", "test", root="nowhere")


# ---------------------------------------------------------------- folders


def picture_folder(root: Path, size: int, each: int = 4) -> Path:
    """train/ and val/ with two classes of plain PNGs, brighter from image to image, red or blue."""
    image = pytest.importorskip("PIL.Image")
    for split in ("train", "val"):
        for label, name in enumerate(("blue", "red")):
            (root / "set" / split / name).mkdir(parents=True)
            for i in range(each):
                colour = [0, 0, 0]
                colour[0 if label else 2] = 100 + 10 * i + (5 if split == "val" else 0)
                image.new("RGB", (size, size + 8), tuple(colour)).save(root / "set" / split / name / f"{i}.PNG")
            (root / "set" / split / name / "notes.txt").write_text("no image")
    return root / "set"


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("size", "kind"), [(24, data.MemorySet), (72, data.FolderSet)])
def test_folders_are_what_was_in_the_files(tmp_path, size, kind, workers):
    folder = picture_folder(tmp_path, 80)
    for split, extra in (("train", 0), ("test", 5)):
        images = load(str(folder), split, image_size=size, workers=workers)
        assert isinstance(images, kind)
        assert (images.classes, images.shape, len(images)) == (("blue", "red"), (3, size, size), 8)
        batches = Batches(images, 3, train=False)
        seen = [(pixels(batches, x), y) for x, y in batches.epoch()]
        x, y = (torch.cat(t) for t in zip(*seen, strict=True))
        assert y.tolist() == [0] * 4 + [1] * 4
        for i in range(8):
            want = torch.zeros(3, dtype=torch.uint8)
            want[0 if i >= 4 else 2] = 100 + 10 * (i % 4) + extra
            assert torch.equal(x[i], want[:, None, None].expand(3, size, size))


@pytest.mark.usefixtures("limited")
def test_decoding_processes_change_nothing(tmp_path):
    """The same augmented batches with any number of workers, from any batch on, on two ranks as on one."""
    folder = picture_folder(tmp_path, 80)
    noise = np.random.default_rng(0)
    image = pytest.importorskip("PIL.Image")
    for file in sorted(folder.rglob("*.PNG")):
        image.fromarray(noise.integers(0, 256, (80, 100, 3), dtype=np.uint8)).save(file)

    def batches(workers, **options):
        return Batches(load(str(folder), "train", image_size=72, workers=workers), 2, train=True, seed=4, **options)

    whole = list(batches(0).epoch(1))
    assert len(whole) == 4
    assert same_batches(batches(2).epoch(1), whole)
    assert same_batches(batches(2).epoch(1, 3), whole[3:])
    halves = [list(batches(w, rank=w, world=2).epoch(1)) for w in range(2)]
    assert same_batches([(torch.cat([a, c]), torch.cat([b, d])) for (a, b), (c, d) in zip(*halves, strict=True)], whole)
    assert not same_batches(batches(0).epoch(2), whole)


def test_a_crop_is_a_part_of_the_image():
    """Draws at their limits give the whole image, its corners, and their mirror images."""
    image = pytest.importorskip("PIL.Image")
    ramp = np.arange(64, dtype=np.uint8)
    picture = np.stack(
        [np.broadcast_to(ramp, (64, 64)), np.broadcast_to(ramp[:, None], (64, 64)), np.zeros((64, 64))], 2
    )
    file = io.BytesIO()
    image.fromarray(picture.astype(np.uint8)).save(file, "png")

    def crop(*draws):
        file.seek(0)
        return folders._decode(file, 16, None if not draws else np.float32(draws)).astype(int)

    plain = crop(1, 0.5, 0.5, 0.5, 1)
    assert plain[0, 0, 0] < 4 < 59 < plain[0, 0, 15]
    assert (np.diff(plain[0], axis=1) > 0).all()
    assert (crop(1, 0.5, 0.5, 0.5, 0)[0] == plain[0][:, ::-1]).all()
    small = [crop(0, 0.5, left, top, 1) for left in (0, 1) for top in (0, 1)]  # 8% of the area: 18 of 64 pixels
    for (left, top), part in zip([(0, 0), (0, 46), (46, 0), (46, 46)], small, strict=True):
        assert abs(part[0].min() - left) <= 1
        assert abs(part[1].min() - top) <= 1
        assert abs(part[0].max() - left - 17) <= 1
    wide, tall = crop(0.2, 1, 0, 0, 1), crop(0.2, 0, 0, 0, 1)
    assert wide[0].max() > wide[1].max() + 5
    assert tall[1].max() > tall[0].max() + 5
    middle = crop()
    assert (abs(middle[0].min() - 4), abs(middle[0].max() - 59)) <= (1, 1)


@pytest.mark.usefixtures("limited")
def test_folders_refuse(tmp_path):
    folder = picture_folder(tmp_path, 20)
    layout = r"needs train/CLASS/\*.png to train, and val/CLASS/\*.png or test/CLASS/\*.png with the same classes"
    with pytest.raises(
        ValueError, match=rf"set/train has no folder train; it has 2 folders \(blue, red\); .* {layout}"
    ):
        load(str(folder / "train"), "train")
    (tmp_path / "flat" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="flat/train has no folder for each class; it has nothing"):
        load(str(tmp_path / "flat"), "train")
    for i in range(4):
        (tmp_path / "flat" / "train" / f"{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"each class; it has 4 images \(0.png, 1.png, 2.png, ...\)"):
        load(str(tmp_path / "flat"), "train")
    (tmp_path / "flat" / "train" / "a").mkdir()
    (tmp_path / "flat" / "train" / "a" / "0.png").mkdir()
    with pytest.raises(ValueError, match=r"a/0.png has the name of an image and is no file"):
        load(str(tmp_path / "flat"), "train")
    (tmp_path / "flat" / "train" / "a" / "0.png").rmdir()
    os.mkfifo(tmp_path / "flat" / "train" / "a" / "0.png")  # which a reader would wait for
    with pytest.raises(ValueError, match=r"a/0.png has the name of an image and is no file"):
        load(str(tmp_path / "flat"), "train")
    with pytest.raises(ValueError, match=rf"flat has no folder val or test; it has 1 folder \(train\); .* {layout}"):
        load(str(tmp_path / "flat"), "test")
    (folder / "train" / "green").mkdir()
    with pytest.raises(ValueError, match=r"green has no images \(.*\); it has nothing"):
        load(str(folder), "train")
    with pytest.raises(ValueError, match=r"need the same folders; \['green'\] are in one only"):
        load(str(folder), "test")
    (folder / "train" / "green").rmdir()
    broken = folder / "train" / "red" / "3.PNG"
    broken.write_bytes(broken.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"3.PNG cannot be decoded: .*; remove or replace it"):
        load(str(folder), "train", image_size=20)
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"3.PNG cannot be decoded: .*; remove or replace it") as caught:
            list(Batches(load(str(folder), "train", workers=workers, image_size=65), 8, train=True).epoch())
        assert "Traceback" not in str(caught.value)


def test_a_folder_needs_pillow(tmp_path, monkeypatch):
    (tmp_path / "train" / "a").mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="which Pillow decodes; pip install pillow"):
        load(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mnist", "train"), r"name is 'mnist'; it needs shapes, digits, cifar10, cifar100, or the path of a folder"),
        (("shapes", "val"), "split is 'val'; it needs 'train' or 'test'"),
        (("shapes", "train", {"count": 0}), "count is 0, image_size 16"),
        (("shapes", "train", {"image_size": 7}), "image_size 7"),
        (("shapes", "train", {"seed": -1}), "seed -1"),
        (("cifar10", "train", {"image_size": 64}), "image_size is 64; cifar10 has images of 32x32"),
        (("cifar10", "train", {"count": 64}), "count is 64, which only 'shapes' takes"),
    ],
)
def test_load_refuses(arguments, message):
    name, split, *options = arguments
    with pytest.raises(ValueError, match=message):
        load(name, split, **(options[0] if options else {}))


# ---------------------------------------------------------------- scikit-learn's digits


def test_digits_are_shared_out_class_by_class_and_never_flipped(monkeypatch):
    rng = np.random.default_rng(0)
    found = types.SimpleNamespace(
        images=rng.integers(0, 17, (200, 8, 8)).astype(np.float64), target=rng.integers(0, 10, 200)
    )
    package = types.ModuleType("sklearn")
    package.datasets = types.ModuleType("sklearn.datasets")
    package.datasets.load_digits = lambda: found
    monkeypatch.setitem(sys.modules, "sklearn", package)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", package.datasets)
    monkeypatch.setattr("hrbp.data.digits.has_digits", lambda: True)
    digits = {split: load("Digits", split) for split in ("train", "test")}
    assert len(digits["train"]) + len(digits["test"]) == 200
    for label in range(10):
        of_class = int((found.target == label).sum())
        assert int((digits["test"].labels == label).sum()) == of_class // 5
    pixels = {image.tobytes() for image in np.rint(found.images * (255 / 16)).astype(np.uint8)}
    both = [image.numpy().tobytes() for images in digits.values() for image in images.images[:, 0]]
    assert len(both) == 200
    assert set(both) == pixels
    assert digits["train"].shape == (1, 8, 8)
    draws = rng.random((200, 5), dtype=np.float32)
    draws[:, :2] = 0.5  # not moved
    numbers = np.arange(len(digits["train"]))
    ((same, _),) = digits["train"].read([(numbers, draws[: len(numbers)])])
    assert torch.equal(same, digits["train"].images)
    with pytest.raises(ValueError, match="digits has images of 8x8"):
        load("digits", "test", image_size=16)
    monkeypatch.setattr("hrbp.data.digits.has_digits", lambda: False)
    with pytest.raises(ImportError, match="needs scikit-learn, which is not installed: pip install scikit-learn"):
        load("digits", "train")
