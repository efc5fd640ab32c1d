"""Read the arrays of PyTorch files (`.pth`, `.pt`, `.pth.tar`, `.bin`) and of `.safetensors`, without PyTorch.

A PyTorch file is a pickle. Its unpickler here imports nothing: it knows the few names that describe tensors, keeps some
harmless names of training scripts as empty objects, and refuses every other name. So no code of a file can run.

Both of PyTorch's formats are read: the zip archive (since 1.6), and the older sequence of pickles followed by the raw
numbers of each storage (torch/serialization.py).
"""

from __future__ import annotations

import io
import json
import math
import mmap
import pickle  # noqa: TID251 (restricted below, so that it imports nothing)
import pickletools
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from ray_cxr.errors import ConfigError, first_line

SUFFIXES = (".pth", ".pt", ".tar", ".bin", ".ckpt", ".safetensors")
#: Keys under which checkpoints keep the weights, the most specific first.
_STATE_KEYS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network")
_MAGIC = 0x1950A86A20F9469CFC6C
#: A checkpoint can hold its state dict this many dicts deep.
_MAX_DEPTH = 4
_MAX_BYTES = 2 << 30
#: Of one pickle, without the numbers of its tensors.
_MAX_PICKLE_BYTES = 256 << 20
#: Each opcode can make an object, so that a pickle is more in memory than in the file.
_MAX_OPCODES = 4 << 20
#: Tuples inside tuples, without end, would overflow the stack of the process. A tensor has four.
_MAX_TUPLES = 60_000
_BFLOAT16 = np.dtype("<u2")
#: NumPy's type by the name of a storage class; bfloat16 has none and is widened.
_TYPES: dict[str, np.dtype[Any]] = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": _BFLOAT16,
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("<i1"),
    "ByteStorage": np.dtype("<u1"),
    "BoolStorage": np.dtype("?"),
}
#: Names of objects that training scripts save beside the weights. They become empty objects; nothing is imported.
_IGNORED = {
    ("argparse", "Namespace"),
    ("collections", "defaultdict"),
    ("collections", "Counter"),
    ("collections", "deque"),
    ("datetime", "datetime"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("torch", "Size"),
    ("torch", "device"),
    ("typing", "Any"),
    ("_codecs", "encode"),
    *(("torch", f"{kind}{bits}") for kind, bits in (("float", 16), ("float", 32), ("float", 64), ("bfloat", 16))),
    *(("torch", name) for name in ("uint8", "int8", "int16", "int32", "int64", "bool")),
    *(("numpy", f"{kind}{bits}") for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
    *(("numpy", name) for name in ("float16", "float32", "float64", "bool_", "bool", "str_")),
    *(
        (module, name)
        for module in ("builtins", "__builtin__")
        for name in ("set", "dict", "list", "tuple", "int", "long", "float", "bool", "str", "unicode")
    ),
}
#: Packages and modules of such objects.
_IGNORED_MODULES = (
    "torch.optim.",
    "omegaconf.",
    "numpy.dtypes.",
    "pytorch_lightning.callbacks.",
    "pytorch_lightning.utilities.",
    "lightning.pytorch.callbacks.",
    "lightning.pytorch.utilities.",
)
_MODEL_PACKAGES = (
    "torch.nn.",
    "torchvision.",
    "torchxrayvision.",
    "timm.",
    "monai.",
    "models.",
    "lightning.",
    "pytorch_lightning.",
    "__main__.",
)


class WholeModelError(ConfigError):
    """The file is a pickled model with its classes, not arrays; `module` is of its first class, if it names one."""

    def __init__(self, message: str, module: str = "") -> None:
        super().__init__(message)
        self.module = module


@dataclass(frozen=True)
class TorchFile:
    """Arrays of a file by name, and the text metadata that a `.safetensors` file has."""

    arrays: dict[str, np.ndarray]
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_torch_file(path: Path) -> TorchFile:
    """Read the weights of a file: a state dict, or a checkpoint that contains one. bfloat16 becomes float32.

    Raises:
        WholeModelError: the file is a pickled model.
        ConfigError: it is damaged, too large, holds other objects, or has no state dict.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path}: has more than {_MAX_BYTES >> 30} GiB, more than any model here")
        if path.suffix.lower() == ".safetensors":
            return _read_safetensors(path)
        with path.open("rb") as file:
            loaded = _read_zip(file, path) if zipfile.is_zipfile(file) else _read_legacy(file, path)
        return TorchFile(_find_state(loaded, path))
    except ConfigError:
        raise
    except Exception as error:
        # A damaged pickle can raise nearly any exception.
        reason = first_line(error) or type(error).__name__
        raise ConfigError(f"{path}: not a readable PyTorch file ({reason}); is it complete?") from None


def _read_safetensors(path: Path) -> TorchFile:
    from safetensors import safe_open

    with path.open("rb") as file:
        # NumPy has no bfloat16, which the library would reject: widen it here.
        (length,) = struct.unpack("<Q", file.read(8))
        if length > 100 << 20:
            raise ConfigError(f"{path}: not a safetensors file")
        header = json.loads(file.read(length))
        arrays = {}
        with safe_open(path, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                if header[name]["dtype"] == "BF16":
                    begin, end = header[name]["data_offsets"]
                    file.seek(8 + length + begin)
                    raw = np.frombuffer(file.read(end - begin), _BFLOAT16)
                    arrays[name] = _widen(raw).reshape(header[name]["shape"])
                else:
                    arrays[name] = opened.get_tensor(name)
    return TorchFile(arrays, metadata)


@dataclass(eq=False)
class _Storage:
    """Numbers that several tensors may share."""

    kind: str
    key: str
    numel: int
    numbers: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class _Tensor:
    """A view of a storage, in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its array; those of bfloat16 double."""
        kind = self.storage.kind
        return math.prod(self.shape) * (4 if kind == "BFloat16Storage" else _TYPES[kind].itemsize)

    def to_array(self) -> np.ndarray:
        numbers, size = self.storage.numbers, math.prod(self.shape)
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        if numbers is None or min((self.offset, *self.shape, *self.strides), default=0) < 0:
            raise ValueError("a tensor without numbers")
        if size and (last >= len(numbers) or size > len(numbers)):
            raise ValueError("a tensor is larger than its storage")
        if not size:
            return np.zeros(self.shape, numbers.dtype)
        strides = [step * numbers.itemsize for step in self.strides]
        array = np.lib.stride_tricks.as_strided(numbers[self.offset :], self.shape, strides).copy()
        return _widen(array) if self.storage.kind == "BFloat16Storage" else array


class _Ignored:
    """Stands for an object that is not needed; accepts whatever a pickle does to it."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, *_: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    extend = append


class _RebuildTensor:
    """Instead of a function, whose attributes the opcode BUILD could change; this has none."""

    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
        if not isinstance(storage, _Storage):
            raise TypeError("a tensor without storage")
        return _Tensor(storage, int(offset), tuple(int(n) for n in shape), tuple(int(n) for n in strides))


class _RebuildParameter:
    """Returns the tensor of a parameter."""

    __slots__ = ()

    def __call__(self, data: Any, *_: Any) -> Any:
        return data


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    **{("torch._utils", name): _RebuildTensor() for name in ("_rebuild_tensor", "_rebuild_tensor_v2")},
    **{("torch._utils", f"_rebuild_parameter{end}"): _RebuildParameter() for end in ("", "_with_state")},
    **{("torch", name): name for name in _TYPES},
    **dict.fromkeys(_IGNORED, _Ignored),
}


class _Unpickler(pickle.Unpickler):
    """Builds tensors, containers, numbers and texts, and nothing else."""

    def __init__(self, file: BinaryIO, path: Path, storages: dict[str, _Storage]) -> None:
        super().__init__(file, encoding="latin1")
        self._path, self._storages = path, storages

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.".startswith(_IGNORED_MODULES):
            return _Ignored
        known = _KNOWN.get((module, name))
        return self._refuse(module, name) if known is None else known

    def _refuse(self, module: str, name: str) -> NoReturn:
        shown = _show(f"{module}.{name}")
        if f"{module}.".startswith(_MODEL_PACKAGES):
            raise WholeModelError(
                f"{self._path}: is a pickled model ({shown}), which runs code when it is opened; save its "
                "weights alone, as docs/models.md describes",
                module,
            )
        raise ConfigError(
            f"{self._path}: refers to {shown}; opening it could run code. Save the state dict alone: "
            "torch.save(model.state_dict(), FILE)"
        )

    def persistent_load(self, reference: Any) -> _Storage:
        kind, storage_type, key, _, numel, *view = reference
        if kind != "storage" or storage_type not in _TYPES or any(part is not None for part in view):
            raise ValueError(f"unknown storage {str(storage_type)[:40]}")
        return self._storages.setdefault(str(key), _Storage(storage_type, str(key), int(numel)))


def _unpickle(file: Any, path: Path, storages: dict[str, _Storage]) -> Any:
    """Read the pickle at the position of a file in memory, after a check that it needs no more memory than it shows."""
    start = file.tell()
    # An index of the memo makes the unpickler allocate as many entries, whatever the pickle's length.
    number = highest = -1
    tuples = 0
    for number, (opcode, argument, position) in enumerate(pickletools.genops(file)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            highest = max(highest, int(argument or 0))
        tuples += opcode.name.startswith("TUPLE")
        if number > _MAX_OPCODES or tuples > _MAX_TUPLES or (position or 0) - start > _MAX_PICKLE_BYTES:
            raise ConfigError(f"{path}: has more objects beside its tensors than any model here")
    end = file.tell()
    if end - start > _MAX_PICKLE_BYTES or highest > number:
        raise ValueError("impossible sizes in its pickle")
    file.seek(start)
    return _Unpickler(io.BytesIO(file.read(end - start)), path, storages).load()


def _read_zip(file: BinaryIO, path: Path) -> Any:
    with zipfile.ZipFile(file) as archive:
        if sum(item.file_size for item in archive.infolist()) > _MAX_BYTES:
            raise ConfigError(f"{path}: unpacks to more than {_MAX_BYTES >> 30} GiB, more than any model here")
        names = set(archive.namelist())
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ConfigError(f"{path}: is a zip file, but not of torch.save")
        if any("/code/" in name for name in names):
            raise WholeModelError(
                f"{path}: is a TorchScript program, which runs code when it is opened; save its weights alone, as "
                "docs/models.md describes"
            )
        # torch.save stores; compressed numbers can be a thousand times the file.
        if any(item.compress_type != zipfile.ZIP_STORED for item in archive.infolist()):
            raise ConfigError(f"{path}: is a compressed zip file, which torch.save does not write; save it again")
        if archive.getinfo(pickles[0]).file_size > _MAX_PICKLE_BYTES:
            raise ConfigError(f"{path}: has more objects beside its tensors than any model here")
        folder = pickles[0].removesuffix("data.pkl")
        big = archive.read(f"{folder}byteorder") == b"big" if f"{folder}byteorder" in names else False
        storages: dict[str, _Storage] = {}
        loaded = _unpickle(io.BytesIO(archive.read(pickles[0])), path, storages)
        for key, storage in storages.items():
            dtype = _TYPES[storage.kind]
            numbers = np.frombuffer(archive.read(f"{folder}data/{key}"), dtype.newbyteorder(">") if big else dtype)
            storage.numbers = numbers.astype(dtype, copy=False)[: storage.numel]
    return loaded


def _read_legacy(file: BinaryIO, path: Path) -> Any:
    file.seek(0)
    if tarfile.is_tarfile(file):
        raise ConfigError(f"{path}: is a tar archive; unpack it, or save the state dict again with torch.save")
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _read_pickles(data, path)


def _read_pickles(file: mmap.mmap, path: Path) -> Any:
    storages: dict[str, _Storage] = {}
    load = lambda: _unpickle(file, path, storages)  # noqa: E731
    magic = load()
    if magic != _MAGIC:
        raise ConfigError(f"{path}: is a pickle, but not of torch.save")
    load()  # version of the format
    system = load()
    if not system.get("little_endian", True):
        raise ConfigError(f"{path}: was written on a big-endian machine")
    loaded, keys = load(), load()
    for key in keys:
        storage = storages[str(key)]
        (numel,) = struct.unpack("<q", file.read(8))
        dtype = _TYPES[storage.kind]
        if numel < 0 or numel * dtype.itemsize > _MAX_BYTES:
            raise ValueError("impossible size of a storage")
        raw = file.read(numel * dtype.itemsize)
        if len(raw) < numel * dtype.itemsize:
            raise EOFError("it ends within its numbers")
        storage.numbers = np.frombuffer(raw, dtype)
    return loaded


def _find_state(loaded: Any, path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a state dict, or of the state dict inside a checkpoint."""
    level = [loaded]
    seen: set[int] = set()
    for _ in range(_MAX_DEPTH):
        level = [found for found in level if isinstance(found, dict) and id(found) not in seen]
        seen.update(map(id, level))
        for found in level:
            tensors = {str(name): value for name, value in found.items() if isinstance(value, _Tensor)}
            if sum(tensor.nbytes for tensor in tensors.values()) > _MAX_BYTES:
                raise ConfigError(
                    f"{path}: its tensors have more than {_MAX_BYTES >> 30} GiB, more than any model here"
                )
            if len(tensors) > 1:
                return {name: tensor.to_array() for name, tensor in tensors.items()}
        level = [found[key] for found in level for key in _STATE_KEYS if key in found]
    shown = (
        ", ".join(_show(str(key)) for key in list(loaded)[:6]) if isinstance(loaded, dict) else type(loaded).__name__
    )
    raise ConfigError(f"{path}: has no state dict; it holds: {shown}")


def _show(text: str) -> str:
    """Return a text of a file for a message, short and without control characters."""
    return ascii(text)[1:-1][:80]


def _widen(numbers: np.ndarray) -> np.ndarray:
    """Return bfloat16 numbers, given as their 16 bits, as float32."""
    return (numbers.astype(np.uint32) << 16).view(np.float32)
