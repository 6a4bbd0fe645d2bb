"""`TensorFile` is a safetensors file: a header, checked in full, and its tensors.

The format is eight bytes with the length of a header, the header in JSON, and the
tensors' bytes without a gap. A file is somebody else's: all that its header says is
checked against the file before anything is allocated.
"""

import json
import math
import pathlib
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from examples.llama.config import UsageError
from examples.llama.run_folder import brief, usable

# The format allows 100 MB, whose JSON takes gigabytes. This holds 8,000 tensors, and
# the largest Llama has 1,138; the worst that it may hold is read in half a second.
_LARGEST_HEADER = 2**20
_MOST_AXES = 8
# Whatever has a name in the format; the numbers of a model are the floats.
DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": "<f8",
        "F32": "<f4",
        "F16": "<f2",
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": "<i8",
        "I32": "<i4",
        "I16": "<i2",
        "I8": "i1",
        "U64": "<u8",
        "U32": "<u4",
        "U16": "<u2",
        "U8": "u1",
        "BOOL": "?",
    }.items()
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Tensor(NamedTuple):
    """Type and shape of a tensor, and where it lies in the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile(NamedTuple):
    """A file whose header is right."""

    path: pathlib.Path
    tensors: dict[str, Tensor]

    def read(self, name: str) -> np.ndarray:
        """One tensor, in memory of its own."""
        tensor = self.tensors[name]
        count = math.prod(tensor.shape)
        with usable(str(self.path)):
            data = np.fromfile(self.path, tensor.dtype, count, offset=tensor.offset)
        if data.size != count:
            raise UsageError(f"{self.path} has become shorter while it was read")
        return data.reshape(tensor.shape)


def parse_json(text: str) -> Any:
    """JSON in which no name stands twice and every number is finite.

    Raises:
        ValueError: it is none.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            for name, _ in pairs:
                if name in seen:
                    raise ValueError(f"the name {name[:80]!r} stands there twice")
                seen.add(name)
        return found

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("JSON of too many levels") from error


def open_tensors(path: pathlib.Path) -> TensorFile:
    """Reads the header of a file that may hold anything.

    Raises:
        UsageError: it is no safetensors file in which every byte belongs to one tensor.
    """
    try:
        return _open(path)
    except ValueError as error:
        raise UsageError(f"{path} is no safetensors file: {brief(error)}") from error


def _open(path: pathlib.Path) -> TensorFile:
    if not path.is_file():  # a pipe would never end
        raise UsageError(f"{path} is no file")
    with usable(str(path)), path.open("rb") as file:
        size = path.stat().st_size
        start = file.read(8)
        if len(start) < 8:
            raise ValueError(f"it has {size} bytes, and its header's length takes 8")
        (length,) = struct.unpack("<Q", start)
        if length > size - 8:
            raise ValueError(
                f"the header is said to have {length:,} bytes, and {size - 8:,} follow"
            )
        if length > _LARGEST_HEADER:
            raise ValueError(
                f"its header has {length:,} bytes; at most {_LARGEST_HEADER:,} are read"
            )
        text = file.read(length)
    if not text.startswith(b"{"):
        raise ValueError("its header does not begin with {")
    header = parse_json(text.decode())
    _check_metadata(header.pop("__metadata__", {}))
    begin = 8 + length
    tensors = {
        name: _check_tensor(name, entry, size - begin) for name, entry in header.items()
    }
    at = 0
    # An empty tensor may begin where another does.
    order = sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes))
    for name, tensor in order:
        if tensor.offset != at:
            kind = "overlaps the one before" if tensor.offset < at else "leaves a gap"
            raise ValueError(f"tensor {name[:80]!r} begins at {tensor.offset}: {kind}")
        at += tensor.nbytes
    if at != size - begin:
        raise ValueError(f"{size - begin - at:,} bytes at its end belong to no tensor")
    return TensorFile(
        path,
        {name: t._replace(offset=begin + t.offset) for name, t in tensors.items()},
    )


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise ValueError("its __metadata__ is no table of strings")


def _check_tensor(name: str, entry: Any, room: int) -> Tensor:
    """The header's entry, if it says nothing impossible."""
    what = f"tensor {name[:80]!r}"
    if not isinstance(entry, dict) or entry.keys() != {
        "dtype",
        "shape",
        "data_offsets",
    }:
        raise ValueError(f"{what} has other fields than dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{what} has the unknown dtype {str(dtype)[:80]!r}")
    # Bounded one by one: a product of endless numbers takes endless time.
    if (
        not _whole_numbers(shape)
        or len(shape) > _MOST_AXES
        or max(shape, default=0) > (2**48)
    ):
        raise ValueError(f"{what} has no shape: {str(shape)[:80]}")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise ValueError(f"{what} has no data_offsets: {str(offsets)[:80]}")
    begin, end = offsets
    found = Tensor(DTYPES[dtype], tuple(shape), begin)
    if not begin <= end <= room:
        raise ValueError(f"{what} lies at {begin} to {end}, and there are {room} bytes")
    if end - begin != found.nbytes:
        raise ValueError(
            f"{what} of shape {shape} and dtype {dtype} takes {found.nbytes} bytes, "
            f"and has {end - begin}"
        )
    return found


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**62 for value in values
    )


def write_tensors(
    path: pathlib.Path,
    tensors: Mapping[str, Tensor],
    get: Callable[[str], np.ndarray],
) -> None:
    """Writes a file with one tensor in memory at a time, which `get` gives by name."""
    # Wide numbers first, so that every tensor begins at a multiple of its width.
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    # Readers of PyTorch's have refused files that do not say so.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        tensor = tensors[name]
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            array, tensor = get(name), tensors[name]
            if array.dtype != tensor.dtype or array.shape != tensor.shape:
                raise ValueError(
                    f"{name}: announced {tensor.dtype} {tensor.shape}, got "
                    f"{array.dtype} {array.shape}"
                )
            # As bytes: NumPy has no buffers of bfloat16.
            np.ascontiguousarray(array).reshape(-1).view(np.uint8).tofile(file)
