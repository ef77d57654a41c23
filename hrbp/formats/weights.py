"""Files of weights: read without executing anything in them, and refused where a checksum says that one is damaged."""

from __future__ import annotations

import json
import lzma
import math
import os
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from blocksparse import BSRPattern, bank_shape

from ..files import memory_bytes, whole_file
from ..structures.grouping import Grouping
from .packed import PACKED, unpack_masked
from .sealed import CHUNK, is_whole, seal_of

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")
WRAPPERS = ("state_dict", "model_state_dict", "model")  # what training programs call the state_dict in a checkpoint
PREFIXES = ("module.", "_orig_mod.")  # put before every name by DataParallel and by torch.compile
DEPTH = 4  # of such wrappings
ZIP_START = b"PK\x03\x04"  # by which torch.load knows a zip
ZIP_END, ZIP_END_BYTES = b"PK\x05\x06", 22 + 0xFFFF  # what ends one, before a comment; bytes in which to find it
ZIP_FOLDER = 0x10  # among the attributes of a member
DAMAGED_ZIP = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, UnicodeDecodeError, OverflowError,
    RuntimeError, TypeError, OSError,
)  # fmt: skip
MAX_HEADER = 100_000_000  # bytes of a .safetensors header, the limit of the format's own reader
SAFETENSORS_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a file, by name, on the CPU. Nothing in the file is executed.

    A checkpoint that holds the state_dict under 'state_dict', 'model_state_dict' or 'model' is unwrapped; 'module.' or
    '_orig_mod.' before every name is removed; entries that are no tensors (epochs, text) are left out.

    What a file has of checksums is compared: the SHA-256 of `hrbp.save`, the CRC-32 of each member of a zip (.npz, and
    what torch.save writes unless it is told to write none). .safetensors and torch.save's format before version 1.6
    have none: a flipped bit of a weight is another weight there.

    Args:
        path: a file that torch.save wrote from tensors alone (.pt, .pth, .bin, .ckpt, .pth.tar), a .npz or a
            .safetensors file.

    Raises:
        ValueError: another kind of file, a damaged one, or one that asks for code to be run or for more memory than it
            fills; the message says which.
        OSError: the file cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        _refuse(path, "is a folder", "a file")
    with open(path, "rb") as file:  # a missing file is an OSError, whatever its name
        if path.suffix in TORCH_SUFFIXES:
            tensors = _read_torch(path, file)
        elif path.suffix == ".npz":
            tensors = _read_npz(path, file)
        elif path.suffix == ".safetensors":
            tensors = _read_safetensors(path, file)
        else:
            _refuse(path, f"ends in {path.suffix!r}", f"{', '.join(TORCH_SUFFIXES)}, .npz or .safetensors")
    for prefix in PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): t for name, t in tensors.items()}
    if not tensors:
        _refuse(path, "holds no tensors", "names and tensors, as in torch.save(model.state_dict(), path)")
    return tensors


def _refuse(path: Path, has: str, needs: str) -> NoReturn:
    raise ValueError(f"read_weights(): {path} {has}; it needs {needs}")


# ---------------------------------------------------------------------- torch.save


def _read_torch(path: Path, file: IO[bytes]) -> dict[str, Tensor]:
    if (seal := seal_of(file)) and not is_whole(file, seal):
        _refuse(path, "is damaged: its checksum does not fit its content", "a whole file")
    file.seek(0)
    if file.read(len(ZIP_START)) == ZIP_START:
        _check_zip(path, file)
    file.seek(0)
    try:
        with warnings.catch_warnings():  # of formats that are refused below
            warnings.simplefilter("ignore")
            found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())
        if "Unsupported global" in reason or "Unsupported class" in reason or "GLOBAL" in reason:
            what = "holds objects that only running code of the file could restore"
            _refuse(path, what, "tensors alone: torch.save(model.state_dict(), path)")
        _refuse(path, "is damaged or no torch.save file", "a whole file")
    except Exception as error:  # what torch raises for a truncated or foreign file depends on where that breaks it
        reason = " ".join(str(error).split())[:100]
        _refuse(path, f"is damaged or no torch.save file ({type(error).__name__}: {reason})", "a whole file")
    for _ in range(DEPTH):
        inner = next((w for w in WRAPPERS if isinstance(found, Mapping) and isinstance(found.get(w), Mapping)), "")
        if not inner:
            break
        shapes, found = found.get(PACKED), found[inner]
        if isinstance(shapes, Tensor) or shapes:
            try:
                found = unpack_masked(found, shapes)
            except ValueError as error:
                _refuse(path, f"is damaged: {error}", "a whole file")
    if not isinstance(found, Mapping):
        _refuse(path, f"holds a {type(found).__name__}", "names and tensors: torch.save(model.state_dict(), path)")
    tensors = {str(name): t.detach() for name, t in found.items() if isinstance(t, Tensor)}
    for name, t in tensors.items():
        if t.layout != torch.strided or t.is_quantized or t.device.type != "cpu":
            _refuse(path, f"has {name!r} as {t.layout} on {t.device}", "plain dense tensors")
        if t.numel() * t.itemsize > t.untyped_storage().nbytes():
            _refuse(
                path, f"has {name!r} of shape {tuple(t.shape)} in {t.untyped_storage().nbytes()} bytes", "all bytes"
            )
    return tensors


def _members(path: Path, archive: zipfile.ZipFile, file: IO[bytes]) -> list[zipfile.ZipInfo]:
    """The members of a zip, as many as its end says: a damaged entry may hide those behind it."""
    members = archive.infolist()
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - ZIP_END_BYTES))
    end = file.read()
    at = end.rfind(ZIP_END)
    count = int.from_bytes(end[at + 10 : at + 12], "little") if at >= 0 else len(members)
    if count not in (len(members), 0xFFFF):  # the latter: too many for this field
        _refuse(path, f"is damaged: its end tells of {count} members and there are {len(members)}", "a whole file")
    for member in members:  # of a folder by its attributes some readers take no bytes, of one by its name others
        if member.external_attr & ZIP_FOLDER and not member.is_dir():
            _refuse(path, f"is damaged: {member.filename!r} has the attributes of a folder", "a whole file")
    return members


def _check_zip(path: Path, file: IO[bytes]) -> None:
    """Compare each member with its CRC-32, which torch.load does not."""
    size, claimed = os.fstat(file.fileno()).st_size, 0
    try:
        with zipfile.ZipFile(file) as archive:
            members = _members(path, archive, file)
            claimed = max((member.compress_size for member in members), default=0)
            unpacked = sum(member.file_size for member in members)
            if claimed <= size and any(member.CRC for member in members):  # else written without checksums
                for member in members:
                    with archive.open(member) as stream:
                        while stream.read(CHUNK):
                            pass
    except DAMAGED_ZIP as error:
        _refuse(path, f"is damaged ({' '.join(str(error).split())[:100]})", "a whole file")
    if claimed > size:
        _refuse(path, f"is damaged: a member of {claimed} bytes in a file of {size}", "a whole file")
    _check_memory(path, unpacked)


# ---------------------------------------------------------------------- numpy


def _read_npz(path: Path, file: IO[bytes]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    seen: set[str] = set()
    try:
        with zipfile.ZipFile(file) as archive:
            members = _members(path, archive, file)
            _check_memory(path, sum(m.file_size for m in members))
            for member in members:
                name = member.filename.removesuffix(".npy")
                if name in seen:
                    _refuse(path, f"has two arrays {name!r}", "names that occur once")
                seen.add(name)
                with archive.open(member) as stream:
                    _check_array(path, name, stream, member.file_size)
                with archive.open(member) as stream:
                    array = np.lib.format.read_array(stream, allow_pickle=False)
                    if stream.read(1):  # at the end the CRC-32 is compared
                        _refuse(path, f"has bytes behind array {name!r}", "arrays as np.savez writes them")
                if array.dtype.kind in "biufc":
                    tensors[name] = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
    except DAMAGED_ZIP as error:
        _refuse(path, f"is damaged or no .npz file ({' '.join(str(error).split())[:100]})", "what np.savez writes")
    return tensors


def _check_memory(path: Path, size: int) -> None:
    """A small file may unpack to anything: not beyond the memory of this machine."""
    if size > (memory := memory_bytes()):
        _refuse(path, f"unpacks to {size / 1e9:.1f} GB", f"at most the {memory / 1e9:.1f} GB of this machine")


def _check_array(path: Path, name: str, stream: IO[bytes], size: int) -> None:
    """Whether an array's header is one, and its shape has the bytes that follow, before numpy makes room for it."""
    try:
        version = np.lib.format.read_magic(stream)  # type: ignore[arg-type]
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, _, dtype = read(stream)  # type: ignore[arg-type]
    except (ValueError, KeyError) as error:
        _refuse(path, f"has {name!r}, which is no array ({' '.join(str(error).split())[:100]})", "arrays alone")
    if dtype.hasobject:
        _refuse(path, f"has {name!r} as Python objects, which only running code of the file restores", "numbers")
    if math.prod(shape) * dtype.itemsize != size - stream.tell():
        _refuse(path, f"has {name!r} of shape {shape}, {dtype}, in {size - stream.tell()} bytes", "all bytes")


# ---------------------------------------------------------------------- safetensors


def _read_safetensors(path: Path, file: IO[bytes]) -> dict[str, Tensor]:
    # 8 bytes: length of the header, little-endian; the header, JSON; the data, which the tensors cover without gaps.
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER):
        _refuse(path, f"has {size} bytes and announces a header of {length}", "a whole .safetensors file")
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"has a header that is no JSON ({str(error)[:100]})", "a .safetensors file")
    if not isinstance(header, dict):
        _refuse(path, f"has a header that is a {type(header).__name__}", "a JSON object")
    header.pop("__metadata__", None)
    entries = sorted(((name, *_entry(path, name, entry)) for name, entry in header.items()), key=lambda e: e[3:])
    end = 0
    for name, _, _, begin, stop in entries:
        if begin != end:
            what = "overlaps the tensor before it" if begin < end else f"leaves a gap of {begin - end} bytes before it"
            _refuse(path, f"has {name!r} at bytes {begin} .. {stop}, which {what}", "data without gaps or overlaps")
        end = stop
    if end != size - 8 - length:
        _refuse(path, f"has {size - 8 - length} bytes of data where its header needs {end}", "a whole file")
    tensors = {}
    for name, dtype, shape, begin, stop in entries:
        data = bytearray(stop - begin)
        if file.readinto(data) != len(data):  # type: ignore[attr-defined]
            _refuse(path, f"ends within {name!r}", "a whole file")
        t = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        tensors[name] = (t != 0 if dtype == torch.bool else t.view(dtype)).view(shape)
    return {name: tensors[name] for name in header}


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _entry(path: Path, name: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """dtype, shape, begin, end of a tensor in the data."""

    def counts(value: Any) -> bool:
        return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"describes {name!r} as {str(entry)[:60]}", "dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in SAFETENSORS_DTYPES:
        _refuse(path, f"has {name!r} in {entry['dtype']!r}", f"one of {', '.join(SAFETENSORS_DTYPES)}")
    dtype, shape, offsets = SAFETENSORS_DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if not counts(shape) or not counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(path, f"has {name!r} with shape {shape}, data_offsets {offsets}", "counts, and [begin, end]")
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        _refuse(path, f"has {name!r} of shape {tuple(shape)}, {dtype}, in {offsets[1] - offsets[0]} bytes", "all bytes")
    return dtype, tuple(shape), *offsets


def weights_for(path: str | os.PathLike[str], model: nn.Module, who: str) -> dict[str, Tensor]:
    """The state_dict of a file, which fits the network."""
    found = read_weights(path)
    try:
        model.load_state_dict(found)
    except RuntimeError as error:
        what = " ".join(str(error).split())
        what = what if len(what) <= 300 else f"{what[:297]}..."
        raise ValueError(f"{who}: weights are those of another network: {what}") from error
    return found


# ---------------------------------------------------------------------- the layers in a file


def layers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The filter banks among a file's tensors: floating point or bool, [K, C, R, S] or [K, C], by layer name.

    [K, C, S], too, where the name ends in weight or mask: other tensors of three axes may be anything. A weight that is
    stored beside its mask (NAME.weight and NAME.mask, or torch.nn.utils.prune's weight_orig and weight_mask) is left to
    its mask.
    """
    found = {}
    for name, t in tensors.items():
        if t.dim() not in (2, 3, 4) or not t.numel() or not (t.is_floating_point() or t.dtype == torch.bool):
            continue
        if t.dim() == 3 and not name.endswith(("weight", "mask")):
            continue
        masks = name.removesuffix("weight") + "mask", name.removesuffix("_orig") + "_mask"
        if any(mask in tensors for mask in masks):
            continue
        found[name.removesuffix(".weight").removesuffix(".weight_mask").removesuffix(".mask")] = t
    return found


def sparse_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Layers that a BSRModule saved."""
    ends = [name.removesuffix("indptr") for name in tensors if name == "indptr" or name.endswith(".indptr")]
    return [prefix.removesuffix(".") for prefix in ends if {prefix + "values", prefix + "indices"} <= tensors.keys()]


def saved_shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    """The shape (K, C, R, S) of a BSR layer's weight as a filter bank; None in files of older versions."""
    shape = tensors.get(f"{name}.weight_shape" if name else "weight_shape")
    if shape is None:
        return None
    if shape.dtype != torch.int32 or shape.dim() != 1 or shape.numel() != 4 or int(shape.min()) < 1:
        raise ValueError(f"{name}: weight_shape is {shape.dtype} {shape.tolist()}; it needs int32 [K, C, R, S]")
    return tuple(shape.tolist())


def sparse_layer(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...] | None = None) -> BSRPattern:
    """The pattern that a BSRModule of this name saved.

    Args:
        shape: of its weight, [K, C, R, S], [K, C, S] or [K, C]; None: that in the file, which older files do not have.

    Raises:
        ValueError, TypeError: the file has another shape, or none and none is given; the saved index is none of such a
            filter bank.
    """
    prefix, saved = f"{name}." if name else "", saved_shape(tensors, name)
    if saved is not None and shape is not None and saved != bank_shape(shape):
        raise ValueError(f"{name}: the saved layer has a weight of shape {saved}; {tuple(shape)} was asked for")
    shape = saved or shape
    if shape is None:
        raise ValueError(f"{name}: the file has no weight_shape, as those of older versions; give the layer's shape")
    values = tensors[prefix + "values"]
    if values.dim() != 3:
        raise ValueError(f"{prefix}values has shape {tuple(values.shape)}; it needs (nnzb, bk, bc)")
    order = tensors.get(prefix + "row_order")
    shape = bank_shape(shape)
    try:
        pattern = BSRPattern(shape, values.shape[1:], tensors[prefix + "indptr"], tensors[prefix + "indices"], order)
        if (groups := tensors.get(prefix + "groups")) is not None:
            pattern = pattern.grouped(sum(groups.tolist()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: the saved index does not fit a layer {tuple(shape)}: {error}") from None
    pattern.check_values(values, name)
    return pattern


# ---------------------------------------------------------------------- writing


def write_groupings(path: str | os.PathLike[str], groupings: Mapping[str, Grouping]) -> None:
    """Write NAME.mask, NAME.row_order, NAME.channels, NAME.taps of every layer to a .npz file, whole or not at all.

    With g = np.load(path), Grouping(mask.shape, row_order, channels, taps, granule) is the grouping again.
    """
    arrays = {}
    for name, g in groupings.items():
        parts = {"mask": g.mask(), "row_order": g.row_order, "channels": g.channels, "taps": g.taps}
        arrays.update({f"{name}.{part}": t.cpu().numpy() for part, t in parts.items()})
    with whole_file(path) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
