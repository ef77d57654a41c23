"""Where images come from (a generated set, CIFAR's archives, folders), and which of them are in which batch."""

from __future__ import annotations

import copy
import gzip
import io
import math
import os
import pickle
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .files import memory_bytes

# Images by their numbers int64 [n], and for each five numbers in [0, 1) to augment it by: float32 [n, 5], or None.
Part = tuple[np.ndarray, np.ndarray | None]

SMALL_IMAGE = 64  # folders of images up to this size are held in memory
EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
LAYOUT = "train/CLASS/*.png to train, and val/CLASS/*.png or test/CLASS/*.png with the same classes to test"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load(
    name: str,
    split: str,
    *,
    root: str | os.PathLike = "data",
    image_size: int | None = None,
    count: int | None = None,
    seed: int = 0,
    workers: int = 4,
) -> ImageSet:
    """One split of a set of labelled images.

    Args:
        name: "shapes" (generated: nothing is downloaded), "cifar10", "cifar100", in any case, or the path of a folder
            with train/CLASS/*.png and val/CLASS/*.png (or .jpeg, ...; test/ where there is no val/).
        split: "train" or "test".
        root: where CIFAR lies: a folder that holds cifar-10-python.tar.gz or the extracted cifar-10-batches-py (for
            CIFAR-100 cifar-100-python.tar.gz or cifar-100-python), or one of these itself.
        image_size: height and width. Default: 16 for shapes, 224 for a folder; CIFAR has 32. A folder of images of up
            to 64 pixels is held in memory, a larger one is decoded while training.
        count: how many images of "shapes": by default 5000 to train, 2000 to test.
        seed: of "shapes". The images of two splits or seeds have nothing to do with each other.
        workers: processes that decode a folder's images while training (0: the process that trains).

    Raises:
        ValueError: an unknown name or split, an option that does not fit, or files that are damaged or foreign.
        FileNotFoundError: there is nothing at `root`; the message says what to put there.
        ImportError: a folder of images without Pillow.
    """
    who = "load()"
    if split not in ("train", "test"):
        raise ValueError(f"{who}: split is {split!r}; it needs 'train' or 'test'")
    name = set_named(name)
    if count is not None and name != "shapes":
        raise ValueError(f"{who}: count is {count}, which only 'shapes' takes; {name} has the images that it has")
    if name == "shapes":
        return shapes(split, count=count, image_size=16 if image_size is None else image_size, seed=seed)
    if name in _CIFAR:
        if image_size not in (None, 32):
            raise ValueError(f"{who}: image_size is {image_size}; {name} has images of 32x32")
        return _cifar(name, split, Path(root))
    if Path(name).is_dir():
        return _folder(Path(name), split, 224 if image_size is None else image_size, workers)
    is_file = " (a file)" if Path(name).is_file() else ""
    raise ValueError(
        f"{who}: name is {name!r}{is_file}; it needs shapes, {', '.join(_CIFAR)}, or the path of a folder with {LAYOUT}"
    )


def set_named(name: str) -> str:
    """The name of a set in any case as it is written; that of a folder as it is."""
    return name.lower() if name.lower() in ("shapes", *_CIFAR) and not Path(name).is_dir() else name


# ---------------------------------------------------------------- sets of images


class ImageSet(ABC):
    """Labelled images: how many, of what shape and classes, and how to read some of them."""

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]  # (C, H, W)
    mean: tuple[float, ...]  # of each channel, black 0 and white 1; for normalisation
    std: tuple[float, ...]
    labels: Tensor  # int64 [N]
    device: torch.device

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def to(self, device: torch.device | str) -> ImageSet:
        """The same images, read onto `device`."""

    @abstractmethod
    def read(self, parts: Sequence[Part]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each part its images uint8 [n, C, H, W], augmented, and labels int64 [n], on `device`."""


class MemorySet(ImageSet):
    """Images held in memory, on the device where they are used.

    Augmented by cropping after padding by an eighth (4 pixels of 32) with black, and by flipping left and right.

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N], in range(len(classes)).
        classes: their names.
        name: of the set, for reports.
        mean, std: of each channel, black 0 and white 1; default: 0.5 and 0.25.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        classes: Sequence[str],
        *,
        name: str = "images",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        who = "MemorySet()"
        if images.dtype != torch.uint8 or images.dim() != 4 or 0 in images.shape:
            raise ValueError(
                f"{who}: images is {images.dtype} {tuple(images.shape)}; it needs uint8 [N, C, H, W], none of them 0"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(f"{who}: labels is {labels.dtype} {tuple(labels.shape)}; it needs int64 [{len(images)}]")
        if not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
            raise ValueError(
                f"{who}: labels run from {int(labels.min())} to {int(labels.max())}; {len(classes)} classes need 0 to"
                f" {len(classes) - 1}"
            )
        mean, std = mean or (0.5,) * images.shape[1], std or (0.25,) * images.shape[1]
        if not len(mean) == len(std) == images.shape[1] or min(std) <= 0:
            raise ValueError(f"{who}: mean is {mean} and std {std}; images of {images.shape[1]} channels need as many")
        self.images, self.labels = images, labels.to(images.device)
        self.name, self.classes = name, tuple(classes)
        self.shape = (images.shape[1], images.shape[2], images.shape[3])
        self.mean, self.std, self.device = tuple(mean), tuple(std), images.device

    def to(self, device: torch.device | str) -> MemorySet:
        moved = copy.copy(self)
        moved.images, moved.labels = self.images.to(device), self.labels.to(device)
        moved.device = moved.images.device
        return moved

    def read(self, parts: Sequence[Part]) -> Iterator[tuple[Tensor, Tensor]]:
        for numbers, draws in parts:
            chosen = torch.from_numpy(numbers).to(self.device)
            x = self.images[chosen]
            yield (x if draws is None else _shift_and_flip(x, draws)), self.labels[chosen]


def _shift_and_flip(x: Tensor, draws: np.ndarray) -> Tensor:
    """x [n, C, H, W], each moved by up to an eighth of its size and flipped or not, as draws[:, :3] say."""
    n, c, h, w = x.shape
    pad_h, pad_w = h // 8, w // 8
    # On the CPU, in float64: every device then takes the same pixels.
    top = np.floor(draws[:, 0, None].astype(np.float64) * (2 * pad_h + 1)).astype(np.int64)
    left = np.floor(draws[:, 1, None].astype(np.float64) * (2 * pad_w + 1)).astype(np.int64)
    flip = draws[:, 2, None] < 0.5
    rows = torch.from_numpy(top + np.arange(h)).to(x.device)
    cols = torch.from_numpy(left + np.where(flip, np.arange(w)[::-1], np.arange(w))).to(x.device)
    padded = F.pad(x, (pad_w, pad_w, pad_h, pad_h))
    image = torch.arange(n, device=x.device)[:, None, None, None]
    channel = torch.arange(c, device=x.device)[:, None, None]
    return padded[image, channel, rows[:, None, :, None], cols[:, None, None, :]]


class FolderSet(ImageSet):
    """Image files, decoded while they are used.

    Augmented by cropping 8% to 100% of the area at an aspect of 3/4 to 4/3 (cut to the image where it does not fit),
    and by flipping left and right; otherwise the central 7/8 of the shorter side: 224 of 256.

    Args:
        files: one path an image.
        labels: int64 [N], in range(len(classes)).
        classes: their names.
        image_size: height and width to which every image is resized.
        name: of the set, for reports.
        workers: processes that decode.
    """

    def __init__(
        self, files: Sequence[str], labels: Tensor, classes: Sequence[str], image_size: int, *, name: str, workers: int
    ) -> None:
        self.files, self.labels, self.classes, self.name = tuple(files), labels, tuple(classes), name
        self.shape, self.mean, self.std = (3, image_size, image_size), IMAGENET_MEAN, IMAGENET_STD
        self.workers, self.device = workers, torch.device("cpu")

    def to(self, device: torch.device | str) -> FolderSet:
        moved = copy.copy(self)
        moved.device = torch.device(device)
        return moved

    def read(self, parts: Sequence[Part]) -> Iterator[tuple[Tensor, Tensor]]:
        on_gpu = self.device.type == "cuda"
        loader = DataLoader(
            _Decoder(self.files, self.shape[1]), sampler=parts, batch_size=None, num_workers=self.workers,
            pin_memory=on_gpu, generator=torch.Generator(),  # its own: the global one stays as it is
        )  # fmt: skip
        for x, numbers in loader:
            if isinstance(x, str):
                raise ValueError(x)
            yield x.to(self.device, non_blocking=on_gpu), self.labels[numbers].to(self.device)


class _Decoder(Dataset):
    """What a decoding process holds."""

    def __init__(self, files: Sequence[str], size: int) -> None:
        self.files, self.size = files, size

    def __getitem__(self, part: Part) -> tuple[Tensor | str, Tensor]:
        """Images and their numbers; in place of images what is wrong with one: an error would come with a traceback."""
        numbers, draws = part
        every = [None] * len(numbers) if draws is None else draws
        try:
            images = [_decode(self.files[i], self.size, d) for i, d in zip(numbers.tolist(), every, strict=True)]
        except ValueError as error:
            return str(error), torch.from_numpy(numbers)
        return torch.from_numpy(np.stack(images)), torch.from_numpy(numbers)


def _decode(file: str, size: int, draws: np.ndarray | None, central: float = 7 / 8) -> np.ndarray:
    """One image file as uint8 [3, size, size]: a random crop as `draws` say, or the `central` part."""
    from PIL import Image

    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except Exception as error:
        raise ValueError(f"{file} cannot be decoded: {error}; remove or replace it") from error
    width, height = image.size
    if draws is None:
        w = h = central * min(width, height)
        left, top = (width - w) / 2, (height - h) / 2
    else:
        area = width * height * (0.08 + 0.92 * float(draws[0]))
        aspect = math.exp((2 * float(draws[1]) - 1) * math.log(4 / 3))
        w, h = min(width, math.sqrt(area * aspect)), min(height, math.sqrt(area / aspect))
        left, top = float(draws[2]) * (width - w), float(draws[3]) * (height - h)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))
    pixels = np.asarray(image).transpose(2, 0, 1)
    return pixels[:, :, ::-1] if draws is not None and draws[4] < 0.5 else pixels


# ---------------------------------------------------------------- batches


class Batches:
    """The batches of every epoch, as a function of (images, batch_size, seed, epoch) and of nothing else.

    To train: a new order every epoch, augmented, `batch_size` images each; the images that fill no whole batch wait for
    another epoch's order. To test: the set's own order, as it is, every image once. The global batches do not depend on
    how many ranks there are: each rank takes its share of every one, in rank order. Any batch of any epoch can be the
    first, and no global random state is read or written.

    Args:
        images: what to read; kept on `device` where it is held in memory.
        batch_size: of all ranks together.
        train: to train, or to test.
        seed: of order and augmentation.
        rank, world: this process, of how many.
        device: where x and y are wanted.

    Raises:
        ValueError: numbers that give no batch, or a batch that cannot be shared out evenly.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        *,
        train: bool,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        who = "Batches()"
        if not 0 <= rank < world:
            raise ValueError(f"{who}: rank is {rank} of {world}; it needs 0 <= rank < world")
        if batch_size < 1 or batch_size % world:
            raise ValueError(
                f"{who}: batch_size is {batch_size} for {world} ranks together; it needs a positive multiple of {world}"
            )
        if train and batch_size > len(images):
            raise ValueError(
                f"{who}: batch_size is {batch_size} and there are {len(images)} images; it needs to be smaller"
            )
        if seed < 0:
            raise ValueError(f"{who}: seed is {seed}; it needs an int of at least 0")
        self.images = images.to(device)
        self.batch_size, self.train, self.seed, self.rank, self.world = batch_size, train, seed, rank, world
        self.mean, self.std = (
            torch.tensor(t, dtype=torch.float32, device=device)[:, None, None] * 255 for t in (images.mean, images.std)
        )

    def __len__(self) -> int:
        """Batches of an epoch; the last one to test with may leave nothing to some ranks."""
        whole, rest = divmod(len(self.images), self.batch_size)
        return whole + (rest > 0 and not self.train)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """From batch `start` of an epoch on: x float32 [n, C, H, W], normalised, and y int64 [n]; this rank's share."""
        if epoch < 0 or not 0 <= start <= len(self):
            raise ValueError(f"Batches.epoch(): batch {start} of epoch {epoch}; an epoch has {len(self)} batches")
        return self._read(list(self._parts(epoch, start)))

    def _parts(self, epoch: int, start: int) -> Iterable[Part]:
        order, draws = np.arange(len(self.images)), None
        if self.train:
            random = np.random.default_rng([self.seed, epoch])
            order, draws = random.permutation(order), random.random((len(order), 5), dtype=np.float32)
        for batch in range(start, len(self)):
            first = batch * self.batch_size
            size = min(self.batch_size, len(order) - first)
            share = slice(first + size * self.rank // self.world, first + size * (self.rank + 1) // self.world)
            if share.start < share.stop:
                yield order[share], None if draws is None else draws[share]

    def _read(self, parts: list[Part]) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.images.read(parts):
            yield (x.float() - self.mean) / self.std, y


# ---------------------------------------------------------------- CIFAR

MOST_FILE, MOST_ARCHIVE = 1 << 28, 1 << 30  # bytes; the largest file has 155 MB, the archives unpacked 187 MB
# name: folder, archive, files to train, files to test, file of the names, key of the labels, key of the names
_CIFAR = {
    "cifar10": (
        "cifar-10-batches-py", "cifar-10-python.tar.gz", [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"],
        "batches.meta", b"labels", b"label_names",
    ),
    "cifar100": (
        "cifar-100-python", "cifar-100-python.tar.gz", ["train"], ["test"],
        "meta", b"fine_labels", b"fine_label_names",
    ),
}  # fmt: skip
_CIFAR_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def _cifar(name: str, split: str, root: Path) -> MemorySet:
    """A split of the official python version of CIFAR-10 or CIFAR-100."""
    folder, archive, train, test, meta, label_key, names_key = _CIFAR[name]
    files = train if split == "train" else test
    itself = [root] if root.name in (folder, archive) else []
    places = [p for p in (*itself, root / folder, root / archive) if p.exists()]
    if not places:
        raise FileNotFoundError(
            f"load(): {name} is not in {root.resolve()}; put {archive} (the 'python version' of"
            " https://www.cs.toronto.edu/~kriz/cifar.html) or the folder in it there, or pass root"
        )
    place = places[0]
    found = _folder_files(place, [*files, meta]) if place.is_dir() else _archive_files(place, folder, [*files, meta])
    names = _unpickle(found[meta], f"{place}/{meta}").get(names_key)
    if not isinstance(names, list) or not all(isinstance(n, bytes) for n in names):
        raise ValueError(f"{place}/{meta} has no list of names under {names_key!r}; it is not the file of {name}")
    images, labels = [], []
    for file in files:
        where = f"{place}/{file}"
        content = _unpickle(found.pop(file), where)
        pixels, these = _byte_matrix(content.get(b"data"), where), content.get(label_key)
        if pixels.shape[1] != 3072:
            raise ValueError(f"{where} has data of shape {pixels.shape}; {name} needs (images, 3072)")
        if not isinstance(these, list) or len(these) != len(pixels) or any(type(i) is not int for i in these):
            raise ValueError(
                f"{where} has no list of {len(pixels)} ints under {label_key!r}; it is not a file of {name}"
            )
        if min(these) < 0 or max(these) >= len(names):
            raise ValueError(f"{where} has labels {min(these)} to {max(these)}; {name} has {len(names)} classes")
        images.append(pixels.reshape(-1, 3, 32, 32))
        labels += these
    mean, std = _CIFAR_STATISTICS[name]
    return MemorySet(
        torch.from_numpy(np.concatenate(images)), torch.tensor(labels), [n.decode("latin1") for n in names],
        name=name, mean=mean, std=std,
    )  # fmt: skip


def _folder_files(folder: Path, names: list[str]) -> dict[str, bytes]:
    missing = [n for n in names if not (folder / n).is_file()]
    if missing:
        raise FileNotFoundError(f"load(): {folder} has no {', '.join(missing)}; extract the archive again")
    for name in names:
        if (size := (folder / name).stat().st_size) > MOST_FILE:
            raise ValueError(f"load(): {folder / name} has {size} bytes; no file of CIFAR has more than {MOST_FILE}")
    return {name: (folder / name).read_bytes() for name in names}


class _Limited:
    """A stream that ends with an error where it has more bytes than MOST_ARCHIVE."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.left = stream, MOST_ARCHIVE

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise ValueError(f"it unpacks to more than {MOST_ARCHIVE} bytes")
        return data


def _archive_files(archive: Path, folder: str, names: list[str]) -> dict[str, bytes]:
    wanted, found = {f"{folder}/{name}": name for name in names}, {}
    with open(archive, "rb") as file:
        try:
            stream = _Limited(gzip.GzipFile(fileobj=file))  # type: ignore[arg-type]
            with tarfile.open(fileobj=stream, mode="r|") as tar:  # type: ignore[call-overload]
                for member in tar:
                    if not member.isfile() or member.name not in wanted:
                        continue
                    if member.size > MOST_FILE:  # sparse members have zeros that are not in the archive
                        raise ValueError(f"{member.name} claims {member.size} bytes")
                    if content := tar.extractfile(member):
                        found[wanted[member.name]] = content.read()
            while stream.read(1 << 20):  # to the end, where gzip compares its checksum
                pass
        except Exception as error:  # damaged archives raise nearly anything
            raise ValueError(
                f"load(): {archive} is cut short, damaged or no .tar.gz ({error}); download it again"
            ) from error
    missing = [n for n in wanted if wanted[n] not in found]
    if missing:
        raise ValueError(f"load(): {archive} has no {', '.join(missing)}; it is not the archive of that name")
    return found


class _Inert:
    """Stands for whatever numpy object a pickle names: keeps what it is made from, and does nothing."""

    args: tuple = ()
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _DataUnpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """Reads dicts, lists, numbers and bytes. Calls nothing that a file names: numpy arrays come as inert records.

    The unpickler in Python: what its memory may hold is what the file has; that in C makes room for numbers in it.
    """

    ARRAYS = frozenset({("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")})

    def find_class(self, module: str, name: str) -> type:
        if (module, name) in self.ARRAYS:
            return _Inert
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no file of CIFAR does")


def _unpickle(content: bytes, where: str) -> dict:
    try:
        unpickled = _DataUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # damaged pickles raise nearly anything
        raise ValueError(f"{where} is damaged or foreign ({error}); extract or download it again") from error
    if not isinstance(unpickled, dict):
        raise ValueError(f"{where} holds a {type(unpickled).__name__}; files of CIFAR hold a dict")
    return unpickled


def _byte_matrix(record: Any, where: str) -> np.ndarray:
    """The uint8 matrix that an inert record describes: its state is (version, shape, dtype, Fortran order, bytes)."""
    match record:
        case _Inert(state=(_, (int(rows), int(cols)), _Inert(args=(b"u1", *_)), fortran, bytes(data))):
            if rows > 0 and cols > 0 and rows * cols == len(data):
                return np.frombuffer(data, np.uint8).reshape((rows, cols), order="F" if fortran else "C")
    raise ValueError(f"{where} has no matrix of bytes under b'data'; it is not a file of CIFAR's python version")


# ---------------------------------------------------------------- folders


def _folder(root: Path, split: str, image_size: int, workers: int) -> ImageSet:
    """A split of a folder of images: root/train/CLASS/*, and root/val/CLASS/* or root/test/CLASS/*."""
    who = "load()"
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise ImportError(f"{who}: {root} is a folder of images, which Pillow decodes; pip install pillow") from None
    if image_size < 1 or workers < 0:
        raise ValueError(f"{who}: image_size is {image_size} and workers {workers}; they need at least 1 and 0")
    place = root / "train"
    classes = _folders(root, place, "train")
    if split == "test":
        place = root / "val" if (root / "val").is_dir() else root / "test"
        tested = set(_folders(root, place, "val or test"))
        if tested != set(classes):
            differ = sorted(tested ^ set(classes))
            raise ValueError(f"{who}: {place} and {root / 'train'} need the same folders; {differ[:5]} are in one only")
    files, labels = [], []
    for label, name in enumerate(classes):
        images = sorted(_images(place / name))
        if not images:
            kinds = ", ".join(sorted(EXTENSIONS))
            raise ValueError(f"{who}: {place / name} has no images ({kinds}); it has {_contents(place / name)}")
        files += images
        labels += [label] * len(images)
    if image_size > SMALL_IMAGE:
        return FolderSet(files, torch.tensor(labels), classes, image_size, name=root.name, workers=workers)
    _check_room(3 * image_size**2 * len(files), f"{who}: {len(files)} images of {image_size}x{image_size}")
    decoded = torch.from_numpy(np.stack([_decode(file, image_size, None, central=1) for file in files]))
    return MemorySet(decoded, torch.tensor(labels), classes, name=root.name, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def _folders(root: Path, place: Path, name: str) -> list[str]:
    """The names of the folders in a place, one a class; refused where there are none, with what there is instead."""
    found = sorted(p.name for p in place.iterdir() if p.is_dir()) if place.is_dir() else []
    if not found:
        at, lacks = (place, "folder for each class") if place.is_dir() else (root, f"folder {name}")
        raise ValueError(f"load(): {at} has no {lacks}; it has {_contents(at)}; {root} needs {LAYOUT}")
    return found


def _images(folder: Path) -> list[str]:
    """The images in a folder; what has their names and is no file is refused: a pipe would be waited for."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if Path(entry.name).suffix.lower() in EXTENSIONS:
                if not entry.is_file():
                    raise ValueError(
                        f"load(): {entry.path} has the name of an image and is no file; remove or replace it"
                    )
                found.append(entry.path)
    return found


def _contents(folder: Path) -> str:
    """What lies in a folder, in a few words."""
    kinds: dict[str, list[str]] = {"folder": [], "image": [], "other file": []}
    for path in folder.iterdir():
        kind = "folder" if path.is_dir() else "image" if path.suffix.lower() in EXTENSIONS else "other file"
        kinds[kind].append(path.name)
    said = []
    for kind, names in kinds.items():
        few = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
        if names:
            said.append(f"{len(names)} {kind}{'s' if len(names) > 1 else ''} ({few})")
    return ", ".join(said) or "nothing"


def _check_room(size: int, what: str) -> None:
    """Refuse what this machine cannot hold before it tries to."""
    if size > memory_bytes():
        raise ValueError(f"{what} need {size / 1e9:.0f} GB; this machine has {memory_bytes() / 1e9:.0f} GB")


# ---------------------------------------------------------------- the generated set

_DRAWING = 100  # bytes a pixel while images are drawn
_CHUNK = 500  # images drawn from one random generator: `count` cuts the sequence of images, and changes none
_TEXTURES = ("striped", "checked")


def shapes(split: str, *, count: int | None = None, image_size: int = 16, seed: int = 0) -> MemorySet:
    """Generated images of ten classes: a triangle, square, disc, cross or ring, each striped or checked.

    A class is a shape and a texture, so a network needs both the outline and what fills it. What does not matter is
    drawn anew for every image: place, size, rotation and stretch of the shape; width, angle and phase of its texture;
    all colours; a background of stripes or checks and a gradient; a small second shape without texture behind the first
    one, a bar across both, and noise. A linear classifier gets under a third right. Classes survive a flip.

    Image i of a split is the same for every `count`, and on any number of threads.

    Args:
        split: "train" or "test".
        count: how many images; default: 5000 to train, 2000 to test.
        image_size: height and width; 16 is about the least that shows the textures.
        seed: the images of two splits or seeds have nothing to do with each other.

    Raises:
        ValueError: another split, or a number that is no such number.
    """
    counts = {"train": 5000, "test": 2000}
    if split not in counts:
        raise ValueError(f"shapes(): split is {split!r}; it needs 'train' or 'test'")
    count = counts[split] if count is None else count
    if count < 1 or image_size < 8 or seed < 0:
        raise ValueError(
            f"shapes(): count is {count}, image_size {image_size} and seed {seed}; they need at least 1, 8 and 0"
        )
    room = image_size**2 * (3 * count + _DRAWING * _CHUNK)
    _check_room(room, f"shapes(): {count} images of {image_size}x{image_size}")
    drawn = [
        _draw_shapes(np.random.default_rng([seed, list(counts).index(split), chunk]), _CHUNK, image_size)
        for chunk in range(math.ceil(count / _CHUNK))
    ]
    images, labels = (torch.from_numpy(np.concatenate(arrays)[:count]) for arrays in zip(*drawn, strict=True))
    classes = [f"{texture} {shape}" for shape in _OUTLINES for texture in _TEXTURES]
    return MemorySet(images, labels, classes, name="shapes")


def _triangle(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.maximum(q, np.abs(p) * np.float32(0.75**0.5) - q / 2) - np.float32(0.5)


def _square(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(p), np.abs(q)) - np.float32(0.75)


def _disc(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.sqrt(p * p + q * q) - np.float32(0.85)


def _cross(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    p, q = np.abs(p), np.abs(q)
    return np.maximum(np.maximum(p, q) - np.float32(0.95), np.minimum(p, q) - np.float32(0.32))


def _ring(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.abs(np.sqrt(p * p + q * q) - np.float32(0.68)) - np.float32(0.24)


# How far outside a shape of about unit radius the point (p, q) lies; negative inside.
_OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "triangle": _triangle, "square": _square, "disc": _disc, "cross": _cross, "ring": _ring,
}  # fmt: skip


def _draw_shapes(random: np.random.Generator, n: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """n images uint8 [n, 3, size, size] and their labels. numpy's arithmetic: one thread, so that bits never differ."""
    axis = (np.arange(size, dtype=np.float32) * 2 + 1 - size) / size
    x, y = axis[None, None, :], axis[None, :, None]  # the image is [-1, 1] x [-1, 1]

    def uniform(low: float, high: float, *channels: int) -> np.ndarray:
        return np.float32(low) + np.float32(high - low) * random.random((n, *channels, 1, 1), dtype=np.float32)

    def turned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        angle = uniform(0, 2 * math.pi)
        c, s = np.cos(angle), np.sin(angle)
        return c * x + s * y, c * y - s * x

    def tint() -> np.ndarray:
        """A direction in RGB that brightens, mostly."""
        v = random.standard_normal((n, 3, 1, 1), dtype=np.float32) + np.float32(3)
        return v / np.sqrt((v * v).sum(1, keepdims=True))

    def texture(kind: np.ndarray) -> np.ndarray:
        (p, q), frequency = turned(x, y), 2 * math.pi / uniform(0.5, 0.8)
        p, q = (np.sin(t * frequency + uniform(0, 2 * math.pi)) for t in (p, q))
        return np.where(kind[:, None, None] == 0, p, np.clip(2 * p * q, -1, 1))[:, None]

    def cover(outside: np.ndarray) -> np.ndarray:
        """How much of each pixel lies inside, given how far outside its middle lies."""
        return np.clip(np.float32(0.5) - outside * np.float32(size / 2), 0, 1)[:, None]

    def outline(kind: np.ndarray, smallest: float, largest: float, shift: float) -> np.ndarray:
        p, q = turned(x - uniform(-shift, shift), y - uniform(-shift, shift))
        radius, stretch = uniform(smallest, largest), uniform(0.85, 1.15)
        p, q, outside = p / (radius * stretch), q / radius * stretch, np.empty((n, size, size), np.float32)
        for k, of_kind in enumerate(_OUTLINES.values()):
            outside[kind == k] = of_kind(p[kind == k], q[kind == k])
        return cover(outside * radius)

    def sometimes(probability: float) -> np.ndarray:
        return uniform(0, 1, 1) < probability

    def painted(image: np.ndarray, where: np.ndarray, colour: np.ndarray) -> np.ndarray:
        return image + where * (colour - image)

    shape, kind = random.integers(0, len(_OUTLINES), n), random.integers(0, len(_TEXTURES), n)
    ground = uniform(0.25, 0.75, 3)
    image = ground + uniform(0, 0.1, 1) * tint() * texture(random.integers(0, len(_TEXTURES), n))
    image = image + uniform(0, 0.25, 1) * tint() * turned(x, y)[0][:, None]
    second = outline(random.integers(0, len(_OUTLINES), n), 0.2, 0.35, 0.9) * sometimes(0.5)
    image = painted(image, second, uniform(0, 1, 3))
    body = ground + uniform(0.25, 0.5, 1) * tint() + uniform(0.2, 0.4, 1) * tint() * texture(kind)
    image = painted(image, outline(shape, 0.65, 0.95, 0.15), body)
    bar = np.abs(turned(x, y)[0] - uniform(-0.8, 0.8)) - uniform(0.04, 0.12)
    image = painted(image, cover(bar) * sometimes(0.5), uniform(0, 1, 3))
    image = image + uniform(0.02, 0.06, 1) * random.standard_normal(image.shape, dtype=np.float32)
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8), shape * len(_TEXTURES) + kind
