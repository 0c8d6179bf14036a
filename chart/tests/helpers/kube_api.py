"""A small server that answers a real kubectl as the Kubernetes API does, and a way to run the tools on it.

kubectl and Helm are real; no controller is, nor the API's admission: what it answers is written by hand.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from cluster_stage import TOOLS

SHORT = {"persistentvolumeclaims": ["pvc"], "persistentvolumes": ["pv"], "services": ["svc"]}
CLUSTER_WIDE = ("Node", "PersistentVolume")
GROUPS = {
    "": {
        "pods": "Pod",
        "services": "Service",
        "persistentvolumeclaims": "PersistentVolumeClaim",
        "persistentvolumes": "PersistentVolume",
        "events": "Event",
        "nodes": "Node",
        "configmaps": "ConfigMap",
    },
    "apps": {"statefulsets": "StatefulSet", "deployments": "Deployment"},
    "batch": {"jobs": "Job"},
    "networking.k8s.io": {"networkpolicies": "NetworkPolicy"},
}


class Api(http.server.BaseHTTPRequestHandler):
    """Discovery, lists by label and by field, and logs."""

    protocol_version = "HTTP/1.1"
    groups = GROUPS

    def do_GET(self):
        url = urlsplit(self.path)
        parts, query = url.path.strip("/").split("/"), parse_qs(url.query)
        self.server.asked.append(self.path)
        if refused := self.server.refuse(url.path):
            code, reason, message = refused
            failure = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason}
            return self.answer(failure | {"code": code, "message": message}, code=code)
        if url.path == "/version":
            return self.answer({"major": "1", "minor": "36", "gitVersion": "v1.36.0"})
        if url.path == "/api":
            return self.answer({"kind": "APIVersions", "versions": ["v1"]})
        if url.path == "/apis":
            groups = [self.group(name) for name in self.groups if name]
            return self.answer({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
        group = "" if parts[0] == "api" else parts[1] if parts[0] == "apis" else "none"
        rest = parts[2:] if parts[0] == "api" else parts[3:]
        if group not in self.groups:
            return self.answer({"kind": "Status", "status": "Failure", "code": 404, "message": "not here"}, code=404)
        if not rest:
            version = f"{group}/v1".lstrip("/")
            verbs = ["get", "list", "create", "delete", "watch"]
            found = [
                {"name": name, "singularName": kind.lower(), "kind": kind, "verbs": verbs}
                | {"namespaced": kind not in CLUSTER_WIDE, "shortNames": SHORT.get(name, [])}
                for name, kind in self.groups[group].items()
            ]
            return self.answer({"kind": "APIResourceList", "groupVersion": version, "resources": found})
        if rest[-1:] == ["log"]:
            name = query["container"][0]
            if name in self.server.waiting:
                status = {
                    "kind": "Status",
                    "apiVersion": "v1",
                    "status": "Failure",
                    "message": self.server.waiting[name],
                }
                return self.answer(status, code=400)
            return self.answer("log of " + name, "text/plain")
        if rest[0] == "namespaces" and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
        else:
            namespace = ""
        kind = self.groups[group][rest[0]]
        items = [item for item in self.server.items if item["kind"] == kind and self.fits(item, query, namespace)]
        if len(rest) == 1:
            return self.answer({"kind": f"{kind}List", "apiVersion": f"{group}/v1".lstrip("/"), "items": items})
        if found := [item for item in items if item["metadata"]["name"] == rest[1]]:
            return self.answer(found[0])
        return self.missing()

    def missing(self):
        found = {"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404, "message": "not found"}
        return self.answer(found, code=404)

    def do_POST(self):
        failure = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Forbidden", "code": 403}
        self.answer(failure | {"message": "only reading"}, code=403)

    def fits(self, item, query, namespace):
        if namespace and item["metadata"].get("namespace", "default") != namespace:
            return False
        wanted = dict(pair.split("=") for pair in query.get("labelSelector", [""])[0].split(",") if pair)
        fields = dict(pair.split("=") for pair in query.get("fieldSelector", [""])[0].split(",") if pair)
        return wanted.items() <= item["metadata"].get("labels", {}).items() and fields.items() <= item.items()

    def group(self, name):
        version = {"groupVersion": f"{name}/v1", "version": "v1"}
        return {"name": name, "versions": [version], "preferredVersion": version}

    def answer(self, content, kind="application/json", code=200):
        text = content if isinstance(content, (str, bytes)) else json.dumps(content)
        body = text.encode() if isinstance(text, str) else text
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Cluster:
    """The server's objects, what it refuses, and a tool's environment."""

    def __init__(self, server: http.server.ThreadingHTTPServer, folder: Path) -> None:
        self._server, self.folder = server, folder
        server.items, server.asked, server.secrets, server.refuse = [], [], {}, lambda path: None
        server.waiting = {}
        cluster = {"name": "here", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
        self.config = {"clusters": [cluster], "contexts": [], "current-context": "here"}
        self.config["contexts"].append({"name": "here", "context": {"cluster": "here", "user": ""}})
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "KUBECONFIG": str(folder / "kubeconfig")}

    @property
    def items(self) -> list[dict]:
        """The objects of the cluster."""
        return self._server.items

    @items.setter
    def items(self, items: list[dict]) -> None:
        self._server.items = items

    def refuse(self, code: int, reason: str, message: str, where: str = "") -> None:
        """Answer each path that holds `where` so."""
        self._server.refuse = lambda path: (code, reason, message) if where in path else None

    def refuse_log(self, container: str, message: str) -> None:
        """Answer that a container has no log yet."""
        self._server.waiting[container] = message

    def command(self, name: str, *words: str) -> list[str]:
        """The command line of a tool; writes the kubeconfig."""
        (self.folder / "kubeconfig").write_text(json.dumps(self.config))
        return [sys.executable, str(TOOLS / f"{name}.py"), *words]

    def run(self, name: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a tool to its end."""
        return self.call(self.command(name, *words))

    def call(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """Run a command against the server to its end."""
        (self.folder / "kubeconfig").write_text(json.dumps(self.config))
        options = {"env": self.environment, "cwd": self.folder, "capture_output": True, "text": True, "timeout": 120}
        return subprocess.run(command, **options)


@contextlib.contextmanager
def serving(folder: Path, api: type[Api] = Api) -> Iterator[Cluster]:
    """A server without objects, on a free port."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), api) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield Cluster(server, folder)
        server.shutdown()
