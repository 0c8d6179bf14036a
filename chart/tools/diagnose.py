"""Collect what a bug report needs into one archive, without secrets. `make diagnose` calls it.

Secret objects are never read. Texts are redacted three times: values of environment variables and of keys that sound
like secrets, by structure; the same values wherever they occur, as in `describe` and logs; whatever looks like a
password, a token or a key, by pattern.
"""

from __future__ import annotations

import contextlib
import html
import io
import json
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, unquote

import helm
from claims import claim_lines, machines, replacement_lines
from kube import ROOT, Kubectl, Release, ToolError, arguments, exit_code
from kube_objects import named
from pod_states import state_of

HIDDEN = "[left out]"
LINES = 2000  # of each log
SHORTEST = 4  # characters; a shorter value occurs in every text by chance
OWN = re.compile(r"^(POD_NAME|K8SCIFAR_(?!HTTP_AUTHORIZATION)\w*|AWS_(ENDPOINT_URL|DEFAULT_REGION|REGION))$")
# Parts of the names of secret settings; names of Secret objects are not secret.
WORDS = (
    r"password|passwd|passphrase|token|secret_?access_?key|access_?key(?:_?id)?|secret_?key|credential|authorization|"
    r"api_?-?key|private_?key|client_?secret"
)
SECRET_KEY = re.compile(WORDS, re.I)
NAMING_KEY = re.compile(r"(secretName|[a-z]Secret|automountServiceAccountToken|secretRef|secretKeyRef)$")
QUERY = r"sig|token|key|secret|pass|cred|auth|policy|expire"
# A value: up to the closing quote, else up to a space. Hiding too much is better than leaving a secret's end.
VALUE = r"""(?:\\*"(?:\\.|[^"\\\n])*|\\*'(?:\\.|[^'\\\n])*|(?!\[left out\])\S+)"""
PATTERNS = {
    # Up to the last @, because a password may contain @.
    "user:password@ of an address": (
        r"(\b[a-zA-Z][a-zA-Z0-9+.-]*:/{1,3})(?:[^\s:/]*:\S*|[^\s/]+)@",
        rf"\1{HIDDEN}@",
    ),
    "user:password@ without a scheme": (
        r"(?<![\w./:@%+-])[\w.%+-]+:[^\s:/][^\s:]*@(?=(?!sha\d)[\w.-]+:\d)",
        f"{HIDDEN}@",
    ),
    "signatures in an address": (rf"(?i)([?&;][^=&\s'\"]*(?:{QUERY})[^=&\s'\"]*=)[^&\s\"]+", rf"\1{HIDDEN}"),
    "Amazon's key ids": (r"\b(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{8,}\b", HIDDEN),
    "JSON web tokens": (r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{4,}(?:\.[A-Za-z0-9_-]*)?", HIDDEN),
    "headers": (r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{6,}", rf"\1 {HIDDEN}"),
    "whole headers": (
        r"(?im)\b((?:proxy-)?authorization|(?:set-)?cookie)(\s*:\s*)(?!\[left)[^\n\"]+",
        rf"\1\2{HIDDEN}",
    ),
    "settings": (rf"(?i)([\w.-]*(?:{WORDS})[\w.-]*\\*[\"']?\s*[=:]\s*){VALUE}", rf"\1{HIDDEN}"),
    "mount options": (rf"(?i)(?<![\w.-])(pass=){VALUE}", rf"\1{HIDDEN}"),
    "options of commands": (rf"(?i)(?<!\S)(--?[\w-]*(?:{WORDS})[\w-]*\s+)(?!-){VALUE}", rf"\1{HIDDEN}"),
    "private keys": (r"(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", HIDDEN),
}


def redact(text: str) -> str:
    """The text without what looks like a secret."""
    for pattern, instead in PATTERNS.values():
        text = re.sub(pattern, instead, text)
    return text


def without_secrets(node: Any, key: str = "") -> Any:
    """A JSON tree without environment values, data of Secrets, and values of keys that sound like secrets."""
    if isinstance(node, list):
        found = [without_secrets(item, key) for item in node]
        for before, (index, item) in zip(node, enumerate(node[1:], 1), strict=False):  # ["--token", "..."]
            if isinstance(before, str) and re.fullmatch(r"--?[\w-]+", before) and SECRET_KEY.search(before):
                found[index] = HIDDEN if isinstance(item, str) else found[index]
        return found
    if isinstance(node, dict):
        if node.get("kind") == "Secret":
            node = {name: value for name, value in node.items() if name not in ("data", "stringData")}
        if key in ("env", "extraEnv") and "value" in node and not OWN.match(str(node.get("name", ""))):
            node = node | {"value": HIDDEN}
        return {name: without_secrets(value, name) for name, value in node.items() if name != "managedFields"}
    if isinstance(node, str):
        if "last-applied-configuration" in key:  # the whole object as a string
            return HIDDEN
        if node and SECRET_KEY.search(key) and not NAMING_KEY.search(key):
            return HIDDEN
        if node[:1] in "{[" and node:  # JSON in a string, as in annotations
            with contextlib.suppress(ValueError, RecursionError):
                return json.dumps(without_secrets(json.loads(node)))
        return redact(node)
    return node


def settings(node: Any, key: str = "") -> set[str]:
    """The values of the user's environment variables in a JSON tree, except very short ones."""
    if isinstance(node, list):
        return set().union(*(settings(item, key) for item in node))
    if not isinstance(node, dict):
        return set()
    found = set().union(*(settings(value, name) for name, value in node.items()))
    if (
        key in ("env", "extraEnv")
        and not OWN.match(str(node.get("name", "")))
        and len(str(node.get("value", ""))) >= SHORTEST
    ):
        found.add(str(node["value"]))
    return found


def written(value: str) -> set[str]:
    """The forms in which a secret may occur in a text: a part of an address, encoded, quoted, line by line."""
    found = {value}
    _, mark, rest = value.partition("://")
    user, at, _ = rest.rpartition("@")
    if mark and at:
        found |= {user, user.partition(":")[2]}
    found |= {unquote(each) for each in found}
    found |= {line.strip() for line in value.splitlines()} if "\n" in value else set()
    found |= {form for each in found for form in (quote(each, safe=""), quote(each), quote_plus(each))}
    found |= {json.dumps(each, ensure_ascii=plain)[1:-1] for each in found for plain in (True, False)}
    found |= {repr(each)[1:-1] for each in found} | {html.escape(each) for each in found}
    return {each for each in found if len(each) >= SHORTEST}


class Archive:
    """Redacted texts in an open tar file; `hidden` are values that are left out everywhere."""

    def __init__(self, tar: tarfile.TarFile, folder: str, hidden: set[str]) -> None:
        self._tar, self._folder = tar, folder
        self._hidden = sorted(set().union(*map(written, hidden)), key=len, reverse=True)
        self.names: list[str] = []

    def add(self, name: str, text: str) -> None:
        """Add a text; JSON is redacted by structure, too."""
        try:
            text = json.dumps(without_secrets(json.loads(text)), indent=1)
        except ValueError:
            text = redact(text)
        for value in self._hidden:
            text = text.replace(value, HIDDEN)
        content = text.encode()
        entry = tarfile.TarInfo(f"{self._folder}/{name}")
        entry.size, entry.mtime = len(content), int(time.time())
        self._tar.addfile(entry, io.BytesIO(content))
        self.names.append(name)


def collect(release: Release, archive: Archive) -> None:
    """Add everything about a release; what fails leaves its error message in its place."""
    kubectl = release.kubectl

    def ask(name: str, *words: str) -> str:
        done = kubectl.run(*words, timeout=60)
        archive.add(name, done.stdout if done.returncode == 0 else f"{done.stdout}\n{done.stderr}")
        return done.stdout

    archive.add("versions.txt", versions(kubectl))
    ask("cluster/nodes.txt", "get", "nodes", "--output=wide")
    ask("cluster/nodes-description.txt", "describe", "nodes")
    ask("cluster/storage-classes.txt", "get", "storageclasses", "--output=wide")
    ask("cluster/volumes.json", "get", "persistentvolumes", "--output=json")
    chosen = f"--selector=app.kubernetes.io/instance={release.name}"
    kinds = "pods,statefulsets,jobs,deployments,services,endpoints,configmaps,networkpolicies,persistentvolumeclaims"
    ask("release/objects.json", "get", kinds, chosen, "--output=json")
    ask("release/description.txt", "describe", "pods,statefulsets,jobs,deployments,persistentvolumeclaims", chosen)
    ask("release/events.txt", "get", "events", "--sort-by=.metadata.creationTimestamp", "--output=wide")
    for name, *words in (
        ("values.json", "get", "values", release.name, "--output=json"),
        ("status.txt", "status", release.name),
        ("history.txt", "history", release.name),
    ):
        archive.add(f"release/helm-{name}", helm_output(kubectl, *words))
    for pod in release.pods():
        name = named(pod)
        for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]:
            each = ("logs", name, f"--container={container['name']}", f"--tail={LINES}", "--timestamps")
            ask(f"logs/{name}.{container['name']}.log", *each)
            before = kubectl.run(*each, "--previous", timeout=60)
            if before.returncode == 0:
                archive.add(f"logs/{name}.{container['name']}.previous.log", before.stdout)
    states = (f"{named(pod)}: {' '.join(state_of(pod))}\n" for pod in release.pods())
    archive.add("release/pods.txt", "".join(states))
    lines = [*replacement_lines(release, release.nodes(machines(release))), *claim_lines(release)]
    archive.add("release/claims.txt", "".join(f"{line.strip()}\n" for line in lines))
    reader = release.reader()
    if reader and (folder := release.run_dir(needed=False)):
        pod, container = reader
        inside = ("exec", pod, f"--container={container}", "--")
        ask("run/status.json", *inside, "k8scifar", "status", folder, "--json")
        ask("run/files.txt", *inside, "ls", "-laR", folder)
        ask("run/config.yaml", *inside, "cat", f"{folder}/config.yaml")
        ask("run/metrics.jsonl", *inside, "cat", f"{folder}/metrics.jsonl")
        # NCCL's last collectives before a time-out (torch's flight recorder): a pickle for each rank, sent as text.
        each = 'cd "$0/nccl" 2>/dev/null && for file in *; do echo "$file"; base64 "$file"; done'
        ask("run/nccl.txt", *inside, "sh", "-c", each, folder)
        ask("run/image.txt", *inside, "k8scifar", "--version")


def versions(kubectl: Kubectl) -> str:
    """The versions of the tools on this machine and of the cluster."""

    def output(*command: str) -> str:
        if not shutil.which(command[0]):
            return f"{command[0]}: not on PATH"
        done = subprocess.run(command, text=True, capture_output=True, errors="replace", timeout=60, cwd=ROOT)
        return f"$ {' '.join(command)}\n{(done.stdout + done.stderr).strip()}"

    package = (ROOT / "trainer/src/k8scifar/__init__.py").read_text()
    found = re.search(r'__version__ = "([^"]+)"', package)
    lines = [f"k8scifar {found[1] if found else '?'}", f"{platform.platform()}, Python {platform.python_version()}"]
    lines += [output("git", "describe", "--always", "--dirty"), output("helm", "version", "--short")]
    lines += [output(*kubectl.command("version", "--output=yaml", "--request-timeout=20s"))]
    lines += [output(tool, "version") for tool in ("kind", "k3d", "minikube", "docker") if shutil.which(tool)]
    return "\n\n".join(lines) + "\n"


def helm_output(kubectl: Kubectl, *words: str) -> str:
    """What Helm prints, without downloading it."""
    try:
        done = helm.run(*words, kubectl=kubectl, fetch=False)
    except ToolError as error:
        return str(error)
    return done.stdout if done.returncode == 0 else f"{done.stdout}\n{done.stderr}"


def main(words: list[str]) -> int:
    """Run the command line."""
    parser = arguments(__doc__)
    parser.add_argument("--folder", type=Path, default=Path("results"), help="folder of the archive")
    args = parser.parse_args(words)
    release = Release.find(args.release, Kubectl(args.namespace, args.context))
    name = f"diagnose-{args.release}-{time.strftime('%Y%m%d-%H%M%S')}"
    args.folder.mkdir(parents=True, exist_ok=True)
    path = args.folder / f"{name}.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        archive = Archive(tar, name, settings([*release.objects.values()]))
        collect(release, archive)
    print(f"{path}: {len(archive.names)} files, {path.stat().st_size / 1e3:.0f} kB; look through it before you send it")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
