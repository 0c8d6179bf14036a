"""The throw-away engine gives the machine's network back as it was; in a network namespace of its own."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import debian
import hosts
import pytest
from chart_helpers import ROOT
from patience import patient
from runs import HELPERS

pytestmark = pytest.mark.engine
ENGINE = ROOT / "image" / "tools" / "with-engine.sh"
# Of somebody else's: a policy, a chain of its own, rules beside docker's.
OTHERS = """
iptables -P FORWARD DROP; iptables -N MINE; iptables -A FORWARD -s 10.9.9.0/24 -j MINE
iptables -t nat -A POSTROUTING -s 10.9.9.0/24 -j MASQUERADE; ip6tables -A INPUT -s fd00::/8 -j ACCEPT
"""
BRIDGE = "ip link add docker0 type bridge; ip addr add 172.31.0.1/16 dev docker0; ip link set docker0 up"
# Runs "$@" with the links of the namespace $0 in /sys, where a test of another engine may have a docker0.
AMID = """
folder=$(mktemp --directory)
nsenter --net="/run/netns/$0" mount --types sysfs sysfs "$folder"
for part in class/net devices/virtual/net; do mount --bind "$folder/$part" "/sys/$part"; done
umount "$folder"
rmdir "$folder"
exec "$@"
"""


@pytest.fixture
def space(tmp_path):
    """``space(script)`` runs a script in a fresh network; skips where an engine answers, or none can be started."""
    hosts.require()
    if shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True).returncode == 0:
        pytest.skip("an engine answers already: nothing is started")
    if not (shutil.which("dockerd") and shutil.which("iptables")):
        if not debian.may_install():
            pytest.skip("needs dockerd and iptables; K8SCIFAR_INSTALL=1 installs them")
        debian.install("docker.io", "iptables")
    name = f"k8scifar-{os.getpid()}-engine"
    around = f"{name}-around"
    for space in (name, around):
        subprocess.run(["ip", "netns", "add", space], check=True)
    subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
    subprocess.run(["ip", "-n", around, "link", "add", "docker0", "type", "bridge"], check=True)
    # `ip netns exec` would hide the control groups.
    within = ["unshare", "--mount", "sh", "-ec", AMID, around, "nsenter", f"--net=/run/netns/{name}"]

    def run(script: str, **options) -> subprocess.Popen:
        return subprocess.Popen(
            [*within, "sh", "-ec", script], stdout=subprocess.PIPE, text=True, cwd=tmp_path, **options
        )

    yield run
    for space in (name, around):
        subprocess.run(["ip", "netns", "delete", space], check=True)


def rules(space) -> list[str]:
    """Chains, rules and policies of both families, without counters; and whether packets are forwarded."""
    script = "iptables-save; ip6tables-save; cat /proc/sys/net/ipv4/ip_forward; ip -brief link"
    said = space(script).communicate(timeout=60)[0]
    lines = [
        re.sub(r" \[\d+:\d+\]", "", line) for line in said.splitlines() if line[0] not in "#*" and line != "COMMIT"
    ]
    return [line for line in lines if not re.fullmatch(r":\w+ ACCEPT", line)]  # a table that is there, and empty


@pytest.mark.parametrize("others", [OTHERS, BRIDGE, "true"])
@pytest.mark.parametrize("stopped", [False, True])
def test_nothing_of_dockers_stays(space, others, stopped):
    space(others).communicate(timeout=60)
    before = rules(space)
    assert (":FORWARD DROP" in before) is (others == OTHERS)
    inside = "docker network create x >/dev/null; iptables-save; echo begun; cat"
    process = space(f"exec {ENGINE} sh -c '{inside}'", stdin=subprocess.PIPE)
    seen = []
    while (line := process.stdout.readline()) not in ("", "begun\n"):
        seen.append(line)
    assert "-A FORWARD -j DOCKER-USER\n" in seen and any("br-" in line for line in seen), seen
    if stopped:
        process.send_signal(signal.SIGTERM)
    process.stdin.close()
    assert process.wait(timeout=120) == (143 if stopped else 0)
    assert rules(space) == before


@pytest.mark.parametrize("runs", ["cat", "sleep 600"])  # with its input, or not by itself
def test_the_engine_ends_with_a_killed_runner(space, runs):
    """The janitor asks it to end, and leaves its parts alone until it has cleaned up."""
    before = rules(space)
    script = (
        "import subprocess, sys; sys.path.insert(0, sys.argv[1]); import janitor; janitor.start()\n"
        "engine = subprocess.Popen([sys.argv[2], 'sh', '-c', 'echo begun; ' + sys.argv[3]], stdin=subprocess.PIPE)\n"
        "engine.wait()"
    )
    command = f"exec {sys.executable} -c {shlex.quote(script)} {HELPERS} {ENGINE} {shlex.quote(runs)}"
    with tempfile.TemporaryDirectory(prefix="k8scifar-", ignore_cleanup_errors=True) as folder:
        runner = space(command, env=os.environ | {"TMPDIR": folder})
        assert runner.stdout.readline() == "begun\n"
        assert os.listdir(folder) and rules(space) != before
        runner.kill()
        end = time.monotonic() + patient(100)
        while rules(space) != before or os.listdir(folder):
            assert time.monotonic() < end, rules(space)
            time.sleep(0.2)
