"""The store's layout on disk, versions 1 and 2: names, array specs, nodes.

docs/store-format.md is the contract. A store is one Zarr v3 group. Two kinds of node make something
exist: a *plan* (rows of the video and segment tables) and a *commit* (one shard of the frame tables
or of one teacher). Both are Zarr groups whose zarr.json is replaced atomically, so a reader sees
either the whole node or none. Array data without a node does not exist.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ..common.errors import StoreError
from ..common.files import fsync_path, write_whole
from .digests import DIGEST, KEY, check_document, digest_rows, read_rows, seal
from .encoding import (
    DEFAULT,
    Codec,
    check_encoding,
    check_output,
    row_arrays,
    value_type,
)
from .storage import LocalFiles, StoreFiles, inside, store_files
from .store_options import Encoding, Output, PlainEncoding, pca_components
from .validation import MAX_BASIS, check_basis, check_node, check_requires, check_width, load_json
from .validation import check_root as check_root_form

FORMAT = "distinit-targets"
VERSIONS = (1, 2)
# Version of new stores.
VERSION = 2
REQUIREMENTS = ("features", "pca", "grid", "flip")
"""Abilities that a store of version 2 can require of its readers: teachers with features, in pca:D,
with cells of a frame, with mirrored frames."""
STAGING = "staging"
"""A group that exists only while a store is written."""
# Rows per chunk of a teacher's values, which are read together for one pick: 32 kB at 1000 classes.
VALUES_CHUNK = 16
# Rows per chunk of the frame tables.
TABLE_CHUNK = 256
# Rows per chunk of the video and segment tables.
VIDEO_CHUNK = 16384
FINGERPRINT = "fingerprint"
"""A node in a teacher's group."""
STATISTICS = "statistics"
"""A group in a teacher's group: one node of sums per shard."""
FRAME_TABLES = ("video", "index", "pts")
HASHES = "frames/hashes"
"""Name of the hashes of frames in findings; it cannot be the name of a teacher."""
HASH_TABLES = ("hash_p", "hash_r", "hash_rms")
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
    """One array: its type, fill value, dimensions, row shape and chunk size.

    Arrays over cached frames are sharded, tables have plain chunks.
    """

    path: str
    dtype: str
    fill: float | int | str
    dims: tuple[str, ...]
    row: tuple[int, ...] = ()
    chunk: int = VIDEO_CHUNK
    sharded: bool = False

    @property
    def name(self) -> str:
        """The array's name without its groups."""
        return self.path.rpartition("/")[2]


def video_specs() -> list[ArraySpec]:
    """Return the arrays of the video table: one row per listed file, of any status."""
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
    """Return the arrays of the segment table: ranges of videos and their shards."""
    cols = (("video", -1), ("shard", -1), ("first", 0), ("end", -1), ("bound", 0), ("replaces", -1))
    return [ArraySpec(f"segments/{n}", "int64", f, ("segment",)) for n, f in cols]


def frame_specs() -> list[ArraySpec]:
    """Return the frame tables: video, frame index and pts of each row."""
    kinds = (("video", "int32", -1), ("index", "int64", -1), ("pts", "int64", -1))
    return [ArraySpec(f"frames/{n}", t, f, ("frame",), (), TABLE_CHUNK, True) for n, t, f in kinds]


def hash_specs() -> list[ArraySpec]:
    """Return the arrays of the perceptual hashes of cached frames, which only version 2 has."""
    kinds = (("p", "uint64", 0), ("r", "uint64", 0), ("rms", "float16", float("nan")))
    return [
        ArraySpec(f"frames/hash_{n}", t, f, ("frame",), (), TABLE_CHUNK, True) for n, t, f in kinds
    ]


def teacher_specs(
    name: str, width: int, encoding: Encoding = DEFAULT, output: Output = "logits"
) -> list[ArraySpec]:
    """Return the arrays over rows of one teacher with `width` classes or features.

    They are those of `encoding` for the values [frame, class or feature], and for logits the
    entropy [frame] in nats.
    """
    nan, dtype = float("nan"), value_type(encoding)
    values, *others = row_arrays(encoding, output)
    return [
        ArraySpec(
            f"teachers/{name}/{values}",
            dtype,
            0 if dtype == "int8" else nan,
            ("frame", "class" if output == "logits" else "feature"),
            (pca_components(encoding) or width,),
            VALUES_CHUNK,
            True,
        ),
        *(
            ArraySpec(f"teachers/{name}/{n}", "float32", nan, ("frame",), (), TABLE_CHUNK, True)
            for n in others
        ),
    ]


def basis_specs(name: str, width: int, components: int) -> list[ArraySpec]:
    """Return the tables of a teacher in pca:D: the basis, one component per row, and the mean."""
    group = f"teachers/{name}"
    return [
        ArraySpec(
            f"{group}/basis", "float32", 0, ("component", "feature"), (width,), max(components, 1)
        ),
        ArraySpec(f"{group}/mean", "float32", 0, ("feature",), (), max(width, 1)),
    ]


def create_array(root: Path, spec: ArraySpec, rows: int, shard_rows: int) -> None:
    """Create an array below `root`; `rows` of a sharded array is a multiple of `shard_rows`."""
    # Importing zarr takes 0.3 s, and readers do not need it.
    import zarr
    from zarr.codecs import Crc32cCodec, ZstdCodec

    folder = inside(root, spec.path)
    # Tables are compressed; the crc32c detects a flipped bit whenever a chunk is read.
    options: dict[str, Any] = {"compressors": [ZstdCodec(), Crc32cCodec()]}
    if spec.sharded:
        # Compression would save at most 8 % of logits, and make reading take three times as long.
        options = {
            "shards": (shard_rows, *spec.row),
            "compressors": [Crc32cCodec()],
            "filters": None,
        }
    zarr.create_array(
        folder,
        shape=(rows, *spec.row),
        dtype=str if spec.dtype == "str" else spec.dtype,
        chunks=(min(spec.chunk, shard_rows) if spec.sharded else spec.chunk, *spec.row),
        fill_value=spec.fill,
        dimension_names=spec.dims,
        **options,
    )
    seal_array(folder)


def codec_attributes(codec: Codec) -> dict[str, Any]:
    """Return the attributes of a teacher's node that record its codec."""
    if codec.output == "logits":
        return {"encoding": codec.encoding}
    attributes = {"encoding": codec.encoding, "output": codec.output, "width": codec.width}
    if codec.basis is None or codec.mean is None:
        return attributes
    return {
        **attributes,
        "pca": {"basis": digest_rows(codec.basis), "mean": digest_rows(codec.mean)},
    }


def create_tables(group: Path, codec: Codec, classes: Sequence[str]) -> None:
    """Create the tables of a teacher in its group: names of classes, or the basis of pca:D."""
    import zarr

    tables: dict[ArraySpec, Any] = {}
    if codec.output == "logits":
        spec = ArraySpec("class", "str", "", ("class",), (), max(len(classes), 1))
        tables[spec] = np.asarray(classes, dtype=object)
    elif codec.basis is not None:
        specs = basis_specs("", codec.width, len(codec.basis))
        tables = dict(zip(specs, (codec.basis, codec.mean), strict=True))
    for spec, values in tables.items():
        create_array(group, replace(spec, path=spec.name), len(values), 0)
        zarr.open_array(group / spec.name, mode="r+")[:] = values


def seal_array(folder: Path, **changes: Any) -> None:
    """Replace an array's zarr.json atomically, with changed members and its digest."""
    file = folder / "zarr.json"
    document = check_document(str(file), file.read_bytes())
    write_whole(file, seal({**document, **changes}), StoreError)


def resize_array(root: Path, spec: ArraySpec, rows: int) -> None:
    """Grow an array to `rows` rows; never shrinks it."""
    shape = LocalFiles(root).metadata(spec.path)["shape"]
    if shape[0] < rows:
        seal_array(root / spec.path, shape=[rows, *shape[1:]])


def shard_file(root: Path, spec: ArraySpec, shard: int) -> Path:
    """Return the path of an array's shard (default chunk keys, `c/<shard>/0…`)."""
    return root.joinpath(spec.path, "c", str(shard), *("0" for _ in spec.row))


def write_node(root: Path, node: str, attributes: Mapping[str, Any]) -> None:
    """Write a group node (`.` is the root) atomically and sync it to disk."""
    folder = root if node == "." else inside(root, node)
    if folder.exists():
        write_whole(folder / "zarr.json", _group(attributes), StoreError)
        return
    # A folder without zarr.json would not belong to the hierarchy, so both must appear at once.
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
    """Make a folder a Zarr group with this record and its digest; not atomic."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "zarr.json").write_bytes(_group(record))


def _group(record: Mapping[str, Any]) -> bytes:
    return seal({"zarr_format": 3, "node_type": "group", "attributes": {KEY: dict(record)}})


def parse_node(where: str, text: bytes, *, sealed: bool = False) -> dict[str, Any]:
    """Return the attributes of a node.

    sealed: whether the node must have a digest.

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
    files: StoreFiles, group: str, names: Iterable[str], *, faults: dict[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """Return the existing nodes of a group among `names`, in that order, checked.

    faults: receives the error messages of damaged nodes by name; if it is None, a StoreError is
        raised.
    """
    paths = {f"{group}/{name}/zarr.json": name for name in names}
    if faults is None:
        return {
            paths[path]: _node(files, group, path, text)
            for path, text in files.read_many(paths).items()
        }
    nodes = {}
    for path, name in paths.items():
        try:
            nodes[name] = _node(files, group, path, files.read(path))
        except StoreError as error:
            faults[name] = str(error)
        except (FileNotFoundError, NotADirectoryError):
            continue
    return nodes


def _node(files: StoreFiles, group: str, path: str, text: bytes) -> dict[str, Any]:
    where = f"{files.name}/{path}"
    return check_node(where, group, parse_node(where, text, sealed=files.sealed))


def read_fingerprint(files: StoreFiles, teacher: str) -> dict[str, Any] | None:
    """Return the fingerprint of a teacher of the store, None if it has none."""
    return read_nodes(files, f"teachers/{teacher}", [FINGERPRINT]).get(FINGERPRINT)


def read_codec(files: StoreFiles, teacher: str, node: Mapping[str, Any]) -> Codec:
    """Return the codec of a teacher's rows; `node`: the node of its group.

    Raises:
        StoreError: Output or encoding are unknown, or the basis of pca:D is damaged.
    """
    where = f"{files.name}/teachers/{teacher}/zarr.json"
    output = check_output(node.get("output", "logits"), where)
    encoding = check_encoding(node.get("encoding"), where, output)
    if output == "logits":
        return Codec(output, encoding, files.table(f"teachers/{teacher}/class").shape[0])
    width = check_width(where, node)
    if not (components := pca_components(encoding)):
        return Codec(output, encoding, width)
    if components > width or components * width > MAX_BASIS:
        raise StoreError(
            f"{where}: encoding {encoding!r}: a basis of {components} components of {width} "
            f"features, expected at most {min(width, MAX_BASIS // width)} components"
        )
    digests = check_basis(where, node)
    tables = []
    for spec, shape in zip(
        basis_specs(teacher, width, components), ((components, width), (width,)), strict=True
    ):
        if files.table(spec.path).shape != shape:
            raise StoreError(
                f"{files.name}/{spec.path}/zarr.json: has the shape {files.table(spec.path).shape}, "
                f"expected {shape}"
            )
        ranges = {spec.path: {(0, shape[0]): {digests[spec.name]}}}
        tables.append(read_rows(files, spec.path, 0, shape[0], ranges))
    if not all(np.isfinite(table).all() for table in tables):
        raise StoreError(f"{files.name}/teachers/{teacher}/basis: is not finite")
    return Codec(output, encoding, width, *tables)


def read_plans(files: StoreFiles, *, faults: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """Return the nodes of `plans/`, which are numbered; the last is followed by a missing number.

    Args:
        files: The store.
        faults: As in `read_nodes`; a damaged plan is then returned empty, a missing one skipped.

    Raises:
        StoreError: `faults` is None and a plan is damaged, or missing in the middle of a remote
            store.
    """
    plans: list[dict[str, Any]] = []
    batch_size = 8
    while True:
        names = [f"{i:06d}" for i in range(len(plans), len(plans) + batch_size)]
        nodes = read_nodes(files, "plans", names, faults=faults)
        exists = [name in nodes or name in (faults or ()) for name in names]
        count = [*exists, False].index(False)
        plans += [nodes.get(name, {}) for name in names[:count]]
        # Where the group `plans` is damaged, every number is a fault and none would be the last.
        if not nodes:
            return plans
        if count == batch_size:
            batch_size *= 2
        elif count:
            # Request the missing number again, with those after it: a server may have failed once.
            continue
        elif faults is not None or isinstance(files, LocalFiles):
            # `index.losses` reports the plans that a folder has lost.
            return plans + [
                nodes.get(n, {}) for n, is_plan in zip(names, exists, strict=True) if is_plan
            ]
        # A writer may have added the plan since it was first requested.
        elif not read_nodes(files, "plans", names[:1]):
            raise StoreError(f"{files.name}/plans/{names[0]}: is missing, but {max(nodes)} exists")


def is_started_store(folder: Path) -> bool:
    """Return whether a folder is an unfinished store or empty."""
    try:
        check_root(folder)
    except StoreError:
        return folder.is_dir() and not any(folder.iterdir())
    return True


def check_root(where: Path | StoreFiles) -> dict[str, Any]:
    """Return the attributes of the store at `where`.

    Raises:
        StoreError: It is not a store that this version reads; the message describes it.
    """
    files = store_files(where)
    try:
        text = files.read("zarr.json")
    except FileNotFoundError:
        raise StoreError(f"{files.name}: {_describe_missing_root(files)}") from None
    except NotADirectoryError:
        raise StoreError(
            f"{files.name}: is a file, expected a target store, which is a folder"
        ) from None
    attributes = parse_root(f"{files.name}/zarr.json", text)
    files.sealed = bool(attributes.get("node_digests"))
    check_root_form(f"{files.name}/zarr.json", attributes)
    return attributes


def parse_root(where: str, text: bytes) -> dict[str, Any]:
    """Return the attributes of a store's root.

    Raises:
        StoreError: It is not a store, or damaged, or its format version is not supported.
    """
    attributes = load_json(where, text).get("attributes")
    record = attributes.get(KEY) if isinstance(attributes, dict) else None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise StoreError(
            f"{where}: a Zarr node, but not a target store (attribute {KEY}.format is missing)"
        )
    # The version is checked first, because other versions may have other digests.
    version = record.get("version")
    if type(version) is not int or version not in VERSIONS:
        raise StoreError(
            f"{where}: format version {version}, this distinit reads versions "
            f"{' and '.join(map(str, VERSIONS))}"
        )
    record = parse_node(where, text, sealed=bool(record.get("node_digests")))
    if version >= 2:
        _check_requirements(where, record)
    return record


def _check_requirements(where: str, record: Mapping[str, Any]) -> None:
    """Raise StoreError if a store of version 2 requires an ability that this version lacks."""
    check_requires(where, record)
    unknown = [name for name in record["requires"] if name not in REQUIREMENTS]
    if unknown:
        raise StoreError(
            f"{where}: requires {', '.join(map(repr, unknown))}, which this distinit does not know "
            f"(it knows {', '.join(REQUIREMENTS)}); a newer version reads this store"
        )


def requirements(output: Output, encoding: Encoding, node: Mapping[str, Any]) -> list[str]:
    """Return the abilities that a teacher requires of readers; `node`: the node of its group."""
    is_required = {
        "features": output == "features",
        "pca": bool(pca_components(encoding)),
        "grid": "grid" in node,
        "flip": "mirror_of" in node,
    }
    return [name for name, required in is_required.items() if required]


def check_view(where: str, name: str, node: Mapping[str, Any], teachers: Container[str]) -> None:
    """Check the view of the frames that a teacher's rows belong to.

    Raises:
        StoreError: `mirror_of` is not another teacher, or cells do not hold features.
    """
    grid, original = node.get("grid"), node.get("mirror_of")
    if original is not None and (original == name or original not in teachers):
        raise StoreError(
            f"{where}: mirror_of: expected another teacher of the store, got {original!r}"
        )
    if grid is None:
        return
    if node.get("output") != "features" or node["encoding"] not in get_args(PlainEncoding):
        raise StoreError(
            f"{where}: grid: expected features in {' or '.join(get_args(PlainEncoding))}, got "
            f"{node.get('output')!r} in {node['encoding']!r}"
        )
    if check_width(where, node) % grid["cells"] ** 2:
        raise StoreError(
            f"{where}: width {node['width']}: expected a multiple of the {grid['cells'] ** 2} cells"
        )


def _describe_missing_root(files: StoreFiles) -> str:
    """Describe a folder or URL without the zarr.json of a store."""
    if isinstance(files, LocalFiles) and not files.root.exists():
        return "no such target store"
    if files.read_many([".zgroup"]):
        return "a Zarr v2 group; a store is made by `distinit extract-targets`"
    if isinstance(files, LocalFiles):
        return "not a target store (no zarr.json); a store is made by `distinit extract-targets`"
    return "no such target store (no zarr.json at this URL)"


def as_numpy(spec: ArraySpec, values: Any) -> np.ndarray:
    """Return values of a column as an array of the column's type."""
    return np.asarray(values, dtype=object if spec.dtype == "str" else spec.dtype)
