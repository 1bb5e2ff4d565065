"""The store's layout on disk, version 1: names, array specs, nodes.

docs/store-format.md is the contract. A store is one Zarr v3 group. Two kinds of node make something
exist: a *plan* (rows of the video and segment tables) and a *commit* (one shard of the frame tables
or of one teacher). Both are Zarr groups whose attributes are written in one atomic replacement of
their zarr.json, so a reader sees either all of it or nothing. Array data without a node does not
exist.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from ..common.errors import StoreError
from ..common.files import fsync_path, write_whole
from .digests import DIGEST, KEY, check_document, seal
from .encoding import DEFAULT, arrays_of
from .storage import LocalFiles, StoreFiles, inside, open_table, store_files
from .store_options import Encoding
from .validation import check_node, load_json
from .validation import check_root as check_root_form

FORMAT = "distinit-targets"
VERSION = 1
STAGING = "staging"  # a group that exists only while a store is written
LOGITS_CHUNK = 16  # rows read for one pick: 32 kB at 1000 classes
TABLE_CHUNK = 256  # rows of the frame tables read together
VIDEO_CHUNK = 16384  # rows of the video and segment tables
FINGERPRINT = "fingerprint"  # the node of a teacher's own in its group
FRAME_TABLES = ("video", "index", "pts")
GROUPS = (
    "videos",
    "segments",
    "frames",
    "teachers",
    "plans",
    "commits",
    "commits/frames",
    "commits/teachers",
)


@dataclass(frozen=True)
class ArraySpec:
    """One array: its row shape, type and fill.

    `rows` arrays are sharded, tables are plain chunks.
    """

    path: str
    dtype: str
    fill: float | int | str
    dims: tuple[str, ...]
    row: tuple[int, ...] = ()
    chunk: int = VIDEO_CHUNK
    sharded: bool = False


def video_specs() -> list[ArraySpec]:
    """Return the video table: one row per listed file, whatever its status."""
    cols: list[tuple[str, str, float | int | str]] = [
        ("corpus", "int32", -1),
        ("path", "str", ""),
        ("size", "int64", -1),
        ("duration", "float64", float("nan")),
        ("fps", "float64", float("nan")),
        ("rows_bound", "int64", 0),
        ("time_base_num", "int64", 0),
        ("time_base_den", "int64", 0),
        ("width", "int32", 0),
        ("height", "int32", 0),
    ]
    specs = [ArraySpec(f"videos/{n}", t, f, ("video",)) for n, t, f in cols]
    return [*specs, ArraySpec("videos/digest", "uint8", 0, ("video", "digest_byte"), (16,))]


def segment_specs() -> list[ArraySpec]:
    """Return the segment table: which range of which video is planned into which shard."""
    cols = (("video", -1), ("shard", -1), ("first", 0), ("end", -1), ("bound", 0), ("replaces", -1))
    return [ArraySpec(f"segments/{n}", "int64", f, ("segment",)) for n, f in cols]


def frame_specs() -> list[ArraySpec]:
    """Return the frame tables: which frame of which video each row is."""
    kinds = (("video", "int32", -1), ("index", "int64", -1), ("pts", "int64", -1))
    return [ArraySpec(f"frames/{n}", t, f, ("frame",), (), TABLE_CHUNK, True) for n, t, f in kinds]


def teacher_specs(name: str, classes: int, encoding: Encoding = DEFAULT) -> list[ArraySpec]:
    """Return the rows of one teacher.

    They are the arrays of `encoding` for logits [frame, class], and entropy [frame] in nats.
    """
    nan, fill = float("nan"), 0 if encoding == "int8" else float("nan")
    logits = ArraySpec(
        f"teachers/{name}/logits",
        encoding,
        fill,
        ("frame", "class"),
        (classes,),
        LOGITS_CHUNK,
        True,
    )
    names = [*arrays_of(encoding)[1:], "entropy"]
    return [
        logits,
        *(
            ArraySpec(f"teachers/{name}/{n}", "float32", nan, ("frame",), (), TABLE_CHUNK, True)
            for n in names
        ),
    ]


def create_array(root: Path, spec: ArraySpec, rows: int, shard_rows: int) -> None:
    """Create the array under `root`; sharded arrays of `rows` (a multiple of `shard_rows`) rows."""
    inside(root, spec.path)
    group = zarr.open_group(root, mode="a")
    # Tables are compressed; the crc behind that finds a flipped bit wherever a chunk is read.
    extra: dict[str, Any] = {"compressors": [ZstdCodec(), Crc32cCodec()]}
    if spec.sharded:
        # No compression: logits shrink by 8 % at most, and reading takes three times as long. A crc
        # in every chunk finds a flipped bit.
        extra = {"shards": (shard_rows, *spec.row), "compressors": [Crc32cCodec()], "filters": None}
    group.create_array(
        spec.path,
        shape=(rows, *spec.row),
        dtype=str if spec.dtype == "str" else spec.dtype,
        chunks=(min(spec.chunk, shard_rows) if spec.sharded else spec.chunk, *spec.row),
        fill_value=spec.fill,
        dimension_names=spec.dims,
        **extra,
    )
    seal_array(root / spec.path)


def create_classes(group: Path, classes: Sequence[str]) -> None:
    """Create the array of a teacher's class names in its group, as one chunk."""
    spec = ArraySpec("class", "str", "", ("class",), (), max(len(classes), 1))
    create_array(group, spec, len(classes), 0)
    zarr.open_array(group / spec.path, mode="r+")[:] = np.asarray(classes, dtype=object)


def seal_array(folder: Path, **changes: Any) -> None:
    """Replace an array's zarr.json atomically, with changed members and a digest of itself."""
    file = folder / "zarr.json"
    document = check_document(str(file), file.read_bytes())
    write_whole(file, seal({**document, **changes}), StoreError)


def resize_array(root: Path, spec: ArraySpec, rows: int) -> None:
    """Grow an array to `rows` rows; never shrinks it."""
    LocalFiles(root).metadata(spec.path)
    shape = open_table(root / spec.path).shape
    if shape[0] < rows:
        seal_array(root / spec.path, shape=[rows, *shape[1:]])


def shard_file(root: Path, spec: ArraySpec, shard: int) -> Path:
    """Return the path of an array's shard (default chunk keys, `c/<shard>/0…`)."""
    return root.joinpath(spec.path, "c", str(shard), *("0" for _ in spec.row))


def write_node(root: Path, node: str, attributes: Mapping[str, Any]) -> None:
    """Write a group node (`.` is the root) in one atomic step, synced."""
    folder = root if node == "." else inside(root, node)
    if folder.exists():
        write_whole(folder / "zarr.json", _group(attributes), StoreError)
        return
    # A folder without its zarr.json would not be a part of the hierarchy, so both appear at once.
    scratch = inside(root, STAGING) / f"node-{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        make_group(scratch, attributes)
        fsync_path(scratch / "zarr.json")
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.rename(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    fsync_path(folder)
    fsync_path(folder.parent)


def make_group(folder: Path, record: Mapping[str, Any]) -> None:
    """Make a folder a Zarr group with this record and its digest: where nobody reads yet."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "zarr.json").write_bytes(_group(record))


def _group(record: Mapping[str, Any]) -> bytes:
    return seal({"zarr_format": 3, "node_type": "group", "attributes": {KEY: dict(record)}})


def read_node(path: Path) -> dict[str, Any]:
    """Return the attributes of the node whose zarr.json is `path`; StoreError if it is not ours."""
    try:
        return parse_node(str(path), path.read_bytes())
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path}: not a readable node of a target store ({error})") from error


def parse_node(where: str, text: bytes, *, sealed: bool = False) -> dict[str, Any]:
    """Return the attributes of a node.

    sealed: the node must have a digest.

    Raises:
        StoreError: The node is of another program or damaged; the message names `where`.
    """
    attributes = check_document(where, text, required=sealed).get("attributes")
    record = attributes.get(KEY) if isinstance(attributes, dict) else None
    if not isinstance(record, dict):
        raise StoreError(
            f"{where}: not a node of a target store (attribute {KEY} is missing or no object)"
        )
    record.pop(DIGEST, None)
    return record


def read_nodes(
    files: StoreFiles, group: str, names: Iterable[str], *, broken: dict[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """Return the existing nodes of a group among `names`, in their order, each of a valid form.

    broken: receives, by name, what is wrong with nodes of another form; without it a StoreError is
        raised.
    """
    paths = {f"{group}/{name}/zarr.json": name for name in names}
    if broken is None:
        return {
            paths[path]: _node(files, group, path, text)
            for path, text in files.read_many(paths).items()
        }
    nodes = {}
    for path, name in paths.items():
        try:
            nodes[name] = _node(files, group, path, files.read(path))
        except StoreError as error:
            broken[name] = str(error)
        except (FileNotFoundError, NotADirectoryError):
            continue
    return nodes


def _node(files: StoreFiles, group: str, path: str, text: bytes) -> dict[str, Any]:
    where = f"{files.name}/{path}"
    return check_node(where, group, parse_node(where, text, sealed=files.sealed))


def read_fingerprint(files: StoreFiles, teacher: str) -> dict[str, Any] | None:
    """Return the fingerprint of a teacher of the store, None if it has none."""
    return read_nodes(files, f"teachers/{teacher}", [FINGERPRINT]).get(FINGERPRINT)


def read_plans(files: StoreFiles, *, broken: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """Return the nodes of `plans/`: they are numbered, and the last is the one with none behind it.

    Args:
        files: The store.
        broken: As in `read_nodes`; a broken plan is empty, and one that is missing is passed over.

    Raises:
        StoreError: A plan is damaged, or missing in the middle of a remote store, and `broken` is
            not given.
    """
    plans: list[dict[str, Any]] = []
    ask = 8
    while True:
        names = [f"{i:06d}" for i in range(len(plans), len(plans) + ask)]
        nodes = read_nodes(files, "plans", names, broken=broken)
        exists = [name in nodes or name in (broken or ()) for name in names]
        count = [*exists, False].index(False)
        plans += [nodes.get(name, {}) for name in names[:count]]
        if not nodes:  # where `plans` itself is damaged, no number is the last
            return plans
        if count == ask:
            ask *= 2
        elif count:  # the missing number is asked for again, with some behind it: a server may have failed once
            continue
        elif broken is not None or isinstance(
            files, LocalFiles
        ):  # what a folder has lost, `index.losses` finds
            return plans + [
                nodes.get(name, {})
                for name, is_known in zip(names, exists, strict=True)
                if is_known
            ]
        elif not read_nodes(files, "plans", names[:1]):  # a writer may have added it since
            raise StoreError(f"{files.name}/plans/{names[0]}: is missing, but {max(nodes)} exists")


def is_ours(folder: Path) -> bool:
    """Return whether a folder next to a store was begun as a store, or is empty."""
    try:
        check_root(folder)
    except StoreError:
        return folder.is_dir() and not any(folder.iterdir())
    return True


def check_root(where: Path | StoreFiles) -> dict[str, Any]:
    """Return the attributes of the store at `where`.

    Raises:
        StoreError: It is not a version-1 store; the message names what it is.
    """
    files = store_files(where)
    try:
        text = files.read("zarr.json")
    except FileNotFoundError:
        raise StoreError(f"{files.name}: {_instead(files)}") from None
    except NotADirectoryError:
        raise StoreError(
            f"{files.name}: is a file, expected a target store, which is a folder"
        ) from None
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(
            f"{files.name}/zarr.json: cannot be read ({error.strerror or error})"
        ) from error
    attributes = parse_root(f"{files.name}/zarr.json", text)
    files.sealed = bool(attributes.get("node_digests"))
    check_root_form(f"{files.name}/zarr.json", attributes)
    return attributes


def parse_root(where: str, text: bytes) -> dict[str, Any]:
    """Return the attributes of a store's root.

    Raises:
        StoreError: It is no store, of another version or damaged.
    """
    attributes = load_json(where, text).get("attributes")
    record = attributes.get(KEY) if isinstance(attributes, dict) else None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise StoreError(
            f"{where}: a Zarr node, but not a target store (attribute {KEY}.format is missing)"
        )
    # The version comes first: another one may have other digests.
    if record.get("version") != VERSION:
        raise StoreError(
            f"{where}: format version {record.get('version')}, this distinit reads version {VERSION}"
        )
    return parse_node(where, text, sealed=bool(record.get("node_digests")))


def _instead(files: StoreFiles) -> str:
    """Describe what exists where a store's zarr.json was expected."""
    if isinstance(files, LocalFiles) and not files.root.exists():
        return "no such target store"
    if files.read_many([".zgroup"]):
        return "a Zarr v2 group; a store is made by `distinit extract-targets`"
    if isinstance(files, LocalFiles):
        return "not a target store (no zarr.json); a store is made by `distinit extract-targets`"
    return "no such target store (no zarr.json there)"


def as_numpy(spec: ArraySpec, values: Any) -> np.ndarray:
    """Return values of a column in the array's type."""
    return np.asarray(values, dtype=object if spec.dtype == "str" else spec.dtype)
