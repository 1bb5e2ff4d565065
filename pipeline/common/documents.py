"""Read JSON, YAML and lists that others may have written, as plain data of a known form.

A folder of runs may come from anybody. Each file that is read must be a regular file inside the
folder, with limits of size and nesting, and have the form that its reader relies on; otherwise the
error names the file. Lists and csv files are text in UTF-8, as editors save it.
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
# An alias counts as many as the values that it repeats.
MAX_YAML_VALUES = 1_000_000
# Depth of nested lists and mappings; the function that writes YAML is recursive.
MAX_DEPTH = 48

_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")

F = TypeVar("F", bound="Form")


class Form(BaseModel):
    """The part of a document that readers rely on; other keys are ignored. Numbers are finite.

    `noun` names it in messages.
    """

    noun: ClassVar[str] = "an object"
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


def is_regular_file(path: Path, inside: Path | None = None) -> bool:
    """Return whether a readable file exists.

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
    """Return the value of a YAML text, without Python's own tags. It reads all YAML.

    Raises:
        yaml.YAMLError: It is not YAML, too long, nested too deeply, contains itself, or has aliases
            that stand for more than MAX_YAML_VALUES values.
    """
    if len(text) > MAX_YAML_BYTES:
        raise yaml.YAMLError(f"more than {MAX_YAML_BYTES:,} characters")
    try:
        stream = loader(text)
        try:
            root = stream.get_single_node()
            # Counted before objects are built: merge keys (`<<`) copy the values of aliases.
            if _count(root, {}, 0) > MAX_YAML_VALUES:
                raise yaml.YAMLError(f"aliases that stand for more than {MAX_YAML_VALUES:,} values")
            return None if root is None else stream.construct_document(root)
        finally:
            stream.dispose()
    except RecursionError:
        raise yaml.YAMLError(f"nested more than {MAX_DEPTH} deep") from None
    # YAML has numbers and dates that Python does not have.
    except (ValueError, TypeError, OverflowError) as error:
        raise yaml.YAMLError(f"a value that cannot be read ({error})") from error


def _count(node: yaml.Node | None, counts: dict[int, int], depth: int) -> int:
    """Return the number of values in a node, itself included; an alias is followed once."""
    if depth > MAX_DEPTH:
        raise yaml.YAMLError(f"nested more than {MAX_DEPTH} deep, or in itself")
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in counts:
        mapping = isinstance(node, yaml.MappingNode)
        inner = chain.from_iterable(node.value) if mapping else node.value
        counts[id(node)] = 1 + sum(_count(each, counts, depth + 1) for each in inner)
    return counts[id(node)]


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
    content: Any, form: type[F], prefix: str, error: type[DistInitError] = SourceError
) -> dict[str, Any]:
    """Return the content, a mapping, if it has the form.

    Raises:
        error: It has another form; the message begins with `prefix` and has the key and the value.
    """
    if not isinstance(content, dict):
        raise error(f"{prefix}: not {form.noun} (a {type(content).__name__})")
    try:
        form.model_validate(content)
    except ValidationError as invalid:
        problem = invalid.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise error(
            f"{prefix}: not {form.noun} ({key}: {problem['msg']}, got {short(problem.get('input'))})"
        ) from None
    return content


def inner_path(text: str) -> str:
    """Return a relative path of a record, if it stays in its folder.

    Raises:
        ValueError: The path may leave the folder.
    """
    if not text or "\0" in text or os.path.isabs(text) or ".." in Path(text).parts:
        raise ValueError("expected a path inside of the folder")
    return text


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a list as text; bytes that are not UTF-8, as in file names, become surrogates.

    Raises:
        ListError: The file is UTF-16, UTF-32 or not text, or has more than MAX_LIST_BYTES.
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        data = (
            file.read(MAX_LIST_BYTES + 1)
            if os.fstat(file.fileno()).st_size <= MAX_LIST_BYTES
            else None
        )
    if data is None or len(data) > MAX_LIST_BYTES:
        raise ListError(
            f"{os.fspath(path)}: more than {MAX_LIST_BYTES:,} bytes, too large for a list of videos or labels"
        )
    encoding = next(
        (name for mark, name in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), None
    )
    # In UTF-16 every line end has a zero byte.
    if encoding is None and b"\0" in data:
        encoding = "UTF-16 without a byte order mark, or not text"
    if encoding is not None:
        raise ListError(f"{os.fspath(path)}: the file is {encoding}; save it as text in UTF-8")
    return data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")


def is_utf8(text: str) -> bool:
    """Return whether a text read by `read_text` or given by the system can be written as UTF-8."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def refuse_windows_paths(file: str, root: str, paths: list[str]) -> None:
    r"""Raise ListError for `C:\a.mp4`, `\\host\a.mp4` or `b\a.mp4`, unless it exists in `root`."""
    none_exists: bool | None = None
    for path in paths:
        if "\\" not in path and not _WINDOWS.match(path):
            continue
        if os.path.lexists(os.path.join(root, path)):
            continue
        windows = bool(_WINDOWS.match(path)) or os.path.exists(
            os.path.join(root, path.replace("\\", "/"))
        )
        # A file of Linux may have a backslash in its name, and may have been deleted.
        if not windows:
            if none_exists is None:
                none_exists = not any(os.path.lexists(os.path.join(root, each)) for each in paths)
            windows = none_exists
        if windows:
            raise ListError(
                f"{file}: {path!r} is a Windows path; expected paths with /, relative to {root} or absolute"
            )
