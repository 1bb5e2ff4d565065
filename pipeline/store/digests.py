"""Digests that a store holds of its own nodes and tables, so that every flipped bit is detected.

Shard files have their digests in commits. Everything else is covered here: each `zarr.json` ends
with a digest of itself, and each plan holds digests of the table rows that it adds. Both are
optional in format version 1 (docs/store-format.md): stores of version 0.1 have none. Every
existing digest is checked.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..common.errors import StoreError
from .validation import load_json

if TYPE_CHECKING:
    from .columns import Column
    from .storage import StoreFiles

KEY = "distinit"
DIGEST = "blake2b"
_TAIL = re.compile(rb'"blake2b": "([0-9a-f]{32})"\}\}\}')
_TAIL_BYTES = 48
_AFTER_DIGEST = len(b'"}}}')

Ranges = dict[str, dict[tuple[int, int], set[str]]]
"""Array path → (first row, end) → digests that plans hold for these rows."""


def digest_bytes(data: bytes) -> str:
    """Return the blake2b-128 digest that nodes, plans and commits use, as 32 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def seal(document: Mapping[str, Any]) -> bytes:
    """Return the text of a zarr.json that ends with a digest of all its other bytes.

    The digest is stored under `attributes.distinit`.
    """
    attributes = document.get("attributes", {})
    record = _without(attributes.get(KEY, {}), DIGEST)
    attributes = {**_without(attributes, KEY), KEY: {**record, DIGEST: "0" * 32}}
    text = json.dumps({**_without(document, "attributes"), "attributes": attributes}).encode()
    head, tail = text[: -32 - _AFTER_DIGEST], text[-_AFTER_DIGEST:]
    return head + digest_bytes(head + tail).encode() + tail


def is_sealed(text: bytes) -> bool:
    """Check whether a zarr.json ends with a digest."""
    return _TAIL.fullmatch(text[-_TAIL_BYTES:]) is not None


def digest_agrees(text: bytes) -> bool | None:
    """Compare a zarr.json with the digest at its end; None if it has none."""
    match = _TAIL.fullmatch(text[-_TAIL_BYTES:])
    if match is None:
        return None
    return digest_bytes(text[: -32 - _AFTER_DIGEST] + text[-_AFTER_DIGEST:]) == match[1].decode()


def check_document(where: str, text: bytes, *, required: bool = False) -> dict[str, Any]:
    """Parse a zarr.json and compare it with its digest, if it has one.

    Args:
        where: Name of the file in messages.
        text: Content of the file.
        required: Whether it must have a digest.

    Raises:
        StoreError: The text is not a JSON object, differs from its digest, or lacks a digest that
            is `required`; the message names `where`.
    """
    corrupt: StoreError | None = None
    try:
        document = load_json(where, text)
    except StoreError as error:
        corrupt = error
    agreed = digest_agrees(text)
    if agreed is False:
        raise StoreError(f"{where}: differs from what was written (digest)")
    if corrupt is not None:
        raise corrupt
    if agreed is None and (required or _has_digest(document)):
        raise StoreError(f"{where}: differs from what was written (its digest is not at its end)")
    return document


def _without(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != key}


def _has_digest(document: Mapping[str, Any]) -> bool:
    attributes = document.get("attributes")
    record = attributes.get(KEY) if isinstance(attributes, dict) else None
    return isinstance(record, dict) and DIGEST in record


# Tables


def digest_rows(values: NDArray[Any]) -> str:
    """Return the digest of rows of a table column.

    Numbers are hashed little-endian, texts in UTF-8 with a zero byte each.
    """
    if values.dtype.kind in "OTU":
        return digest_bytes(
            "".join(f"{text}\0" for text in values.tolist()).encode("utf-8", "surrogatepass")
        )
    return digest_bytes(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes())


def split_ranges(start: int, stop: int, chunk: int) -> list[tuple[int, int]]:
    """Split rows [start, stop) into ranges that do not cross chunk borders.

    A chunk is written in one step, so a range is either old or new as a whole.
    """
    borders = [start, *range((start // chunk + 1) * chunk, stop, chunk), stop]
    return list(pairwise(borders)) if stop > start else []


def num_planned(plans: Iterable[Mapping[str, Any]], key: str) -> int:
    """Return how many `videos`, `segments` or `shards` the plans record."""
    return max((int(plan.get(key, 0)) for plan in plans), default=0)


def ranges_of(plans: Iterable[Mapping[str, Any]]) -> Ranges:
    """Collect the digests that plans hold for rows of tables.

    Rows that a later plan changes may have their old or their new digest: the plan is written
    first, and the process may be killed before it writes the rows.
    """
    ranges: Ranges = {}
    for plan in plans:
        for path, entries in plan.get("tables", {}).items():
            for first, end, digest in entries:
                ranges.setdefault(path, {}).setdefault((first, end), set()).add(digest)
    return ranges


def read_rows(files: StoreFiles, path: str, start: int, stop: int, ranges: Ranges) -> NDArray[Any]:
    """Read rows [start, stop) of a table column, checked against the digests of their ranges.

    Raises:
        StoreError: The column or its file does not exist, is too short, cannot be decoded or
            differs from its digest.
    """
    digests = ranges.get(path, {})
    try:
        return checked_rows(files.table(path), start, stop, digests)
    except StoreError:
        if not files.forget(path):
            raise
        return checked_rows(files.table(path), start, stop, digests)


def checked_rows(
    column: Column, start: int, stop: int, ranges: Mapping[tuple[int, int], set[str]]
) -> NDArray[Any]:
    """Read rows of an open column and check them as `read_rows` does."""
    where = column.where
    if column.shape[0] < stop:
        raise StoreError(f"{where}: has {column.shape[0]} rows, the plans record {stop}")
    values = column.read(start, stop)
    for (first, end), digests in ranges.items():
        if (
            start <= first
            and end <= stop
            and digest_rows(values[first - start : end - start]) not in digests
        ):
            raise StoreError(
                f"{where}: rows {first} to {end} differ from what was written (digest)"
            )
    return values
