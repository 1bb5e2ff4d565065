"""JSON, YAML and lists that others may have written: read whole, as plain data of a known form.

A folder of runs may come from anybody. What is read of it is a regular file inside of it, no larger
than such a file can be, nested no deeper than people nest, and of the form that its reader relies
on; otherwise one error names the file. Lists and csv files are text in UTF-8, as editors save it.
"""

from __future__ import annotations

import codecs
import errno
import json
import os
import re
import stat
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import DistInitError, ListError, SourceError, short

MAX_BYTES = 256 << 20
MAX_LIST_BYTES = 1 << 30
MAX_YAML_BYTES = 1 << 20
MAX_YAML_VALUES = 1_000_000  # each alias counts as many as the values that it repeats
MAX_DEPTH = 48  # of lists and mappings in each other; YAML is written by a recursive function

_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")

F = TypeVar("F", bound="Form")


class Form(BaseModel):
    """The part of a document that is relied on; the rest is ignored. Numbers are finite.

    `what` names it in messages.
    """

    what: ClassVar[str] = "an object"
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


def is_regular_file(path: Path, inside: Path | None = None) -> bool:
    """Check whether a file exists that can be read.

    Raises:
        SourceError: It is a pipe, a device or a folder, or a link that leads out of the folder
            `inside`.
    """
    try:
        kind = path.stat().st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR) and not path.is_symlink():
            return False
        raise SourceError(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(kind):
        raise SourceError(f"{path}: not a regular file")
    if inside is not None and not path.resolve().is_relative_to(inside.resolve()):
        raise SourceError(
            f"{path}: a link to {path.resolve()}, outside of {inside}; expected the file itself"
        )
    return True


def read_bytes(path: Path, inside: Path | None = None) -> bytes:
    """Return the whole file, b"" if it does not exist.

    Raises:
        SourceError: As `is_regular_file`, or it has more than MAX_BYTES.
    """
    if not is_regular_file(path, inside):
        return b""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise SourceError(f"{path}: more than {MAX_BYTES:,} bytes")
    return content


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: It is not JSON, or nested too deeply.
    """
    try:
        return plain_data(json.loads(text))
    except RecursionError as error:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from error


def plain_data(value: Any, depth: int = 0) -> Any:
    """Return a value in JSON's types, dates of YAML as text.

    Raises:
        ValueError: It is nested too deeply.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if isinstance(value, dict):
        return {str(key): plain_data(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain_data(inner, depth + 1) for inner in value]
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 64:
        raise ValueError("a number of more than 64 bits")
    return value if value is None or isinstance(value, str | int | float) else str(value)


def load_yaml(text: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Return the value of a YAML text, without Python's own tags; the one place where YAML is read.

    Raises:
        yaml.YAMLError: no YAML, or one that is too long, nested too deeply, contains itself, or has
            aliases of aliases that stand for more values than any document has.
    """
    if len(text) > MAX_YAML_BYTES:
        raise yaml.YAMLError(f"more than {MAX_YAML_BYTES:,} characters")
    try:
        stream = loader(text)
        try:
            root = stream.get_single_node()
            # Before anything is built of the nodes: merge keys (`<<`) copy what aliases stand for.
            if _count(root, {}, 0) > MAX_YAML_VALUES:
                raise yaml.YAMLError(f"aliases that stand for more than {MAX_YAML_VALUES:,} values")
            return None if root is None else stream.construct_document(root)
        finally:
            stream.dispose()
    except RecursionError:
        raise yaml.YAMLError(f"nested more than {MAX_DEPTH} deep") from None
    # A number or date that YAML has and Python does not.
    except (ValueError, TypeError, OverflowError) as error:
        raise yaml.YAMLError(f"a value that cannot be read ({error})") from error


def _count(node: yaml.Node | None, known: dict[int, int], depth: int) -> int:
    """Return how many values a node holds, itself included; an alias is followed once."""
    if depth > MAX_DEPTH:
        raise yaml.YAMLError(f"nested more than {MAX_DEPTH} deep, or in itself")
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        mapping = isinstance(node, yaml.MappingNode)
        inner = chain.from_iterable(node.value) if mapping else node.value
        known[id(node)] = 1 + sum(_count(each, known, depth + 1) for each in inner)
    return known[id(node)]


def read_json(path: Path, form: type[F], inside: Path | None = None) -> dict[str, Any]:
    """Return the object in a JSON file, checked for its form; {} if it is missing or empty.

    Raises:
        SourceError: It cannot be read, or has another form.
    """
    text = read_bytes(path, inside)
    if not text:
        return {}
    try:
        content = parse_json(text)
    except ValueError as error:
        raise SourceError(f"{path}: not JSON ({error})") from error
    return require_form(content, form, str(path))


def require_form(
    content: Any, form: type[F], where: str, error: type[DistInitError] = SourceError
) -> dict[str, Any]:
    """Return the content, a mapping, if it has the form.

    Raises:
        error: It has another form; the message has `where`, the key and the value.
    """
    if not isinstance(content, dict):
        raise error(f"{where}: not {form.what} (a {type(content).__name__})")
    try:
        form.model_validate(content)
    except ValidationError as invalid:
        first = invalid.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise error(
            f"{where}: not {form.what} ({place}: {first['msg']}, got {short(first.get('input'))})"
        ) from None
    return content


def inner_path(text: str) -> str:
    """Return a path below a folder, as a record names it.

    Raises:
        ValueError: The path may leave the folder.
    """
    if not text or "\0" in text or os.path.isabs(text) or ".." in Path(text).parts:
        raise ValueError("expected a path inside of the folder")
    return text


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a list; bytes that are not UTF-8, as file names may have them, become surrogates.

    Raises:
        ListError: the file is UTF-16, UTF-32 or not text, or larger than a list of some million
            videos.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        data = (
            file.read(MAX_LIST_BYTES + 1)
            if os.fstat(file.fileno()).st_size <= MAX_LIST_BYTES
            else None
        )
    if data is None or len(data) > MAX_LIST_BYTES:
        raise ListError(
            f"{os.fspath(path)}: more than {MAX_LIST_BYTES:,} bytes, which is no list of videos or labels"
        )
    named = next((name for mark, name in _MARKS.items() if data.startswith(mark)), None)
    if named is None and b"\0" in data:  # in UTF-16 without a mark every line end has one
        named = "UTF-16 without a byte order mark, or not text"
    if named is not None:
        raise ListError(f"{os.fspath(path)}: the file is {named}; save it as text in UTF-8")
    return data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")


def is_utf8(text: str) -> bool:
    """Return whether a text read by `read_text` or given by the system can be written as UTF-8."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def refuse_windows_paths(file: str, root: str, paths: list[str]) -> None:
    r"""Raise ListError for `C:\a.mp4`, `\\host\a.mp4` and `b\a.mp4` that are no files of `root`."""
    none_exists: bool | None = None
    for path in paths:
        if "\\" not in path and not _WINDOWS.match(path):
            continue
        if os.path.lexists(os.path.join(root, path)):
            continue
        windows = bool(_WINDOWS.match(path)) or os.path.exists(
            os.path.join(root, path.replace("\\", "/"))
        )
        if not windows:  # a Linux file may have a backslash in its name, and may have been deleted
            if none_exists is None:
                none_exists = not any(os.path.lexists(os.path.join(root, each)) for each in paths)
            windows = none_exists
        if windows:
            raise ListError(
                f"{file}: {path!r} is a path of Windows; expected paths with /, relative to {root} or absolute"
            )
