"""Archives at an address: https:// by the standard library, s3:// and others by fsspec and its extras.

The archive is read piece by piece into a temporary file. Where the connection breaks, the rest is asked for (HTTP's
Range and If-Range, RFC 9110 sections 13 and 14); where the server has no ranges or the archive is another one by now,
the download begins again. Only a file of the announced length is handed on.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import re
import shutil
import ssl
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit, urlunsplit

from k8scifar.console import say
from k8scifar.errors import TrainingError, UserError
from k8scifar.urls import public

PREFIX = ".archive-"
AUTHORIZATION = "K8SCIFAR_HTTP_AUTHORIZATION"  # environment: the value of the header, e.g. "Bearer ..."
PIECE = 1 << 18
RANGE = 8 << 20  # bytes a request where each request takes a fixed range
STALL_SECONDS = 30.0
STILL = 5  # failures in a row that bring no byte
TRIES = 20  # failures in all
PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0)
SAY_SECONDS = 5.0
INSTALL = "pip install 'k8scifar[remote]' (from a checkout: pip install -e 'trainer[remote]'; in the image: make image "


class Broken(Exception):
    """The connection failed in a way that another try may mend."""


@dataclass(frozen=True)
class Reply:
    """What a server sends: bytes from `start` of an archive of `total` bytes that `mark` tells from others."""

    start: int
    total: int
    mark: str
    pieces: Iterator[bytes]


Ask = Callable[[int, str], Reply]  # (first byte wanted, mark of what is there already) -> reply


@contextlib.contextmanager
def fetched(address: str, folder: Path, alone: bool = True) -> Iterator[Path]:
    """A whole copy of the archive at `address`, in `folder` for the time of the block.

    Args:
        alone: whether nobody else downloads into `folder`, so that what a killed process left there may go.

    Raises UserError (not there, no access, no such package), TrainingError (given up) and OSError (a full disk).
    """
    if alone:
        for stray in folder.glob(f"{PREFIX}*"):
            stray.unlink(missing_ok=True)
    scheme, mark, rest = address.partition("://")
    address = f"{scheme.lower()}{mark}{rest}"
    is_http = address.startswith(("http://", "https://"))
    ask = _http(address) if is_http else _filesystem(address)
    descriptor, path = tempfile.mkstemp(prefix=PREFIX, dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            _download(ask, file, public(address), folder)
        yield Path(path)
    finally:
        Path(path).unlink(missing_ok=True)


def _download(ask: Ask, file: BinaryIO, name: str, folder: Path) -> None:
    """Fill `file`, going on after each failure where it stopped."""
    mark, total, failures, still = "", -1, 0, 0
    started = time.monotonic()
    progress = _Progress(name)
    while file.tell() != total:
        have = file.tell()
        try:
            reply = ask(have, mark)
            if reply.start != have or (have and (reply.mark, reply.total) != (mark, total)):
                if have:
                    say(f"the server begins {name} again from its start")
                file.seek(0)
                file.truncate()
                if reply.start:
                    raise Broken("it is another archive than before")
            mark, total = reply.mark, reply.total
            _check_space(folder, total - file.tell(), name)
            for piece in reply.pieces:
                if file.tell() + len(piece) > total:
                    raise Broken("more came than was announced")
                file.write(piece)
                progress.show(file.tell(), total)
            if file.tell() < total:
                raise Broken(f"the connection ended after {file.tell():,} of {total:,} bytes")
        except Broken as broken:
            failures, still = failures + 1, 0 if file.tell() > have else still + 1
            if still >= STILL or failures >= TRIES:
                raise TrainingError(
                    f"the download of {name} failed {failures} times ({broken}); try again, or take it from elsewhere"
                ) from None
            say(f"the download of {name} broke off ({broken}); trying again")
            time.sleep(PAUSES[min(still, len(PAUSES) - 1)])
    say(f"downloaded {name}: {total / 1e6:.1f} MB in {time.monotonic() - started:.0f} s")


def _check_space(folder: Path, wanted: int, name: str) -> None:
    """Raise UserError, before anything is written, where what is announced does not fit."""
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise UserError(
            f"{name} needs {wanted / 1e6:,.0f} MB, and the data folder {folder} has {free / 1e6:,.0f} MB free; free "
            "some space, or choose another --data-dir"
        )


def _http(address: str) -> Ask:
    """By HTTP. The user and password of the address, or K8SCIFAR_HTTP_AUTHORIZATION, go to its server alone."""
    parts, name = urlsplit(address), public(address)
    bare = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path or "/", parts.query, ""))
    authorization = os.environ.get(AUTHORIZATION, "")
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        authorization = "Basic " + base64.b64encode(pair.encode()).decode()

    def ask(start: int, mark: str) -> Reply:
        request = urllib.request.Request(bare, headers={"User-Agent": "k8scifar"})
        if authorization:
            request.add_unredirected_header("Authorization", authorization)
        if start:
            request.add_header("Range", f"bytes={start}-")
            if mark and not mark.startswith("W/"):
                request.add_header("If-Range", mark)
        try:
            answer = urllib.request.urlopen(request, timeout=STALL_SECONDS)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416 and start:  # shorter than it was
                return ask(0, "")
            if error.code in (408, 425, 429) or error.code >= 500:
                raise Broken(f"the server answered {error.code} {error.reason}") from None
            raise UserError(f"{name}: the server answered {error.code} {error.reason}; {_advice(error.code)}") from None
        except (http.client.HTTPException, OSError) as error:
            raise _unreachable(error, name, parts.hostname) from None
        except ValueError as error:
            raise UserError(f"{name} is no address that can be asked ({error}); check it") from None
        with_range = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        if answer.status == 206 and with_range:
            first, total = int(with_range[1]), int(with_range[2])
        elif (length := answer.headers.get("Content-Length", "")).isdigit():
            first, total = 0, int(length)
        else:
            answer.close()
            raise UserError(f"{name}: the server does not say how long the archive is; take it from another one")
        mark_now = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        return Reply(first, total, mark_now, read(answer))

    def read(answer: Any) -> Iterator[bytes]:
        with answer:
            while True:
                try:
                    piece = answer.read1(PIECE)
                except (http.client.HTTPException, OSError) as error:
                    raise Broken(_reason(error)) from None
                if not piece:
                    return
                yield piece

    return ask


def _filesystem(address: str) -> Ask:
    """By fsspec's file system for the address, in ranges of RANGE bytes. Credentials are the environment's."""
    import fsspec

    scheme, name = urlsplit(address).scheme, public(address)
    try:
        kind = fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        advice = f"{INSTALL}EXTRAS=remote)" if scheme in ("s3", "s3a") else str(error)
        raise UserError(f"{scheme}:// addresses need a package that is not installed: {advice}") from None
    except ValueError:
        raise UserError(f"{name}: {scheme}:// is unknown; use https://, s3:// or another of fsspec's") from None
    # Nothing cached: a changed archive must be seen. The address's own user and password are not for fsspec.
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    try:
        system, path = kind(**options), kind._strip_protocol(address)
    except Exception as error:
        raise UserError(f"{name} can't be opened: {_reason(error)}") from None

    def look() -> tuple[int, str]:
        try:
            system.invalidate_cache()
            about = system.info(path)
        except Exception as error:
            raise _refused(error, name) from None
        if about.get("type") == "directory" or about.get("size") is None:
            raise UserError(f"{name} is no archive but a folder; name the archive in it")
        mark = next((about[key] for key in ("ETag", "etag", "mtime", "created") if about.get(key)), "")
        return about["size"], str(mark)

    def read(start: int, total: int, mark: str) -> Iterator[bytes]:
        while start < total:
            try:
                piece = system.cat_file(path, start=start, end=min(start + RANGE, total))
            except Exception as error:
                raise _refused(error, name) from None
            if not piece or look() != (total, mark):
                raise Broken("it changed meanwhile")
            yield piece
            start += len(piece)

    def ask(start: int, mark: str) -> Reply:
        total, now = look()
        first = start if (now == mark and start < total) else 0
        return Reply(first, total, now, read(first, total, now))

    return ask


def _refused(error: Exception, name: str) -> Exception:
    """What fsspec's file systems raise, as a mistake of the user's or a failure that another try may mend."""
    kind = type(error).__name__
    if kind in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
        return UserError(
            f"{name}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (in the chart: "
            "dataset.credentialsSecret)"
        )
    if isinstance(error, PermissionError):
        return UserError(f"{name}: access denied; check the credentials and what they allow")
    if isinstance(error, FileNotFoundError):
        return UserError(f"{name}: there is no such bucket or file; check the address")
    if isinstance(error, (ValueError, TypeError)):
        return UserError(f"{name} can't be read: {_reason(error)}")
    return Broken(_reason(error))


def _unreachable(error: Exception, name: str, host: str | None) -> Exception:
    reason = getattr(error, "reason", error)
    if isinstance(reason, ssl.SSLCertVerificationError):
        return UserError(
            f"{name}: the certificate of {host} is not valid ({reason.verify_message}); check the address, or name "
            "your authority's certificates with SSL_CERT_FILE"
        )
    return Broken(f"{host}: {_reason(reason)}")


def _advice(code: int) -> str:
    if code in (401, 403, 407):
        return f"check the credentials ({AUTHORIZATION}, or the address's user and signature)"
    return "check the address"


def _reason(error: object) -> str:
    """An error in a few words, with nothing secret in it."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"[a-z0-9+.-]+://\S+", lambda found: public(found[0]), text)
    return text if len(text) <= 200 else f"{text[:200]} ..."


class _Progress:
    """A line each few seconds: how much is there."""

    def __init__(self, name: str) -> None:
        self._name, self._said = name, time.monotonic()

    def show(self, have: int, total: int) -> None:
        if time.monotonic() - self._said >= SAY_SECONDS:
            self._said = time.monotonic()
            say(f"{self._name}: {have / 1e6:.1f} of {total / 1e6:.1f} MB ({have / max(total, 1):.0%})")
