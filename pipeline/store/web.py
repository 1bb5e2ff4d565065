"""Read one file over HTTP within bounds: of bytes, of time, of redirects.

A server may send more than there is, compress a terabyte into a megabyte, send one byte per second
or none, or send the reader to another place. Each of these ends soon, with a sentence that says
what happened.
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
STALL_S = 20.0  # without a byte, or without a connection
# After so long, an answer has so many bytes per second, or it is given up.
SLOW_S, SLOW_RATE = 30.0, 32 << 10
TOTAL_S = 600.0  # a request, with its redirects
REDIRECT_STATUSES = (301, 302, 303, 307, 308)
TRY_AGAIN = (408, 425, 429)
# Settings that are about this machine, not about a server.
OWN = ("proxy", "proxy_auth", "proxy_headers", "timeout")


class AnswerError(Exception):
    """An answer that is not used; `again`: whether the same request may be answered better."""

    def __init__(self, words: str, *, again: bool = False) -> None:
        super().__init__(words)
        self.again = again


class WebReader:
    """Files below an http(s) URL, through the session of an fsspec file system."""

    def __init__(self, filesystem: Any, url: str) -> None:
        parts = urlsplit(url)
        login, at, place = parts.netloc.rpartition("@")
        self.filesystem, self._parts = filesystem, parts._replace(netloc=place, fragment="")
        # In the header, not in the URL: errors of aiohttp and tracebacks hold URLs.
        self._login = (
            {"Authorization": f"Basic {base64.b64encode(_login(login)).decode()}"} if at else {}
        )
        self._bare: aiohttp.ClientSession | None = None

    async def read(self, path: str, span: tuple[int, int] | None, limit: int) -> bytes:
        """Return a file of at most `limit` bytes, or bytes [start, stop) of it.

        All of it where ranges are unknown.

        Raises:
            FileNotFoundError: The server answers 404.
            AnswerError: It answers anything else that is not the file, too much, or too slowly.
        """
        import aiohttp

        target = urlunsplit(self._parts._replace(path=f"{self._parts.path.rstrip('/')}/{path}"))
        ours = {"Accept-Encoding": "identity"} | (
            {"Range": f"bytes={span[0]}-{span[1] - 1}"} if span else {}
        )
        try:
            async with asyncio.timeout(TOTAL_S):
                return await self._follow(self.filesystem.encode_url(target), ours, span, limit)
        except aiohttp.ServerTimeoutError as error:
            raise AnswerError(f"nothing came for {STALL_S:g} s", again=True) from error
        except TimeoutError as error:
            raise AnswerError("no whole answer in time") from error

    async def _follow(
        self, url: URL, ours: dict[str, str], span: tuple[int, int] | None, limit: int
    ) -> bytes:
        session, at_home = await self.filesystem.set_session(), True
        for _ in range(REDIRECTS + 1):
            options = self._options(ours, at_home)
            async with asyncio.timeout(SLOW_S):
                answer = await session.get(
                    url, allow_redirects=False, auto_decompress=False, **options
                )
            try:
                if answer.status not in REDIRECT_STATUSES:
                    return await _body(answer, span, limit)
                following = _redirected(url, answer.headers.get("Location", ""))
            finally:
                answer.close()
            if at_home and not _same_host(url, following):
                session, at_home = await self._session_without_secrets(session), False
            url = following
        raise AnswerError(f"more than {REDIRECTS} redirects")

    def _options(self, condition: dict[str, str], at_home: bool) -> dict[str, Any]:
        import aiohttp

        given = dict(self.filesystem.kwargs)
        timeout = aiohttp.ClientTimeout(
            total=TOTAL_S, connect=STALL_S, sock_connect=STALL_S, sock_read=STALL_S
        )
        if at_home:
            headers = {**(given.pop("headers", None) or {}), **self._login, **condition}
            return {"timeout": timeout, **given, "headers": headers}
        return {
            "timeout": timeout,
            **{key: given[key] for key in OWN if key in given},
            "headers": condition,
        }

    async def _session_without_secrets(
        self, session: aiohttp.ClientSession
    ) -> aiohttp.ClientSession:
        """Return a session for other hosts: nothing is sent that the user gave for this one."""
        import aiohttp

        if self._bare is None:
            self._bare = aiohttp.ClientSession(
                trust_env=session.trust_env, cookie_jar=aiohttp.DummyCookieJar()
            )
            weakref.finalize(self, _close, os.getpid(), self.filesystem, self._bare)
        return self._bare


async def _body(answer: aiohttp.ClientResponse, span: tuple[int, int] | None, limit: int) -> bytes:
    status = answer.status
    encoding = answer.headers.get("Content-Encoding", "identity").lower().strip()
    if status == 404:
        raise FileNotFoundError
    if status == 416:
        raise AnswerError("the file has fewer bytes than were committed")
    if status != 200 and not (status == 206 and span):
        raise AnswerError(f"HTTP status {status}", again=status >= 500 or status in TRY_AGAIN)
    most = span[1] - span[0] if span and status == 206 else limit
    if encoding in ("", "identity"):
        return await _bounded(answer, most)
    if encoding not in ("gzip", "x-gzip", "deflate") or status == 206:
        raise AnswerError(f"is sent as {encoding[:40]!r}, which was not asked for")
    return _unpacked(await _bounded(answer, most + 1024), most)


async def _bounded(answer: aiohttp.ClientResponse, most: int) -> bytes:
    """Read the server's answer while it is at most `most` bytes and not too slow."""
    too_long = AnswerError(f"the server sends more than the {most} bytes that the file can have")
    if (answer.content_length or 0) > most:
        raise too_long
    clock = asyncio.get_running_loop().time
    data, began = bytearray(), clock()
    async for part in answer.content.iter_any():
        data += part
        if len(data) > most:
            raise too_long
        if clock() - began > SLOW_S + len(data) / SLOW_RATE:
            raise AnswerError(f"the server sends less than {SLOW_RATE >> 10} KiB per second")
    return bytes(data)


def _unpacked(data: bytes, most: int) -> bytes:
    """Return the content of a compressed answer; at most `most` bytes are unpacked."""
    unpack = zlib.decompressobj(wbits=47)  # gzip or zlib, by the header
    try:
        content = unpack.decompress(data, most + 1)
    except zlib.error as error:
        raise AnswerError(f"the compressed answer is damaged ({error})", again=True) from error
    if len(content) > most or not unpack.eof:
        raise AnswerError(f"the compressed answer holds more than {most} bytes, or is cut off")
    return content


def _redirected(url: URL, location: str) -> URL:
    """Return where a redirect leads: to http or https, and not from https to http."""
    from yarl import URL

    if not location:
        raise AnswerError("is redirected to nowhere: the answer names no Location")
    try:
        following = url.join(URL(location))
    except ValueError as error:
        raise AnswerError("is redirected to something that is no URL") from error
    if following.scheme not in ("http", "https") or (url.scheme, following.scheme) == (
        "https",
        "http",
    ):
        raise AnswerError(
            f"is redirected from {url.scheme} to {following.scheme[:20]!r}, which is not followed"
        )
    return following.with_user(None)


def _same_host(url: URL, following: URL) -> bool:
    """Return whether data for one URL may be sent to another.

    It may if the host is the same, also by https instead of http.
    """
    upgrade = (url.scheme, url.port, following.scheme, following.port) == ("http", 80, "https", 443)
    return url.host == following.host and (upgrade or url.origin() == following.origin())


def _close(process: int, filesystem: Any, session: aiohttp.ClientSession) -> None:
    # A forked process has the session, but not the thread that it works in.
    if os.getpid() == process:
        filesystem.close_session(filesystem.loop, session)


def _login(text: str) -> bytes:
    user, _, password = text.partition(":")
    return f"{unquote(user)}:{unquote(password)}".encode()
