"""The cluster tools with a real kubectl, against a small server that answers as the Kubernetes API does."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from urllib.parse import parse_qs, urlsplit

import pytest
from cluster_stage import RUNNING, TOOLS, installed, pod

pytestmark = [
    pytest.mark.helm,
    pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl on PATH"),
]
GROUPS = {
    "": {"pods": "Pod", "services": "Service", "persistentvolumeclaims": "PersistentVolumeClaim", "events": "Event"},
    "apps": {"statefulsets": "StatefulSet", "deployments": "Deployment"},
    "batch": {"jobs": "Job"},
}


class Api(http.server.BaseHTTPRequestHandler):
    """Discovery, lists by label and by field, and logs."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        url = urlsplit(self.path)
        parts, query = url.path.strip("/").split("/"), parse_qs(url.query)
        self.server.asked.append(self.path)
        if url.path == "/api":
            return self.answer({"kind": "APIVersions", "versions": ["v1"]})
        if url.path == "/apis":
            groups = [self.group(name) for name in GROUPS if name]
            return self.answer({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
        group = "" if parts[0] == "api" else parts[1] if parts[0] == "apis" else "none"
        rest = parts[2:] if parts[0] == "api" else parts[3:]
        if group not in GROUPS:
            return self.answer({"kind": "Status", "status": "Failure", "code": 404, "message": "not here"}, code=404)
        if not rest:
            version = f"{group}/v1".lstrip("/")
            verbs = ["get", "list", "create", "delete", "watch"]
            found = [
                {"name": name, "singularName": kind.lower(), "kind": kind, "namespaced": True, "verbs": verbs}
                for name, kind in GROUPS[group].items()
            ]
            return self.answer({"kind": "APIResourceList", "groupVersion": version, "resources": found})
        if rest[-1:] == ["log"]:
            return self.answer("log of " + query["container"][0], "text/plain")
        if rest[0] == "namespaces" and len(rest) == 3 and rest[2] in GROUPS.get(group, {}):
            kind = GROUPS[group][rest[2]]
            items = [item for item in self.server.items if item["kind"] == kind and self.fits(item, query)]
            return self.answer({"kind": f"{kind}List", "apiVersion": f"{group}/v1".lstrip("/"), "items": items})
        if rest[0] == "namespaces" and len(rest) == 4:
            named = [item for item in self.server.items if item["metadata"]["name"] == rest[3]]
            return self.answer(next(item for item in named if item["kind"] == GROUPS[group][rest[2]]))
        raise AssertionError(f"kubectl asked for {self.path}")

    def fits(self, item, query):
        wanted = dict(pair.split("=") for pair in query.get("labelSelector", [""])[0].split(",") if pair)
        fields = dict(pair.split("=") for pair in query.get("fieldSelector", [""])[0].split(",") if pair)
        return wanted.items() <= item["metadata"].get("labels", {}).items() and fields.items() <= item.items()

    def group(self, name):
        version = {"groupVersion": f"{name}/v1", "version": "v1"}
        return {"name": name, "versions": [version], "preferredVersion": version}

    def answer(self, content, kind="application/json", code=200):
        body = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def tool(rendered, tmp_path):
    """Runs a tool against the server, which holds a release whose pod 1 waits for its data."""
    waiting = pod(rendered, "cifar-1", "trainer", RUNNING, "prepare")
    early = pod(rendered, "cifar-0", "trainer", {"waiting": {"reason": "ImagePullBackOff"}}, "preflight")
    event = {"kind": "Event", "apiVersion": "v1", "metadata": {"name": "e"}, "type": "Warning", "reason": "Failed"}
    event |= {"message": "no such image", "involvedObject": {"name": "cifar-0", "kind": "Pod"}}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api) as server:
        server.items = [*installed(rendered, early, waiting), event, event | {"type": "Normal", "message": "fine"}]
        server.asked = []
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        cluster = {"name": "here", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
        context = {"name": "here", "context": {"cluster": "here", "user": ""}}
        config = {"clusters": [cluster], "contexts": [context], "current-context": "here"}
        (tmp_path / "kubeconfig").write_text(json.dumps(config))
        environment = {"KUBECONFIG": str(tmp_path / "kubeconfig"), "PATH": os.environ["PATH"], "HOME": str(tmp_path)}

        def run(name: str, *words: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, str(TOOLS / f"{name}.py"), *words]
            return subprocess.run(
                command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
            )

        yield run
        server.shutdown()


def test_status_reads_what_kubectl_prints(tool):
    done = tool("cluster", "status")
    assert done.returncode == 0, done.stderr
    assert "pod cifar-0 on node-a: preflight ImagePullBackOff" in done.stdout
    assert "pod cifar-1 on node-a: prepare running" in done.stdout
    assert "warning: cifar-0: Failed: no such image" in done.stdout and "fine" not in done.stdout


def test_logs_of_pods_that_are_not_so_far(tool):
    done = tool("cluster", "logs")
    assert done.returncode == 0, done.stderr
    assert "log of preflight" in done.stdout and "log of prepare" in done.stdout


def test_no_such_release(tool):
    done = tool("cluster", "status", "--release=other", "--context=here")
    assert done.returncode == 2 and done.stderr.startswith("error: there is no release other in namespace default")
    done = tool("cluster", "status", "--context=nowhere")
    assert done.returncode == 2 and "no cluster answers" in done.stderr and len(done.stderr.splitlines()) == 1
