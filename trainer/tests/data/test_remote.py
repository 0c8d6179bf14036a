"""Archives at an address: real servers on real sockets that break off, forget ranges, change what they serve."""

from __future__ import annotations

import http.server
import io
import os
import ssl
import subprocess
import tarfile
import threading
from types import SimpleNamespace

import pytest
from runs import cli
from test_prepare import paint_folder

from k8scifar.cli import main
from k8scifar.data import packed
from k8scifar.data.prepare import prepare
from k8scifar.data.reading import remote
from k8scifar.errors import TrainingError, UserError
from k8scifar.urls import public

KEY, SECRET = "AKIAK8SCIFARTEST", "wJalrXUtnFEMIK7MDENGbPxRfiCYSECRETKEY"


@pytest.fixture(scope="module")
def archive(module_path) -> bytes:
    """A .tar.gz of 40 incompressible pictures, some 130 kB."""
    paint_folder(module_path, train=15, test=5)
    packed_up = io.BytesIO()
    with tarfile.open(fileobj=packed_up, mode="w:gz") as tar:
        tar.add(module_path, arcname=".")
    return packed_up.getvalue()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.0,))
    monkeypatch.setattr(remote, "PIECE", 4096)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.state`: its content, with or without ranges, cut off after `cut` bytes for `breaks` requests."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        state = self.server.state
        state.requests.append(dict(self.headers))
        if state.status != 200:
            self.send_response(state.status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content, first, status = state.content, 0, 200
        wanted = self.headers.get("Range")
        if state.ranges and wanted and self.headers.get("If-Range", state.etag) == state.etag:
            first, status = int(wanted.removeprefix("bytes=").removesuffix("-")), 206
        self.send_response(status)
        self.send_header("ETag", state.etag)
        if state.length:
            self.send_header("Content-Length", str(len(content) - first))
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        part = content[first:]
        if state.breaks:
            state.breaks -= 1
            part = part[: state.cut]
            state.after_break()
        self.wfile.write(part)
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server(archive):
    """A web server with its `state` and `url`."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        web.state = SimpleNamespace(
            content=archive, etag='"one"', ranges=True, length=True, breaks=0, cut=30_000, status=200, requests=[],
            after_break=lambda: None,
        )  # fmt: skip
        web.url = f"http://127.0.0.1:{web.server_port}/cifar.tar.gz"
        thread = threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield web
        web.shutdown()


def whole(folder, address):
    """Prepare from `address`; the manifest, after looking that nothing temporary stayed behind."""
    manifest, fresh = prepare(folder, f"imagefolder:{address}")
    assert fresh and manifest.counts == {"train": 30, "test": 10}
    assert packed.damage(folder, manifest) is None
    assert not list(folder.glob(f"{remote.PREFIX}*"))
    return manifest


def test_https_address_of_an_archive(tmp_path, server, capsys):
    manifest = whole(tmp_path, server.url)
    assert manifest.source == f"imagefolder:{server.url}"
    assert "MB in" in capsys.readouterr().err
    assert prepare(tmp_path, f"imagefolder:{server.url}")[1] is False
    assert len(server.state.requests) == 1, "what is there already is not downloaded again"


def test_an_address_in_capitals_is_one(tmp_path, server):
    assert whole(tmp_path, server.url.replace("http://", "HTTP://"))


def test_a_broken_connection_goes_on_where_it_stopped(tmp_path, server, capsys):
    server.state.breaks = 3
    whole(tmp_path, server.url)
    starts = [headers.get("Range") for headers in server.state.requests]
    assert starts == [None, "bytes=30000-", "bytes=60000-", "bytes=90000-"]
    assert server.state.requests[1]["If-Range"] == '"one"'
    assert capsys.readouterr().err.count("broke off") == 3


def test_a_server_without_ranges_begins_again(tmp_path, server, capsys):
    server.state.breaks, server.state.ranges = 2, False
    whole(tmp_path, server.url)
    assert len(server.state.requests) == 3
    assert "again from its start" in capsys.readouterr().err


@pytest.mark.parametrize("obeys_if_range", [True, False])
def test_an_archive_that_changes_meanwhile_begins_again(tmp_path, server, obeys_if_range):
    good, state = server.state.content, server.state
    state.content, state.breaks = bytes(len(good)), 1  # the old one: as long, and no archive

    def replace():
        state.content = good
        if obeys_if_range:
            state.etag = '"two"'
        else:  # a server that sends the rest of another archive, under its own mark
            state.etag = Liar('"two"')

    state.after_break = replace
    whole(tmp_path, server.url)


class Liar(str):
    """An entity tag that any If-Range matches."""

    __hash__ = str.__hash__

    def __eq__(self, other):
        return True


def test_a_download_that_never_ends_well_is_given_up(tmp_path, server):
    server.state.breaks, server.state.cut = 1000, 0
    with pytest.raises(TrainingError, match=f"failed {remote.STILL} times"):
        prepare(tmp_path, f"imagefolder:{server.url}")
    server.state.cut = 100  # some bytes each time: still not for ever
    server.state.requests.clear()
    with pytest.raises(TrainingError, match=f"failed {remote.TRIES} times .*the connection ended after"):
        prepare(tmp_path, f"imagefolder:{server.url}")
    assert len(server.state.requests) == remote.TRIES
    assert [path.name for path in tmp_path.iterdir()] == [".prepare.lock"], "a truncated download leaves nothing"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"status": 404}, "404 Not Found"),
        ({"status": 403}, "check the credentials"),
        ({"length": False}, "does not say how long"),
        ({"content": b"<html>log in first</html>"}, "is a web page, not an archive"),
    ],
)
def test_mistakes_are_one_line(tmp_path, server, change, words, capsys):
    vars(server.state).update(change)
    assert main(["prepare", "--source", f"imagefolder:{server.url}", "--data-dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert words in said and len([line for line in said.splitlines() if "error" in line]) == 1
    assert [path.name for path in tmp_path.iterdir()] == [".prepare.lock"]


def test_nobody_there_and_no_such_name(tmp_path):
    with pytest.raises(TrainingError, match=r"127\.0\.0\.1: .*refused"):
        prepare(tmp_path, "imagefolder:http://127.0.0.1:9/a.tar.gz")
    with pytest.raises(TrainingError, match=r"nowhere\.invalid: .*(Name|name|resolution)"):
        prepare(tmp_path, "imagefolder:https://nowhere.invalid/a.tar.gz")


def test_an_untrusted_certificate_is_named_and_a_trusted_one_taken(tmp_path, server, monkeypatch):
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs openssl, to make a certificate")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    address = f"https://localhost:{server.server_port}/cifar.tar.gz"
    with pytest.raises(UserError, match=r"certificate of localhost is not valid .*SSL_CERT_FILE"):
        prepare(tmp_path / "data", f"imagefolder:{address}")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    whole(tmp_path / "data", address)


def test_credentials_reach_the_server_and_nothing_else(tmp_path, server, monkeypatch, capsys):
    address = server.url.replace("//", "//me:pass%20word@") + "?file=7&X-Amz-Signature=abcdef123&token=t0psecret"
    manifest = whole(tmp_path / "a", address)
    assert server.state.requests[0]["Authorization"] == "Basic bWU6cGFzcyB3b3Jk"
    server.state.status = 403
    with pytest.raises(UserError) as refused:
        prepare(tmp_path / "b", f"imagefolder:{address}")
    shown = f"{manifest} {capsys.readouterr().err} {refused.value}"
    for secret in ("pass%20word", "pass word", "abcdef123", "t0psecret", "me:"):
        assert secret not in shown
    assert manifest.source.startswith(f"imagefolder:{server.url}?"), "which file it was is part of what it is"
    renewed = address.replace("abcdef123", "fresh")
    assert public(renewed) == public(address) != public(address.replace("file=7", "file=8"))
    server.state.status = 200
    monkeypatch.setenv(remote.AUTHORIZATION, "Bearer abc")
    whole(tmp_path / "c", server.url)
    assert server.state.requests[-1]["Authorization"] == "Bearer abc"


def test_what_a_killed_process_left_is_removed(tmp_path, server):
    stray = tmp_path / f"{remote.PREFIX}dead"
    stray.write_bytes(b"half")
    whole(tmp_path, server.url)
    assert not stray.exists()


@pytest.fixture(scope="module")
def s3(archive):
    """A local server of the S3 protocol that asks for signatures, with the archive in a bucket; its environment."""
    pytest.importorskip("moto", reason="needs moto, in k8scifar's extra `dev`")
    s3fs = pytest.importorskip("s3fs", reason="needs s3fs, in k8scifar's extra `remote`")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    endpoint = f"http://127.0.0.1:{server._server.server_port}"
    environment = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    files = s3fs.S3FileSystem(key=KEY, secret=SECRET, endpoint_url=endpoint, client_kwargs={"region_name": "us-east-1"})
    files.call_s3("create_bucket", Bucket="pictures")
    files.pipe_file("pictures/sets/cifar.tar.gz", archive)
    yield SimpleNamespace(environment=environment, files=files)
    server.stop()


def test_s3_address_of_an_archive(tmp_path, s3, monkeypatch, capsys):
    for key, value in s3.environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(remote, "RANGE", 50_000)
    manifest = whole(tmp_path, "s3://pictures/sets/cifar.tar.gz")
    assert manifest.source == "imagefolder:s3://pictures/sets/cifar.tar.gz"
    assert SECRET not in capsys.readouterr().err


def test_s3_that_breaks_off_goes_on(tmp_path, s3, monkeypatch, archive):
    import s3fs

    for key, value in s3.environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(remote, "RANGE", 50_000)
    asked, real = [], s3fs.S3FileSystem.cat_file

    def broken(self, path, start=None, end=None, **options):
        asked.append(start)
        if len(asked) in (2, 3):
            raise ConnectionResetError("Connection reset by peer")
        return real(self, path, start=start, end=end, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "cat_file", broken)
    whole(tmp_path, "s3://pictures/sets/cifar.tar.gz")
    assert asked == [0, 50_000, 50_000, 50_000, *range(100_000, len(archive), 50_000)]


@pytest.mark.parametrize(
    ("address", "environment", "words"),
    [
        ("s3://pictures/other.tar.gz", {}, "no such bucket or file"),
        ("s3://nobucket/cifar.tar.gz", {}, "no such bucket or file"),
        ("s3://pictures/sets", {}, "is no archive but a folder"),
        ("s3://pictures/cifar.tar.gz", {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "no credentials"),
        ("nfs4x://host/a.tar.gz", {}, "is unknown"),
    ],
)
def test_s3_mistakes_are_one_line(tmp_path, s3, monkeypatch, address, environment, words):
    nowhere = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    for key, value in (s3.environment | nowhere | environment).items():
        monkeypatch.delenv(key, raising=False) if value is None else monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=words) as refused:
        prepare(tmp_path, f"imagefolder:{address}")
    assert SECRET not in str(refused.value) and "\n" not in str(refused.value)


def test_s3_denied(tmp_path, s3, monkeypatch):
    import s3fs

    async def forbidden(self, *_, **__):
        raise PermissionError("Forbidden")

    monkeypatch.setattr(s3fs.S3FileSystem, "_info", forbidden)
    with pytest.raises(UserError, match="access denied; check the credentials"):
        prepare(tmp_path, "imagefolder:s3://pictures/sets/cifar.tar.gz")


def test_a_missing_extra_says_what_to_install(tmp_path):
    (tmp_path / "s3fs.py").write_text("raise ImportError('Install s3fs')\n")
    done = cli(
        *("prepare", "--source", "imagefolder:s3://bucket/a.tar.gz", "--data-dir", str(tmp_path / "data")),
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "pip install 'k8scifar[remote]'" in done.stderr and "make image EXTRAS=remote" in done.stderr


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://host/a.tar.gz", "https://host/a.tar.gz"),
        ("https://host:8080/a.tar.gz", "https://host:8080/a.tar.gz"),
        ("https://host/a@b.tar", "https://host/a@b.tar"),
        ("https://me@host/a.tar", "https://host/a.tar"),
        ("https://me:pw@host/a.tar", "https://host/a.tar"),
        ("https://me:pw@[::1]:80/a.tar", "https://[::1]:80/a.tar"),
        ("https://me:p/ss@host/a.tar.gz", "https://host/a.tar.gz"),
        ("https://me:p@s/s@host/a.tar.gz", "https://host/a.tar.gz"),
        ("s3://key:se/cret@bucket/a", "s3://bucket/a"),
        ("https://me:p?ss@host/a.tar.gz", "https://host/a.tar.gz"),
        ("https://me:p#ss@host/a", "https://host/a"),
        ("https://me:p[ss@host/a", "https://host/a"),
        ("https://me:12/34@host/a", "https://host/a"),
        ("https://[host/a", "https://..."),
    ],
)
def test_what_is_shown_of_an_address_holds_no_part_of_a_password(address, shown):
    assert public(address) == shown


def test_an_address_with_one_slash_is_told_without_its_password(tmp_path):
    with pytest.raises(UserError, match="two slashes") as told:
        prepare(tmp_path, "imagefolder:https:/me:secret@host/a.tar")
    assert "secret" not in str(told.value)
