"""Read one file over HTTP with limits on bytes, time and redirects.

A server may send more bytes than the file has, compress a terabyte into a megabyte, send one byte
per second or none, or redirect to another host. Each of these ends early, with a message that names
the cause.
"""

from __future__ import annotations

import asyncio
import base64
import os
import weakref
import zlib
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit, urlunsplit

if TYPE_CHECKING:
    import aiohttp
    from yarl import URL

REDIRECTS = 5
# Seconds without a byte, or without a connection, after which a request fails.
STALL_S = 20.0
# After SLOW_S seconds, a request fails if it receives fewer than SLOW_RATE bytes per second.
SLOW_S, SLOW_RATE = 30.0, 32 << 10
# Seconds for a request, including its redirects.
TOTAL_S = 600.0
REDIRECT_STATUSES = (301, 302, 303, 307, 308)
RETRY_STATUSES = (408, 425, 429)
# Settings of this machine, which may also be used for other hosts.
LOCAL_SETTINGS = ("proxy", "proxy_auth", "proxy_headers", "timeout")


class ResponseError(Exception):
    """A response that cannot be used; `retry`: whether the same request may succeed later."""

    def __init__(self, message: str, *, retry: bool = False) -> None:
        super().__init__(message)
        self.retry = retry


class WebReader:
    """Files below an http(s) URL, through the session of an fsspec file system."""

    def __init__(self, filesystem: Any, url: str) -> None:
        parts = urlsplit(url)
        login, separator, host = parts.netloc.rpartition("@")
        self.filesystem, self._parts = filesystem, parts._replace(netloc=host, fragment="")
        # The login is sent in a header, because errors of aiohttp and tracebacks contain URLs.
        self._login_header = (
            {"Authorization": f"Basic {base64.b64encode(_login(login)).decode()}"}
            if separator
            else {}
        )
        self._session_of_other_hosts: aiohttp.ClientSession | None = None

    async def read(self, path: str, span: tuple[int, int] | None, limit: int) -> bytes:
        """Return a file of at most `limit` bytes, or bytes [start, stop) of it.

        A server that does not support ranges returns the whole file.

        Raises:
            FileNotFoundError: The server responds with 404.
            ResponseError: The response is another error, too long or too slow.
        """
        import aiohttp

        url = urlunsplit(self._parts._replace(path=f"{self._parts.path.rstrip('/')}/{path}"))
        headers = {"Accept-Encoding": "identity"} | (
            {"Range": f"bytes={span[0]}-{span[1] - 1}"} if span else {}
        )
        try:
            async with asyncio.timeout(TOTAL_S):
                return await self._follow(self.filesystem.encode_url(url), headers, span, limit)
        except aiohttp.ServerTimeoutError as error:
            raise ResponseError(f"received nothing for {STALL_S:g} s", retry=True) from error
        except TimeoutError as error:
            raise ResponseError("the response did not end in time") from error

    async def _follow(
        self, url: URL, headers: dict[str, str], span: tuple[int, int] | None, limit: int
    ) -> bytes:
        session, is_own_host = await self.filesystem.set_session(), True
        for _ in range(REDIRECTS + 1):
            options = self._options(headers, is_own_host)
            async with asyncio.timeout(SLOW_S):
                response = await session.get(
                    url, allow_redirects=False, auto_decompress=False, **options
                )
            try:
                if response.status not in REDIRECT_STATUSES:
                    return await _body(response, span, limit)
                new_url = _redirected(url, response.headers.get("Location", ""))
            finally:
                response.close()
            if is_own_host and not _same_host(url, new_url):
                session, is_own_host = await self._session_without_secrets(session), False
            url = new_url
        raise ResponseError(f"more than {REDIRECTS} redirects")

    def _options(self, headers: dict[str, str], is_own_host: bool) -> dict[str, Any]:
        """Return the options of a request; other hosts get neither the user's headers nor login."""
        import aiohttp

        settings = dict(self.filesystem.kwargs)
        timeout = aiohttp.ClientTimeout(
            total=TOTAL_S, connect=STALL_S, sock_connect=STALL_S, sock_read=STALL_S
        )
        if is_own_host:
            headers = {**(settings.pop("headers", None) or {}), **self._login_header, **headers}
            return {"timeout": timeout, **settings, "headers": headers}
        return {
            "timeout": timeout,
            **{key: settings[key] for key in LOCAL_SETTINGS if key in settings},
            "headers": headers,
        }

    async def _session_without_secrets(
        self, session: aiohttp.ClientSession
    ) -> aiohttp.ClientSession:
        """Return a session for other hosts, which sends nothing the user set for this host."""
        import aiohttp

        if self._session_of_other_hosts is None:
            self._session_of_other_hosts = aiohttp.ClientSession(
                trust_env=session.trust_env, cookie_jar=aiohttp.DummyCookieJar()
            )
            weakref.finalize(
                self, _close, os.getpid(), self.filesystem, self._session_of_other_hosts
            )
        return self._session_of_other_hosts


async def _body(
    response: aiohttp.ClientResponse, span: tuple[int, int] | None, limit: int
) -> bytes:
    status = response.status
    encoding = response.headers.get("Content-Encoding", "identity").lower().strip()
    if status == 404:
        raise FileNotFoundError
    if status == 416:
        raise ResponseError("the file has fewer bytes than were committed")
    if status != 200 and not (status == 206 and span):
        raise ResponseError(
            f"HTTP status {status}", retry=status >= 500 or status in RETRY_STATUSES
        )
    max_bytes = span[1] - span[0] if span and status == 206 else limit
    if encoding in ("", "identity"):
        return await _bounded(response, max_bytes)
    if encoding not in ("gzip", "x-gzip", "deflate") or status == 206:
        raise ResponseError(f"is sent as {encoding[:40]!r}, which was not requested")
    return _unpacked(await _bounded(response, max_bytes + 1024), max_bytes)


async def _bounded(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """Read a response; ResponseError if it is longer than `max_bytes` or too slow."""
    too_long = ResponseError(
        f"the server sends more than the {max_bytes} bytes that the file can have"
    )
    if (response.content_length or 0) > max_bytes:
        raise too_long
    clock = asyncio.get_running_loop().time
    data, start_time = bytearray(), clock()
    async for part in response.content.iter_any():
        data += part
        if len(data) > max_bytes:
            raise too_long
        if clock() - start_time > SLOW_S + len(data) / SLOW_RATE:
            raise ResponseError(f"the server sends less than {SLOW_RATE >> 10} KiB per second")
    return bytes(data)


def _unpacked(data: bytes, max_bytes: int) -> bytes:
    """Decompress a response; ResponseError if it has more than `max_bytes` bytes."""
    # This value detects gzip or zlib from the header.
    decompressor = zlib.decompressobj(wbits=47)
    try:
        content = decompressor.decompress(data, max_bytes + 1)
    except zlib.error as error:
        raise ResponseError(f"the compressed response is damaged ({error})", retry=True) from error
    if len(content) > max_bytes or not decompressor.eof:
        raise ResponseError(
            f"the compressed response holds more than {max_bytes} bytes, or is cut off"
        )
    return content


def _redirected(url: URL, location: str) -> URL:
    """Return the URL of a redirect; it must be http or https, and not lead from https to http."""
    from yarl import URL

    if not location:
        raise ResponseError("is redirected to nowhere: the response names no Location")
    try:
        new_url = url.join(URL(location))
    except ValueError as error:
        raise ResponseError("is redirected to an invalid URL") from error
    if new_url.scheme not in ("http", "https") or (url.scheme, new_url.scheme) == (
        "https",
        "http",
    ):
        raise ResponseError(
            f"is redirected from {url.scheme} to {new_url.scheme[:20]!r}, which is not followed"
        )
    return new_url.with_user(None)


def _same_host(url: URL, other: URL) -> bool:
    """Return whether secrets for one URL may be sent to another.

    They may if the host is the same; https instead of http is allowed.
    """
    upgrade = (url.scheme, url.port, other.scheme, other.port) == ("http", 80, "https", 443)
    return url.host == other.host and (upgrade or url.origin() == other.origin())


def _close(process: int, filesystem: Any, session: aiohttp.ClientSession) -> None:
    # A forked process has the session, but not the thread that runs it.
    if os.getpid() == process:
        filesystem.close_session(filesystem.loop, session)


def _login(text: str) -> bytes:
    user, _, password = text.partition(":")
    return f"{unquote(user)}:{unquote(password)}".encode()
