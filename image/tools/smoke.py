"""Runs the built image as the pods will: two hardened containers on a private network train together by DDP.

First to the end (accuracy, evaluation and TensorBoard included), then stopped by SIGTERM in the middle. `make
image-smoke` calls it; it needs docker or podman, and leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import image

STOPPED = 3  # exit code of a training that SIGTERM ended and that has saved
GRACE = 30  # seconds from SIGTERM to SIGKILL: what Kubernetes gives by default
LIMIT = 240  # seconds one training may take
# As small as training gets: ten steps an epoch.
DATA = "synthetic:320:100"
SETTINGS = ("global_batch=32", "micro_batch=16", "hardware.threads=1", "log.every_seconds=0.1")


class Smoke:
    """The engine's resources of one smoke run, all under one prefix."""

    def __init__(self, tool: str) -> None:
        self.tool = tool
        self.name = image.name()
        self.prefix = f"k8scifar-smoke-{os.getpid()}"
        self.containers: list[str] = []

    def __enter__(self) -> Smoke:
        # No way out of this network: training must need none.
        self.engine("network", "create", "--internal", self.prefix)
        for volume in ("data", "runs"):
            self.engine("volume", "create", f"{self.prefix}-{volume}")
        return self

    def __exit__(self, *_: object) -> None:
        for container in self.containers:
            self.engine("rm", "--force", container, check=False)
        for volume in ("data", "runs"):
            self.engine("volume", "rm", f"{self.prefix}-{volume}", check=False)
        self.engine("network", "rm", self.prefix, check=False)

    def engine(self, *arguments: str, check: bool = True) -> str:
        """Run the engine; returns its output, of both kinds."""
        done = subprocess.run([self.tool, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if check and done.returncode:
            raise image.ImageError(f"{self.tool} {arguments[0]} failed: {done.stdout.strip()[-2000:]}")
        return done.stdout.strip()

    def start(self, name: str, *command: str, entrypoint: str = "", detach: bool = False) -> str:
        """Run a container as the chart's pods are: read-only, without privileges, with limits."""
        hardened = ("--read-only", "--user=1000:1000", "--cap-drop=ALL", "--security-opt=no-new-privileges",
                    "--memory=2g", "--shm-size=64m", "--tmpfs=/tmp", f"--network={self.prefix}")  # fmt: skip
        volumes = [f"--volume={self.prefix}-{volume}:/{volume}" for volume in ("data", "runs")]
        options = [*hardened, *volumes, f"--name={name}", f"--hostname={name}"]
        options += [f"--entrypoint={entrypoint}"] if entrypoint else []
        if detach:
            self.containers.append(name)
        return self.engine("run", "--detach" if detach else "--rm", *options, self.name, *command)

    def once(self, *command: str, entrypoint: str = "") -> str:
        return self.start(f"{self.prefix}-once", *command, entrypoint=entrypoint)

    def train(self, run: str, *settings: str) -> list[str]:
        """Start both nodes; each takes its rank from the number that ends its host name, as a pod does."""
        nodes = [f"{self.prefix}-{run}-{rank}" for rank in (0, 1)]
        options = [f"--set={setting}" for setting in (*SETTINGS, *settings)]
        for node in nodes:
            self.start(node, "launch", "--nnodes=2", "--nproc-per-node=1", f"--master-addr={nodes[0]}",
                       "--recipe=quick", "--data-dir=/data", "--runs-dir=/runs", f"--name={run}", *options,
                       detach=True)  # fmt: skip
        return nodes

    def logs(self, node: str) -> str:
        return self.engine("logs", "--timestamps", node)

    def state(self, node: str, field: str) -> str:
        return self.engine("inspect", "--format", f"{{{{.State.{field}}}}}", node)

    def first_step(self, node: str) -> float:
        """Wait for the first training step; seconds since the container's start."""
        end = time.monotonic() + LIMIT
        while time.monotonic() < end:
            for line in self.logs(node).splitlines():
                if " step " in line and "loss" in line:
                    return moment(line.split(" ", 1)[0]) - moment(self.state(node, "StartedAt"))
            if self.state(node, "Running") != "true":
                break
            time.sleep(0.5)
        raise image.ImageError(f"no training step in {node}:\n{self.logs(node)}")

    def wait(self, nodes: list[str], expected: int) -> None:
        """Wait for both nodes to exit with the code that is expected."""
        end = time.monotonic() + LIMIT
        while any(self.state(node, "Running") == "true" for node in nodes):
            if time.monotonic() > end:
                raise image.ImageError(f"{nodes[0]} still runs after {LIMIT} s:\n{self.logs(nodes[0])}")
            time.sleep(0.5)
        for node in nodes:
            code = int(self.state(node, "ExitCode"))
            if code != expected:
                raise image.ImageError(f"{node} exited with {code}, not {expected}:\n{self.logs(node)}")


def moment(text: str) -> float:
    """Seconds since 1970 of a time as engines write it, with nine digits of a second and any zone."""
    text = text.strip()
    if " " in text:  # podman: 2026-01-31 12:00:00.123456789 +0000 UTC
        text = "T".join(text.split()[:2]) + text.split()[2]
    text = text.replace("Z", "+0000")
    head, zone = text[:19], text[-5:] if text[-3] != ":" else text[-6:].replace(":", "")
    fraction = text[19:-5].split("+")[0].split("-")[0] if "." in text else ".0"
    return datetime.strptime(head + zone, "%Y-%m-%dT%H:%M:%S%z").timestamp() + float(f"0{fraction}")


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise image.ImageError(what)
    print(f"  ok: {what}", flush=True)


def hardening(smoke: Smoke, node: str) -> None:
    """The container is as locked as a restricted pod, and tini is its first process."""
    script = "cat /proc/1/comm; grep -E '^(Uid|CapEff|NoNewPrivs)' /proc/1/status; touch /x 2>&1; df -m /dev/shm"
    seen = smoke.engine("exec", node, "sh", "-c", script)
    expect(seen.startswith("tini"), "tini is process 1")
    expect("Uid:\t1000" in seen and "CapEff:\t0000000000000000" in seen and "NoNewPrivs:\t1" in seen,
           "user 1000, no capabilities, no new privileges")  # fmt: skip
    expect("Read-only file system" in seen, "the root file system is read-only")
    expect(" 64 " in seen, "/dev/shm has 64 MB")


def trains_to_the_end(smoke: Smoke) -> None:
    nodes = smoke.train("end", "epochs=1")
    seconds = smoke.first_step(nodes[0])
    print(f"  container start to first training step: {seconds:.1f} s", flush=True)
    hardening(smoke, nodes[0])
    smoke.wait(nodes, 0)
    expect(True, "both nodes exit with 0")
    summary = json.loads(smoke.once("/runs/end/summary.json", entrypoint="cat"))
    expect(summary["world_size"] == 2, "two ranks trained together")
    expect(0 <= summary["accuracy"] <= 1, f"the summary has the accuracy, {summary['accuracy']:.1%}")
    again = smoke.once("evaluate", "/runs/end", "--data-dir=/data", "--json")
    accuracy = json.loads(again[again.index("{") : again.rindex("}") + 1])["accuracy"]
    expect(abs(accuracy - summary["accuracy"]) < 0.02, f"`evaluate` finds the same accuracy, {accuracy:.1%}")


def serves_tensorboard(smoke: Smoke) -> None:
    node = f"{smoke.prefix}-tensorboard"
    smoke.start(node, "--", "tensorboard", "--logdir=/runs", "--port=6006", entrypoint="tini", detach=True)
    fetch = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:6006/data/runs', timeout=5).read().decode())"
    answer, end = "", time.monotonic() + 60
    while '"end"' not in answer:
        if time.monotonic() > end or smoke.state(node, "Running") != "true":
            raise image.ImageError(f"TensorBoard shows no run: {answer}\n{smoke.logs(node)}")
        time.sleep(1)
        answer = smoke.engine("exec", node, "python", "-c", fetch, check=False).rpartition("\n")[2]
    expect(True, f"TensorBoard lists the run: {answer}")
    smoke.engine("rm", "--force", node)


def stops_in_time(smoke: Smoke) -> None:
    nodes = smoke.train("stop", "epochs=500")
    smoke.first_step(nodes[0])
    started = time.monotonic()
    smoke.engine("stop", f"--time={GRACE}", *nodes)
    seconds = time.monotonic() - started
    smoke.wait(nodes, STOPPED)
    expect(seconds < GRACE, f"SIGTERM ends both nodes in {seconds:.1f} s (of {GRACE}) with exit code {STOPPED}")
    listing = smoke.once("-R", "/runs/stop", entrypoint="ls")
    expect(".pt" in listing, "a checkpoint is there to resume from")


def main() -> int:
    try:
        tool = image.engine(needs_run=True)
        image.must_exist(tool)
        print(f"{image.name()} with {tool}", flush=True)
        with Smoke(tool) as smoke:
            smoke.once("prepare", f"--source={DATA}", "--data-dir=/data")
            trains_to_the_end(smoke)
            serves_tensorboard(smoke)
            stops_in_time(smoke)
    except image.ImageError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    print("smoke run passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
