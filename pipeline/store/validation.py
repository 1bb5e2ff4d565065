"""Check the form of the nodes and array metadata of a store before they are used.

A store may come from a third party: its names become paths, its numbers become sizes and addresses.
docs/store-format.md lists the bounds. `read_nodes`, `check_root` and the readers of arrays call
these functions, so that all other code gets values of the right type and size only.
"""

from __future__ import annotations

import json
import math
import re
import sys
from array import array
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeGuard, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from pydantic_core import from_json

from ..common.errors import StoreError, short
from ..video.sampling import Sampling
from .frame_views import LARGEST_GRID, SMALLEST_GRID
from .store_options import Output

if TYPE_CHECKING:
    from .layout import ArraySpec

MAX_NODE_BYTES = 64 << 20
# Depth of nested lists and objects.
MAX_DEPTH = 64
# Videos, segments or shards; `frames/video` is int32.
MAX_COUNT = 2**31 - 1
MAX_SHARD_ROWS = 1 << 20
# Bytes of one shard file.
MAX_SHARD_BYTES = 1 << 34
MAX_CLASSES = 1 << 20
# Rows per chunk of a table.
MAX_CHUNK_ROWS = 1 << 16
# Chunks of a table's column.
MAX_CHUNKS = 1 << 16
# Values of the basis of pca:D.
MAX_BASIS = 1 << 26
# Bytes of the texts of a chunk.
MAX_TEXT_CHUNK = 1 << 26
MAX_NAME = 200
MAX_TEXT = 1 << 16
SHARD_UNIT = 256

_TABLE_CODECS: tuple[list[str], ...] = ([], ["zstd"], ["crc32c"], ["zstd", "crc32c"])
ENDIAN = ("little", "big")
_DIGEST = re.compile(r"[0-9a-f]{32}")
_FILE = re.compile(r"[A-Za-z0-9_.-]{1,200}(/[A-Za-z0-9_.-]{1,200}){0,15}")

OUTPUTS: tuple[Output, ...] = get_args(Output)

Form = tuple[str, Callable[[Any], bool]]
"""Description of the allowed values, and a function that checks a value."""


def load_json(where: str, text: bytes) -> dict[str, Any]:
    """Parse a zarr.json.

    Raises:
        StoreError: It is not a JSON object, too large or too deep; the message names `where`.
    """
    if len(text) > MAX_NODE_BYTES:
        raise StoreError(f"{where}: has {len(text)} bytes, at most {MAX_NODE_BYTES} are allowed")
    try:
        document = _parse(text)
        # A document needs at least one bracket per level, so most have too few to be too deep.
        if text.count(b"[") + text.count(b"{") > MAX_DEPTH:
            _check_depth(document, MAX_DEPTH)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{where}: corrupt, not JSON ({error})") from error
    if not isinstance(document, dict):
        raise StoreError(f"{where}: corrupt, expected a JSON object, got {type(document).__name__}")
    return document


def _parse(text: bytes) -> Any:
    # pydantic takes half the time of the standard library.
    try:
        return from_json(text)
    except ValueError:
        # Only the standard library reads half a surrogate pair: a byte of a path that is not UTF-8.
        return json.loads(text)


def _check_depth(value: Any, max_depth: int) -> None:
    if max_depth < 0:
        raise ValueError(f"lists and objects are nested more than {MAX_DEPTH} deep")
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list):
            _check_depth(inner, max_depth - 1)


# Values


def is_teacher_name(value: Any) -> bool:
    """Return whether a value can be the name of a teacher, which is a folder in `teachers/`."""
    return (
        isinstance(value, str)
        and len(value) <= MAX_NAME
        and re.fullmatch(r"[A-Za-z0-9._-]+", value) is not None
        and value not in (".", "..", "zarr.json")
    )


def _is_int(value: Any, minimum: int = 0, maximum: int = MAX_COUNT) -> bool:
    return type(value) is int and minimum <= value <= maximum


def _is_text(value: Any, max_chars: int = MAX_TEXT) -> bool:
    return isinstance(value, str) and len(value) <= max_chars and "\0" not in value


def _is_name(value: Any) -> bool:
    return _is_text(value, MAX_NAME) and value not in ("", ".", "..") and "/" not in value


def _is_unique(value: Any, is_valid: Callable[[Any], bool], key: Callable[[Any], Any]) -> bool:
    return (
        isinstance(value, list)
        and all(map(is_valid, value))
        and len({key(v) for v in value}) == len(value)
    )


def _is_corpus(value: Any) -> bool:
    return isinstance(value, dict) and _is_name(value.get("name")) and _is_text(value.get("root"))


def is_digest(value: Any) -> TypeGuard[str]:
    """Return whether a value is a digest or an id: 32 hexadecimal digits."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _is_by_segment(value: Any, is_valid: Callable[[Any], bool]) -> bool:
    """Return whether a value is an object of valid values by segment id in decimal digits."""
    return isinstance(value, dict) and all(
        re.fullmatch(r"0|[1-9][0-9]{0,9}", key) is not None and is_valid(inner)
        for key, inner in value.items()
    )


def _is_run(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    mixed = value.get("mixed", [])
    return (
        _is_int(value.get("batch_size", 1), 1, 1 << 16)
        and _is_text(value.get("precision", ""), MAX_NAME)
        and isinstance(mixed, list)
        and (bool(mixed) or "mixed" not in value)
        and all(map(_is_run, mixed))
    )


def _is_number(value: Any) -> bool:
    # A whole number in JSON may be larger than any float.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_error(value: Any) -> bool:
    """Check a commit's error: one pair of keys that `encoding.ERROR_KEYS` has."""
    return isinstance(value, dict) and any(
        all(key in value and (value[key] is None or _is_number(value[key])) for key in keys)
        for keys in (("kl_mean", "kl_p99"), ("cosine_mean", "cosine_p99"))
    )


def _is_pca(value: Any) -> bool:
    return isinstance(value, dict) and all(is_digest(value.get(k)) for k in ("basis", "mean"))


def _is_part(value: Any) -> bool:
    return value is None or (
        isinstance(value, str) and re.fullmatch(r"[0-9]{1,6}/[0-9]{1,6}", value) is not None
    )


def _is_tables(value: Any) -> bool:
    """Check digests of ranges of table rows, by array: lists of [first, end, digest]."""
    return isinstance(value, dict) and all(
        isinstance(entries, list)
        and all(
            isinstance(e, list)
            and len(e) == 3
            and _is_int(e[0])
            and _is_int(e[1], e[0])
            and is_digest(e[2])
            for e in entries
        )
        for entries in value.values()
    )


_COUNT: Form = f"a whole number from 0 to {MAX_COUNT}", _is_int
_TEXT: Form = f"text of at most {MAX_TEXT} characters", _is_text
_OBJECT: Form = "an object", lambda v: isinstance(v, dict)
_RUN: Form = (
    "an object with batch_size from 1 to 65536 and precision, or with mixed, a list of such",
    _is_run,
)
_REASONS: Form = "texts by segment id", lambda v: _is_by_segment(v, _is_text)
_CORPORA: Form = (
    "objects with root and name, all names different",
    lambda v: _is_unique(v, _is_corpus, lambda c: c["name"]),
)
_TEACHERS: Form = (
    f"different names of at most {MAX_NAME} characters A-Z a-z 0-9 . _ -, none of them ., .. or zarr.json",
    lambda v: _is_unique(v, is_teacher_name, str),
)
_SHARD_ROWS: Form = (
    f"null or a multiple of {SHARD_UNIT} up to {MAX_SHARD_ROWS}",
    lambda v: v is None or (_is_int(v, SHARD_UNIT, MAX_SHARD_ROWS) and v % SHARD_UNIT == 0),
)
_VALUES: Form = (
    "a list of lists",
    lambda v: isinstance(v, list) and all(isinstance(row, list) for row in v),
)
_WIDTH: Form = (
    f"a whole number from 1 to {MAX_CLASSES}",
    lambda v: _is_int(v, 1, MAX_CLASSES),
)
_REQUIRES: Form = (
    "a list of names",
    lambda v: _is_unique(v, lambda name: _is_text(name, MAX_NAME), str),
)
_GRID: Form = (
    f"an object with cells from {SMALLEST_GRID} to {LARGEST_GRID} and plain_mean, true or false",
    lambda v: (
        isinstance(v, dict)
        and _is_int(v.get("cells"), SMALLEST_GRID, LARGEST_GRID)
        and isinstance(v.get("plain_mean"), bool)
    ),
)
SEGMENT_LISTS = ("segment", "first_row", "rows", "frames")

# The keys that are used of each kind of node: their forms, and whether they are required.
_NODES: dict[str, dict[str, tuple[Form, bool]]] = {
    "root": {
        "store_id": (("32 hexadecimal digits", is_digest), True),
        "shard_rows": (_SHARD_ROWS, False),
        "sampling": (_OBJECT, True),
        "created": (_TEXT, True),
        "part": (("null or i/n", _is_part), False),
    },
    "plan": {
        "videos": (_COUNT, False),
        "segments": (_COUNT, False),
        "shards": (_COUNT, False),
        "corpora": (_CORPORA, False),
        "teachers": (_TEACHERS, False),
        "tables": (("lists of [first row, end, digest] by array", _is_tables), False),
    },
    "frames": {
        "failed": (_REASONS, True),
        "notes": (_REASONS, True),
        "overflow": (("whole numbers by segment id", lambda v: _is_by_segment(v, _is_int)), True),
        "counted": (
            ("a list of segment ids", lambda v: isinstance(v, list) and all(map(_is_int, v))),
            True,
        ),
        "files": (_OBJECT, True),
        "run": (_RUN, True),
    },
    "hashes": {
        "rows": (_COUNT, True),
        "failed": (_REASONS, True),
        "files": (_OBJECT, True),
    },
    "rows": {
        "rows": (_COUNT, True),
        "failed": (_REASONS, True),
        "error": (
            (
                "an object with kl_mean and kl_p99, or cosine_mean and cosine_p99: numbers or null",
                _is_error,
            ),
            True,
        ),
        "files": (_OBJECT, True),
        "run": (_RUN, True),
    },
    "teacher": {
        "encoding": (("text", lambda v: _is_text(v, MAX_NAME)), True),
        "identity": (_OBJECT, True),
        "run": (_RUN, True),
        "provenance": (_OBJECT, False),
        "output": (("text", lambda v: _is_text(v, MAX_NAME)), False),
        "width": (_WIDTH, False),
        "pca": (("an object with the digests of basis and mean", _is_pca), False),
        "grid": (_GRID, False),
        "mirror_of": (("the name of a teacher", is_teacher_name), False),
    },
    "statistics": {
        "rows": (_COUNT, True),
        "sum": (
            (
                "a list of finite numbers",
                lambda v: isinstance(v, list) and all(map(_is_number, v)),
            ),
            True,
        ),
        "square": (("a finite number", _is_number), True),
    },
    "fingerprint": {
        "probes": (_COUNT, True),
        "logits": (_VALUES, False),
        "features": (_VALUES, False),
        "torch": (_TEXT, True),
        "device": (_TEXT, True),
        "basis": (_OBJECT, True),
    },
    "other": {},
}


def _kind(group: str) -> str:
    kinds = {
        "plans": "plan",
        "commits/frames": "frames",
        "commits/hashes": "hashes",
        "teachers": "teacher",
    }
    if group in kinds:
        return kinds[group]
    if group.startswith("commits/teachers/"):
        return "rows"
    if group.startswith("teachers/"):
        return "statistics" if group.endswith("/statistics") else "fingerprint"
    return "other"


def check_node(where: str, group: str, record: dict[str, Any]) -> dict[str, Any]:
    """Return the checked record of a node of a group of the store.

    In a commit of frames the lists become arrays [segments].

    Raises:
        StoreError: The message names `where`, the key, the allowed values and the value.
    """
    kind = _kind(group)
    _check(where, kind, record)
    if kind != "frames":
        return record
    return {**record, **dict(zip(SEGMENT_LISTS, _segment_table(where, record), strict=True))}


def check_root(where: str, record: dict[str, Any]) -> None:
    """Raise StoreError unless the record of a store's root is valid."""
    _check(where, "root", record)
    sampling = record["sampling"]
    try:
        every = Sampling.model_validate(sampling).every
    except ValidationError as error:
        raise StoreError(
            f"{where}: sampling: {error.errors()[0]['msg']}, got {short(sampling)}"
        ) from None
    if every is not None and not _is_int(every, 1):
        raise StoreError(f"{where}: sampling.every: expected {_COUNT[0]}, got {short(every)}")


def check_requires(where: str, record: Mapping[str, Any]) -> None:
    """Raise StoreError unless the root of a version 2 store lists the required abilities."""
    _check_value(where, "requires", record.get("requires"), _REQUIRES)


def check_width(where: str, record: Mapping[str, Any]) -> int:
    """Return the number of features of a teacher; StoreError if its node has no valid one."""
    _check_value(where, "width", record.get("width"), _WIDTH)
    return int(record["width"])


def check_basis(where: str, record: Mapping[str, Any]) -> dict[str, str]:
    """Return the digests of a teacher's basis and mean; StoreError if its node has none."""
    _check_value(where, "pca", record.get("pca"), ("an object with basis and mean", _is_pca))
    return dict(record["pca"])


def _check_value(where: str, key: str, value: Any, form: Form) -> None:
    if not form[1](value):
        raise StoreError(f"{where}: {key}: expected {form[0]}, got {short(value)}")


def _check(where: str, kind: str, record: Mapping[str, Any]) -> None:
    for key, (form, required) in _NODES[kind].items():
        if key in record:
            _check_value(where, key, record[key], form)
        elif required:
            raise StoreError(f"{where}: {key} is missing, expected {form[0]}")


def _segment_table(where: str, record: Mapping[str, Any]) -> NDArray[np.int64]:
    """Return the lists of a commit of frames as one array [4, segments]."""
    lists: list[Any] = [record.get(key) for key in SEGMENT_LISTS]
    table: Any = np.zeros((len(lists), 0), np.int64)
    is_valid = (
        all(isinstance(values, list) for values in lists)
        and len({len(values or ()) for values in lists}) == 1
    )
    if is_valid and lists[0]:
        try:
            # An array of the standard library accepts only whole numbers, and is faster than NumPy.
            table = np.frombuffer(array("q", [*chain.from_iterable(lists)]), np.int64).reshape(
                len(lists), -1
            )
            # Frames are −1 where a segment does not reach the end of its file.
            is_valid = (
                bool((table.min(axis=1) >= (0, 0, 0, -1)).all())
                and int(table[:3].max()) <= MAX_COUNT
            )
        except (TypeError, OverflowError):
            is_valid = False
    if not is_valid:
        raise StoreError(
            f"{where}: {', '.join(SEGMENT_LISTS)}: expected lists of equal length of whole numbers "
            f"from 0 to {MAX_COUNT} (frames: from -1), got {short(lists)}"
        )
    checked: NDArray[np.int64] = table
    return checked


def known_files(
    where: str,
    files: Mapping[str, Any],
    arrays: Collection[str],
    shard: int,
    folder: str,
    version: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a commit's files into those of known arrays and those of unknown arrays.

    Only `verify` reads files of arrays that this version does not know; those without size and
    digest are skipped.

    Args:
        where: Name of the commit in messages.
        files: Size and digest by file name.
        arrays: Names of the known arrays.
        shard: The shard of the commit.
        folder: Group of the arrays.
        version: Format version of the store.

    Raises:
        StoreError: A file of a known array has no size or digest; or another file has an invalid
            name, belongs to an array of the format, or is in a store of version 1.
    """
    allowed = _file_names(folder, tuple(arrays), shard)
    known, unknown = dict[str, Any](), dict[str, Any]()
    for name, record in files.items():
        is_valid = (
            isinstance(record, dict)
            and _is_int(record.get("size"), 0, MAX_SHARD_BYTES)
            and is_digest(record.get("blake2b"))
        )
        if name in allowed and is_valid:
            known[name] = record
        elif name in allowed:
            raise StoreError(
                f"{where}: files: {name}: expected size, from 0 to {MAX_SHARD_BYTES}, and blake2b, "
                f"32 hexadecimal digits, got {short(record)}"
            )
        elif version < 2 or not _is_unknown_file(name):
            raise StoreError(
                f"{where}: files: expected one of {', '.join(allowed)}, got {short(name)}"
            )
        elif is_valid:
            unknown[name] = record
    return known, unknown


def _is_unknown_file(name: str) -> bool:
    """Return whether a name is valid for a file of an array that this version does not know."""
    if _FILE.fullmatch(name) is None or {".", ".."} & set(parts := name.split("/")):
        return False
    return all(_spec_of("/".join(parts[:end])) is None for end in range(len(parts) + 1))


def _file_names(folder: str, arrays: tuple[str, ...], shard: int) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}/c/{shard}{'/0' if name in OUTPUTS else ''}" for name in arrays)


# Arrays


def check_array(where: str, path: str, meta: Mapping[str, Any]) -> None:
    """Raise StoreError unless the metadata of the array `path` is what the format defines."""
    spec = _spec_of(path)
    if spec is None:
        raise StoreError(f"{where}: the format has no array {path}")
    try:
        problem = _array_problem(spec, meta)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        raise StoreError(f"{where}: not the metadata of {path}: {problem}")


@lru_cache(maxsize=4096)
def _spec_of(path: str) -> ArraySpec | None:
    # `layout` imports this module.
    from . import layout as fmt

    tables = (*fmt.video_specs(), *fmt.segment_specs(), *fmt.frame_specs(), *fmt.hash_specs())
    specs = {spec.path: spec for spec in tables}
    if path in specs:
        return specs[path]
    _, name, array = (
        path.split("/") if path.startswith("teachers/") and path.count("/") == 2 else ("", "", "")
    )
    if array == "class":
        return fmt.ArraySpec(path, "str", "", ("class",))
    specs = {s.path: s for output in OUTPUTS for s in fmt.teacher_specs(name, 1, "int8", output)}
    specs |= {s.path: s for s in fmt.basis_specs(name, 1, 1)}
    return specs.get(path)


def _array_problem(spec: ArraySpec, meta: Mapping[str, Any]) -> str | None:
    """Describe the first fault of an array's metadata, None if it is valid."""
    rows, *row = meta["shape"]
    has_outputs = spec.path.endswith(tuple(f"/{output}" for output in OUTPUTS))
    is_wide = bool(has_outputs or spec.path.endswith("/basis"))
    types = (
        ["float16", "int8"] if has_outputs else ["string" if spec.dtype == "str" else spec.dtype]
    )
    fill = meta["fill_value"]
    fills = ["NaN", 0] if has_outputs else ["NaN" if spec.fill != spec.fill else spec.fill]
    grid, chunk = meta["chunk_grid"], meta["chunk_grid"]["configuration"]["chunk_shape"]
    keys = meta["chunk_key_encoding"]
    problems = {
        f"shape {short(meta['shape'])}": not _is_int(
            rows, 0, MAX_COUNT * (MAX_SHARD_ROWS if spec.sharded else 1)
        )
        or not (
            len(row) == 1 and _is_int(row[0], 1, MAX_CLASSES) if is_wide else row == list(spec.row)
        ),
        f"data_type {short(meta['data_type'])}, expected {' or '.join(types)}": meta["data_type"]
        not in types,
        f"fill_value {short(fill)}": fill not in fills or type(fill) not in (int, float, str),
        f"chunk grid {short(grid)}": grid["name"] != "regular"
        or not isinstance(chunk, list)
        or chunk[1:] != row,
        f"chunk keys {short(keys)}": keys["name"] != "default"
        or keys.get("configuration", {}).get("separator", "/") != "/",
        "it has storage transformers": bool(meta.get("storage_transformers")),
        "it is not a Zarr v3 array": (meta["zarr_format"], meta["node_type"]) != (3, "array"),
    }
    problem = next((text for text, is_wrong in problems.items() if is_wrong), None)
    if problem or spec.sharded:
        return problem or _sharding_problem(meta["codecs"], chunk, [spec.chunk, *row])
    max_chunk = MAX_CLASSES if spec.dims in (("class",), ("feature",)) else MAX_CHUNK_ROWS
    if is_wide and chunk[0] * row[0] > MAX_BASIS:
        return f"{chunk[0]} rows of {row[0]} values per chunk, expected at most {MAX_BASIS} values"
    if not _is_int(chunk[0], 1, max_chunk):
        return f"{short(chunk[0])} rows per chunk, expected 1 to {max_chunk}"
    if rows > MAX_CHUNKS * chunk[0]:
        return f"{rows} rows in chunks of {chunk[0]}, expected at most {MAX_CHUNKS} chunks"
    for codec in meta["codecs"]:
        settings = codec.get("configuration", {})
        if not isinstance(settings, dict) or settings.get("endian", "little") not in ENDIAN:
            return f"codec {short(codec)}"
    serializer, *codecs = (codec["name"] for codec in meta["codecs"])
    expected = "vlen-utf8" if spec.dtype == "str" else "bytes"
    if serializer != expected or codecs not in _TABLE_CODECS:
        return f"codecs {short([serializer, *codecs])}"
    return None


def largest_chunk(meta: Mapping[str, Any]) -> int:
    """Return the largest size in bytes of a chunk file of a column with valid metadata."""
    shape: list[int] = meta["chunk_grid"]["configuration"]["chunk_shape"]
    is_text = meta["data_type"] == "string"
    num_bytes = (
        MAX_TEXT_CHUNK if is_text else math.prod(shape) * np.dtype(meta["data_type"]).itemsize
    )
    # Compression may add a little to incompressible data.
    return num_bytes * 257 // 256 + 1024


def unpacked_bytes(data: bytes) -> int | None:
    """Return the content size in the header of a zstd frame (RFC 8878, 3.1.1.1), None without one.

    data: the first 18 bytes of the frame, or all of it.
    """
    if data[:4] != b"\x28\xb5\x2f\xfd" or len(data) < 5:
        return None
    single_segment = data[4] >> 5 & 1
    size = (single_segment, 2, 4, 8)[data[4] >> 6]
    start = 6 - single_segment + (0, 1, 2, 4)[data[4] & 3]
    if not size or len(data) < start + size:
        return None
    return int.from_bytes(data[start : start + size], "little") + (256 if size == 2 else 0)


def _sharding_problem(codecs: Any, shard: list[Any], chunk: list[int]) -> str | None:
    if not _is_int(shard[0], SHARD_UNIT, MAX_SHARD_ROWS) or shard[0] % SHARD_UNIT:
        return f"{short(shard[0])} rows per shard, expected a multiple of {SHARD_UNIT} up to {MAX_SHARD_ROWS}"
    if len(codecs) != 1 or codecs[0]["name"] != "sharding_indexed":
        return f"codecs {short(codecs)}, expected sharding_indexed"
    sharding = codecs[0]["configuration"]
    if sharding["chunk_shape"] != chunk:
        return f"chunks {short(sharding['chunk_shape'])} in a shard, expected {chunk}"
    if sharding.get("index_location", "end") != "end":
        return f"index_location {short(sharding['index_location'])}, expected end"
    for key in ("codecs", "index_codecs"):
        names = [codec["name"] for codec in sharding[key]]
        endian = sharding[key][0].get("configuration", {}).get("endian", "little")
        if names != ["bytes", "crc32c"] or endian != "little":
            return f"{key} {short(sharding[key])}, expected bytes (little-endian) and crc32c"
    return None
