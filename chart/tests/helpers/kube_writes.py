"""kube_api's server, which keeps what is written too: enough for a real Helm to install, upgrade and uninstall.

Helm writes its own Secrets as protobuf, whatever it is offered; those are kept as they come, the rest as JSON.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import kube_api
import yaml

GROUPS = kube_api.GROUPS | {"": kube_api.GROUPS[""] | {"secrets": "Secret"}}
PROTOBUF, MAGIC = "application/vnd.kubernetes.protobuf", b"k8s\0"
METADATA, NAME, LABELS = 1, 1, 11  # fields of a Secret and of its metadata
SENT, LISTED = 2, 2  # fields: what an envelope holds; the items of a list


class Api(kube_api.Api):
    """Objects of any kind that the chart renders, and Helm's Secrets."""

    groups = GROUPS
    numbers = itertools.count(1)

    def do_GET(self):
        url = urlsplit(self.path)
        if url.path.startswith("/openapi/v3"):
            return self.answer(schema(url.path.removeprefix("/openapi/v3").strip("/")))
        kind, name = self.named()
        if kind != "Secret" or not self.server.secrets:
            return super().do_GET()
        wanted = dict(pair.split("=") for pair in parse_qs(url.query).get("labelSelector", [""])[0].split(",") if pair)
        found = [each for own, each in self.server.secrets.items() if name in ("", own) and fits(each, wanted)]
        if not name:
            return self.reply("SecretList", b"".join(packed(LISTED, each) for each in found))
        return self.reply("Secret", found[0]) if found else self.missing()

    def do_POST(self):
        kind, name = self.named()
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        if kind == "Secret":
            secret = dict(fields(sent[len(MAGIC) :]))[SENT]
            self.server.secrets[name or dict(fields(dict(fields(secret))[METADATA]))[NAME].decode()] = secret
            return self.reply("Secret", secret)
        item = yaml.safe_load(sent)
        number = str(next(self.numbers))
        item["metadata"] |= {"uid": number, "resourceVersion": number, "creationTimestamp": "2026-01-01T00:00:00Z"}
        self.drop(kind, item["metadata"]["name"])
        self.server.items.append(item)
        self.answer(item)

    do_PUT = do_PATCH = do_POST

    def do_DELETE(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind, name = self.named()
        self.server.secrets.pop(name, None)
        self.drop(kind, name)
        self.answer({"kind": "Status", "apiVersion": "v1", "status": "Success"})

    def drop(self, kind, name):
        items = self.server.items
        items[:] = [item for item in items if (item["kind"], item["metadata"]["name"]) != (kind, name)]

    def named(self):
        """Kind and name that a path is about; empty where it is about none."""
        parts = [*urlsplit(self.path).path.strip("/").split("/"), "", "", "", ""]
        group, rest = ("", parts[2:]) if parts[0] == "api" else (parts[1], parts[3:])
        rest = rest[2:] if rest[0] == "namespaces" and rest[2] else rest
        return GROUPS.get(group, {}).get(rest[0], ""), rest[1]

    def reply(self, kind, content):
        """Answer with protobuf in its envelope."""
        about = packed(1, packed(1, b"v1") + packed(2, kind.encode()))
        self.answer((MAGIC + about + packed(SENT, content)), PROTOBUF)


def schema(name: str) -> dict:
    """As much of OpenAPI as says that the server itself looks at the fields of what is written."""
    if not name:
        paths = [f"apis/{group}/v1" if group else "api/v1" for group in GROUPS]
        return {"paths": {path: {"serverRelativeURL": f"/openapi/v3/{path}?hash=x"} for path in paths}}
    group = name.split("/")[1] if name.startswith("apis/") else ""
    found = {}
    for plural, kind in GROUPS[group].items():
        about = {"x-kubernetes-group-version-kind": {"group": group, "version": "v1", "kind": kind}}
        patch = about | {"parameters": [{"name": "fieldValidation", "in": "query"}], "responses": {}}
        found[f"/{name}/{plural}"] = {"patch": patch}
    return {"openapi": "3.0.0", "info": {"title": "Kubernetes", "version": "v1"}, "paths": found}


def fits(secret: bytes, wanted: dict[str, str]) -> bool:
    """Whether a Secret has these labels."""
    entries = [dict(fields(each)) for number, each in fields(dict(fields(secret))[METADATA]) if number == LABELS]
    return wanted.items() <= {entry[1].decode(): entry[2].decode() for entry in entries}.items()


def fields(text: bytes) -> Iterator[tuple[int, bytes]]:
    """The fields of a protobuf message that have a length: number and content."""
    place = 0

    def number() -> int:
        nonlocal place
        found = shift = 0
        while True:
            byte, place = text[place], place + 1
            found |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return found

    while place < len(text):
        key, size = number(), number()  # a plain number is its own size
        if key & 7 == 2:
            yield key >> 3, text[place : place + size]
            place += size


def packed(number: int, content: bytes) -> bytes:
    """A field of a protobuf message that has a length."""
    size, length = len(content), b""
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


@contextlib.contextmanager
def keeping(folder: Path) -> Iterator[kube_api.Cluster]:
    """A server without objects, on a free port."""
    with kube_api.serving(folder, Api) as cluster:
        yield cluster
