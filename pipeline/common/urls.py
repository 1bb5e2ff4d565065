"""Check which URLs may be opened, and hide their passwords and queries in all output."""

from __future__ import annotations

import os
import re
from typing import Annotated
from urllib.parse import parse_qsl, urlencode, urlsplit

from pydantic import Field, PlainSerializer

from .errors import UsageError

PROTOCOLS = ("file", "http", "https", "s3", "gs", "hf")
URL = re.compile(r"[A-Za-z][A-Za-z0-9+._-]*(://|::)")
DEFAULT_PORTS = {"http": 80, "https": 443}
SECRET = re.compile(
    r"(?i)token|sig|key|secret|pass|pwd|auth|credential|expires|^x-(amz|goog)-|^s[epvrt]$"
)
LOGIN = re.compile(r"(?<=://)[^/?#\s]*@")
QUERY = re.compile(r"(://[^\s?]*)\?\S*")


def is_url(text: str | os.PathLike[str]) -> bool:
    """Return whether the address of a store is a URL.

    An existing local path is not a URL.
    """
    text = os.fspath(text)
    return URL.match(text) is not None and local_path(text) == text and not os.path.exists(text)


def local_path(text: str) -> str:
    """Return a path without a leading `file://`."""
    return text[len("file://") :] if text.lower().startswith("file://") else text


def check_local(out: str | os.PathLike[str]) -> None:
    """Check that an output path is local.

    A URL that was turned into a `Path`, as in `s3:/bucket`, is refused as well.

    Raises:
        UsageError: It is a URL, `file://` included, and no existing folder has this name.
    """
    text = os.fspath(out)
    if re.match(r"[A-Za-z][A-Za-z0-9+._-]+:(:.*:)?/", text) and not os.path.exists(text):
        url = public_url(re.sub(":/(?!/)", "://", text, count=1))
        raise UsageError(
            f"--out {url}: a URL; expected a local folder: a store behind a URL can only be read"
        )


def check_url(url: str) -> None:
    """Check that a URL names a place and nothing else.

    Other protocols of fsspec, and chains of them (`a::b`), read files that name further files,
    unpack archives or evaluate templates: such a URL is a program.

    Raises:
        UsageError: The protocol is none of `PROTOCOLS`, or the URL is a chain, malformed, or has a
            password where the protocol has none.
    """
    scheme, allowed = url.partition("://")[0].lower(), ", ".join(f"{name}://" for name in PROTOCOLS)
    try:
        parts = urlsplit(url)
        malformed = not parts.netloc or not url.isprintable() or " " in url or (parts.port or 0) < 0
    # A port that is no number, or brackets that do not match.
    except ValueError:
        malformed = True
    if scheme not in PROTOCOLS or "::" in re.sub(r"://(?:[^/]*@)?\[[^/\]]*\]", "", url):
        raise UsageError(
            f"{public_url(url)}: this kind of URL is not opened; allowed are {allowed}, without a chain of '::'"
        )
    if malformed:
        raise UsageError(
            f"{public_url(url)}: malformed; expected PROTOCOL://HOST/PATH, in a password %2F %3F %23 %40 for / ? # @"
        )
    if "@" in parts.netloc and scheme in ("s3", "gs"):
        raise UsageError(
            f"{public_url(url)}: a password in the URL is for http and https; configure it in fsspec"
        )


def public_url(text: str) -> str:
    """Return the URL without user, password and query, for messages, pages and files.

    A path is returned as it is.
    """
    if not is_url(text):
        return text
    try:
        _ = urlsplit(text).port
    # The end of the password is unknown.
    except ValueError:
        return f"{text.partition('://')[0]}://…"
    bare = re.split(r"[?#]", text, maxsplit=1)[0]
    return bare if re.match("hf://[^/:]*@", bare) else LOGIN.sub("", bare)


def hide_secrets(text: str) -> str:
    """Return the text without the users, passwords and queries of the URLs in it."""
    return QUERY.sub(r"\1?…", LOGIN.sub("", text))


def canonical_url(url: str) -> str:
    """Return the same text for all spellings of a URL, without user, password and signature."""
    parts = urlsplit(url)
    scheme, host = parts.scheme.lower(), parts.netloc
    if scheme in DEFAULT_PORTS:
        host = f"{parts.hostname}:{parts.port or DEFAULT_PORTS[scheme]}"
    query = [
        (k, v) for k, v in parse_qsl(parts.query, keep_blank_values=True) if not SECRET.search(k)
    ]
    return f"{scheme}://{host}{parts.path.rstrip('/')}?{urlencode(query)}"


StoreAddress = Annotated[str, PlainSerializer(public_url), Field(repr=False)]
"""The folder or URL of a store as an option. Dumps of the options (`config.yaml`, `--dry-run`)
do not contain its password."""
