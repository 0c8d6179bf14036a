"""The loop around torchrun: start it, watch it, start it again when a peer was lost, and end for good reasons only.

It never imports torch. A fault of a peer costs one attempt and a short pause that does not grow, and never this
process: in a pod the container goes on, so that the kubelet's crash back-off has nothing to grow from.
"""

from __future__ import annotations

import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

from k8scifar.console import say
from k8scifar.errors import FAILED, PREEMPTED, USER_MISTAKE
from k8scifar.heartbeat import Heartbeat
from k8scifar.launch import kubernetes, processes, sockets
from k8scifar.launch.node import NodeSpec
from k8scifar.launch.termination import leave_message
from k8scifar.results import notes
from k8scifar.results.summary import MARKER, finished_summary, read_summary

POLL = 0.1  # seconds between two looks at the child
SILENCE = 10.0  # seconds, at least, without a sign of life after which torchrun is taken for frozen
LINGER = 5.0  # seconds that torchrun gets to end by itself after its ranks have
HOLD = 10.0  # seconds between two heartbeats once training is done


class Supervisor:
    """Runs one node's part of the job to its end; `run` returns the process's exit code."""

    def __init__(self, spec: NodeSpec) -> None:
        self.spec = spec
        self.signals = 0
        self.reason = ""
        self.heartbeat = Heartbeat(spec.environment.get("K8SCIFAR_HEARTBEAT"))
        self._next: dict[str, float] = {}

    def run(self) -> int:
        """Attempt after attempt until training is done, a person is needed, or a signal says stop."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        processes.adopt_orphans()
        attempts = 0
        while not self.signals:
            if self.spec.nnodes > 1 and self._is_finished():
                return self._after_done()
            if not self._wait_until(self._master_resolves, self._unresolved()) or not self._port_ready():
                say(f"k8scifar: error: {self.reason}")
                if not self.spec.restart:
                    return self._end(USER_MISTAKE)
                self._note(self.reason)
                self._journal("failed", attempts)
                continue  # what is missing may still come, and this container must not end for it
            if self.signals:
                break
            attempts += 1
            self._journal("waiting", attempts)
            code = self._attempt(attempts)
            if self.signals:
                return self._stopped(code)
            if code == 0:
                return self._after_done()
            if code == USER_MISTAKE or not self.spec.restart:
                return self._end(code)
            self._journal("failed", attempts)
            pause = self.spec.pause * random.uniform(0.5, 1.5)
            self._note(self.reason)
            reason = self.reason or "a peer was lost"
            say(f"k8scifar: attempt {attempts} ended ({reason}); the next starts in {pause:.1f} s")
            self._sleep(pause)
        return self._stopped(PREEMPTED)

    # Before an attempt

    def _unresolved(self) -> str:
        name = self.spec.master_addr
        return f"the name {name} does not resolve; is node 0 scheduled, and does its headless Service exist?"

    def _master_resolves(self) -> bool:
        return self.spec.nnodes == 1 or bool(sockets.resolve(self.spec.master_addr))

    def _port_ready(self) -> bool:
        spec = self.spec
        if spec.node_rank or spec.master_port is None:
            return True
        text = f"port {spec.master_port} of this machine is in use; end what holds it or choose another --master-port"
        if not spec.restart and not sockets.port_is_free(spec.master_port):
            self.reason = text
            return False
        return self._wait_until(lambda: sockets.port_is_free(spec.master_port), text)

    def _wait_until(self, ready, otherwise: str) -> bool:
        """Wait at most `spec.wait` seconds; False, and `otherwise` as the reason, if it did not come."""
        start = time.monotonic()
        while not self.signals:
            self.heartbeat.touch()
            if ready():
                return True
            waited = time.monotonic() - start
            if waited > self.spec.wait:
                self.reason = f"{otherwise} (waited {waited:.0f} s)"
                return False
            if waited > 5 and self._due("wait", 30):
                say(f"k8scifar: waiting: {otherwise} ({waited:.0f} of {self.spec.wait:.0f} s)")
            self._sleep(0.5)
        return True

    # One attempt

    def _attempt(self, number: int = 0) -> int:
        """One run of torchrun. No process of it is left afterwards."""
        self.reason = ""
        scratch = Path(tempfile.mkdtemp(prefix="k8scifar-"))
        child = processes.Child(
            self.spec.command(self.spec.master_port or sockets.free_port()), self.spec.child_environment(scratch)
        )
        try:
            self._watch(child, scratch, number)
        finally:
            child.kill_tree()
            code = self._judge(child.code, scratch)
            shutil.rmtree(scratch, ignore_errors=True)
        return code

    def _watch(self, child: processes.Child, scratch: Path, number: int = 0) -> None:
        """Return when torchrun has ended, or should be ended by force."""
        begun = started_at = time.monotonic()
        deadline, told = None, 0
        life, changed_at, silence = 0, begun, max(self.spec.config.distributed.timeout_seconds, SILENCE)
        self._next.clear()
        self.heartbeat.touch()
        while child.poll() is None:
            now = time.monotonic()
            if self.signals > told:
                told = self.signals
                child.signal(signal.SIGTERM)
                deadline = now + (self.spec.shutdown_timeout + LINGER if told == 1 else 0.0)
            elif not self.signals and deadline is None and (codes := self._exit_codes(scratch)):
                if any(codes) or (len(codes) == self.spec.nproc_per_node and self.spec.node_rank == 0):
                    deadline = now + LINGER
                elif len(codes) == self.spec.nproc_per_node:
                    deadline = now + self.spec.wait  # torchrun waits here until node 0 has written the last files
            if deadline is not None and now >= deadline:
                return
            if (seen := _modified(scratch / "alive")) != life:
                life, changed_at = seen, now
            elif life and now - changed_at > silence:
                self.reason = f"torchrun has shown no sign of life for {silence:.0f} s: frozen"
                return
            joined = any(scratch.glob("started.*"))
            started_at = started_at if joined else now
            if joined and self._due("joined", 86400 * 365):
                self._journal("training", number)
            if now - started_at < self.spec.first_step and self._due("heartbeat", 5):
                self.heartbeat.touch_unless_others()
            if not joined and self.spec.nnodes > 1 and self._due("finished", 5) and self._is_finished():
                return
            if not joined and now - begun > 20 and self._due("waiting", 30):
                where = f"{self.spec.master_addr}:{self.spec.master_port}"
                say(f"k8scifar: waiting for all {self.spec.nnodes} nodes to meet at {where} ({now - begun:.0f} s)")
            time.sleep(POLL)

    @staticmethod
    def _exit_codes(scratch: Path) -> list[int]:
        texts = [path.read_text() for path in sorted(scratch.glob("exit.*"))]
        return [int(text) for text in texts if text]

    def _judge(self, code: int | None, scratch: Path) -> int:
        """The attempt's exit code, from torchrun's own and those that the ranks left."""
        codes, ranks = self._exit_codes(scratch), self.spec.nproc_per_node
        reasons = sorted(scratch.glob("reason.*"), key=lambda path: path.stat().st_mtime)
        mistakes = [path for path in reasons if _read(path.with_name(f"exit{path.suffix}")) == str(USER_MISTAKE)]
        for path in mistakes or reasons:
            self.reason = self.reason or _read(path)
        if self.spec.nnodes > 1 and not codes and not self.signals and self._is_finished():
            return 0
        if len(codes) == ranks and not any(codes):
            return 0 if self._marked() else FAILED
        if USER_MISTAKE in codes or code == USER_MISTAKE:
            return USER_MISTAKE
        saved = len(codes) == ranks and set(codes) <= {0, PREEMPTED}
        if saved or (self.signals and not any(scratch.glob("started.*"))):
            self.reason = self.reason or "training was told to stop and has saved"
            return PREEMPTED
        return FAILED

    def _marked(self) -> bool:
        """Whether rank 0's marker is there too; without it rank 0 will need this node again."""
        if self.spec.node_rank == 0 or not self.spec.config.run_dir.is_dir():
            return True  # rank 0 has written it, or the run folder is on another machine
        end = time.monotonic() + 10  # a file shows late on another NFS client
        while not self.signals and time.monotonic() < end:
            if finished_summary(self.spec.config):
                return True
            self.heartbeat.touch()
            self._sleep(1.0)
        self.reason = f"this node's ranks are done, but rank 0 has left no {MARKER}"
        return bool(self.signals)

    # The end

    def _is_finished(self) -> bool:
        return finished_summary(self.spec.config) is not None

    def _after_done(self) -> int:
        self._note("done")
        self._journal("done")
        if self.spec.when_done == "exit":
            return 0
        if self.spec.when_done == "scale-down" and self.spec.node_rank == 0:
            name = self.spec.environment.get("K8SCIFAR_STATEFULSET", "")
            problem = kubernetes.scale_down(name, self._sleep)
            done = f"could not scale down: {problem}" if problem else f"StatefulSet {name} is scaled to zero"
            say(f"k8scifar: {done}")
        found, wanted = read_summary(self.spec.config.run_dir) or {}, self.spec.config.fingerprint()
        other = " by another configuration; to train anew, set another name" * (
            found.get("config_fingerprint", wanted) != wanted
        )
        say(f"k8scifar: training is done ({self.spec.config.run_dir}){other}; holding until the pod is stopped")
        while not self.signals:
            self.heartbeat.touch()
            self._sleep(HOLD)
        return 0

    def _stopped(self, code: int) -> int:
        if code in (0, PREEMPTED):
            # In a Job an exit code of 0 would count as completed.
            code = self._end(PREEMPTED)
            return code if self.spec.when_done == "exit" else 0
        self.reason = self.reason or "stopped before the ranks could save; training resumes from the last checkpoint"
        say(f"k8scifar: {self.reason}")
        return self._end(code)

    def _end(self, code: int) -> int:
        self._note(self.reason)
        self._journal("stopped" if code == PREEMPTED else "failed")
        return code

    def _journal(self, state: str, attempt: int = 0) -> None:
        if self.spec.restart:  # somebody else will ask
            notes.write(self.spec.config.run_dir, self.spec.node_rank, state, self.reason, attempt)

    def _note(self, text: str) -> None:
        leave_message(text, self.spec.environment)

    def _on_signal(self, *_: object) -> None:
        self.signals += 1

    def _due(self, name: str, seconds: float) -> bool:
        """True at the first call of that name, then once each `seconds`."""
        now = time.monotonic()
        if now < self._next.get(name, 0.0):
            return False
        self._next[name] = now + seconds
        return True

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self.signals and (left := end - time.monotonic()) > 0:
            time.sleep(min(POLL, left))


def _modified(path: Path) -> int:
    """When a file was last written, in ns; 0 where there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _read(path: Path) -> str:
    try:
        return " ".join(path.read_text().split())
    except OSError:
        return ""
