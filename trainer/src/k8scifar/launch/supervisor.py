"""The loop around torchrun: start it, watch it, start it again when a peer was lost, and end for good reasons only.

It never imports torch. A fault of a peer costs one attempt and a short pause that does not grow, and never this
process: in a pod the container goes on, so that the kubelet's crash back-off has nothing to grow from. A failure of
this node's own that comes again and again is another matter: the pauses grow, and in the end the process ends with its
reason, which the kubelet, the Job and people see.
"""

from __future__ import annotations

import math
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

from k8scifar.console import say
from k8scifar.errors import CRASHED, FAILED, LATE, PEER_LOST, PREEMPTED, USER_MISTAKE, UserError
from k8scifar.launch import kubernetes, processes, sockets
from k8scifar.launch.elastic.attendance import Attendance
from k8scifar.launch.node import NodeSpec
from k8scifar.launch.prerequisites import Need, needs
from k8scifar.launch.scratch import Scratch
from k8scifar.launch.termination import leave_message
from k8scifar.launch.unfinished_nodes import Door
from k8scifar.liveness import Heartbeat
from k8scifar.results import lease, node_status, ownership, participants
from k8scifar.results.summary import MARKER, finished_summary, newest_checkpoint, read_summary

POLL = 0.1  # seconds between two looks at the child
SILENCE = 10.0  # seconds, at least, without a sign of life after which torchrun is taken for frozen
LINGER = 5.0  # seconds that torchrun gets to end by itself after its ranks have
HOLD = 10.0  # seconds between two heartbeats once training is done
CRASHES = 5  # of this node's own, without a new checkpoint between them, that end the process
LONGEST_PAUSE = 60.0  # seconds between two attempts after failures of this node's own
UNSEEN = 60.0  # seconds of training after which node 0's note should be visible on a shared volume


class Supervisor:
    """Runs one node's part of the job to its end; `run` returns the process's exit code."""

    def __init__(self, spec: NodeSpec) -> None:
        self.spec = spec
        self.signals = 0
        self.reason = ""
        self.failures = 0  # of this node's own, since the last new checkpoint
        self._newest = ""  # checkpoint at the last failure
        self._attendance = Attendance(spec) if spec.is_elastic and not spec.node_rank else None
        self.heartbeat = Heartbeat(spec.environment.get("K8SCIFAR_HEARTBEAT"))
        self._next: dict[str, float] = {}
        self._done = False

    def run(self) -> int:
        """Attempt after attempt until training is done, a person is needed, or a signal says stop."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        processes.adopt_orphans()
        if refused := self._refused():
            return refused
        attempts = 0
        while not self.signals:
            if self.spec.nnodes > 1 and self._is_finished():
                return self._after_done(broken=attempts > 0)
            if not all(self._has(need) for need in needs(self.spec)):
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
            if code in (USER_MISTAKE, LATE) or not self.spec.restart:
                return self._end(code)
            self.reason = self.reason or ("a peer was lost" if code == PEER_LOST else "the ranks left no reason")
            pause = self._pause(code)
            if code == CRASHED and self.failures >= CRASHES:
                self.reason = f"failed {self.failures} times without a new checkpoint between: {self.reason}"
                say(f"k8scifar: error: {self.reason}")
                return self._end(CRASHED)
            self._journal("failed", attempts)
            self._note(self.reason)
            reason = self.reason
            say(f"k8scifar: attempt {attempts} ended ({reason}); the next starts in {pause:.1f} s")
            self._sleep(pause)
        return self._stopped(PREEMPTED)

    def _pause(self, code: int) -> float:
        """Seconds to the next attempt: longer each time that this node has failed by itself again."""
        pause = self.spec.pause * random.uniform(0.5, 1.5)
        if code == PEER_LOST:
            return pause
        newest = newest_checkpoint(self.spec.config.run_dir)
        self.failures = self.failures + 1 if newest == self._newest else 1
        self._newest = newest
        return min(pause * 2 ** (self.failures - 1), LONGEST_PAUSE)

    # Before an attempt

    def _refused(self) -> int:
        """The exit code where the run folder is another release's or another pod's by now; 0 where it may be ours."""
        try:
            ownership.check_owner(self.spec.config.run_dir, self.spec.config.checkpoint.adopt)
            lease.check_holder(self.spec.config.run_dir)
        except UserError as error:
            self.reason = str(error)
            say(f"k8scifar: error: {self.reason}")
            self._note(self.reason)  # nothing in the run's own place, which is another's
            return FAILED if error.code == LATE else error.code
        except OSError:
            pass  # a volume that is away for a while: rank 0 will look again
        return 0

    def _has(self, need: Need) -> bool:
        """Wait until the need is met; False, with the reason, where that takes too long."""
        start = time.monotonic()
        while not self.signals:
            self.heartbeat.touch()
            if need.is_met():
                return True
            waited = time.monotonic() - start
            if waited >= need.seconds:
                self.reason = f"{need.otherwise} (waited {waited:.0f} s)" if need.seconds else need.otherwise
                return False
            if waited > 5 and self._due("wait", 30):
                say(f"k8scifar: waiting: {need.otherwise} ({waited:.0f} of {need.seconds:.0f} s)")
                self._journal("waiting", reason=need.otherwise)
            self._sleep(0.5)
        return True

    # One attempt

    def _attempt(self, number: int = 0) -> int:
        """One run of torchrun. No process of it is left afterwards."""
        self.reason = ""
        spec, path = self.spec, Path(tempfile.mkdtemp(prefix="k8scifar-"))
        scratch = Scratch(path, spec.nproc_per_node)
        if self._attendance:
            self._attendance.order(path)
        child = processes.Child(spec.command(spec.master_port or sockets.free_port()), spec.child_environment(path))
        try:
            self._watch(child, scratch, number)
        finally:
            child.kill_tree()
            code = self._judge(child.code, scratch)
            if self._attendance:
                self._attendance.learn(scratch)
            shutil.rmtree(path, ignore_errors=True)
        return code

    def _watch(self, child: processes.Child, scratch: Scratch, number: int = 0) -> None:
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
            elif deadline is None and (back := scratch.welcome):
                self.reason = f"{participants.named(back)} came back: all nodes meet anew"
                say(f"k8scifar: {self.reason}, once the ranks have saved")
                child.signal(signal.SIGTERM)
                deadline = now + self.spec.shutdown_timeout + LINGER
            elif not self.signals and deadline is None and (codes := scratch.exit_codes):
                if any(codes) or (len(codes) == self.spec.nproc_per_node and self.spec.node_rank == 0):
                    deadline = now + LINGER
                elif len(codes) == self.spec.nproc_per_node:
                    deadline = now + self.spec.wait  # torchrun waits here until node 0 has written the last files
            if deadline is not None and now >= deadline:
                return
            if (seen := scratch.alive) != life:
                life, changed_at = seen, now
            elif life and now - changed_at > silence:
                self.reason = f"torchrun has shown no sign of life for {silence:.0f} s: frozen"
                return
            joined = scratch.joined
            started_at = started_at if joined else now
            if joined and self._due("joined", 86400 * 365):
                self._journal("training", number)
            if joined and now - started_at > UNSEEN and self.spec.waits_for_data and self._due("shared", 86400 * 365):
                self._check_shared()
            if now - started_at < self.spec.first_step and self._due("heartbeat", 5):
                self.heartbeat.touch_unless_others()
            looks = not joined and not self._done and self.spec.nnodes > 1 and self._due("finished", 5)
            if looks and self._is_finished():
                return
            if not joined and now - begun > 20 and self._due("waiting", 30):
                where, seconds = f"{self.spec.master_addr}:{self.spec.master_port}", f"({now - begun:.0f} s)"
                if what := scratch.waits_for:
                    say(f"k8scifar: waiting for {what} {seconds}")
                else:
                    say(f"k8scifar: waiting for all {self.spec.nnodes} nodes to meet at {where} {seconds}")
            time.sleep(POLL)

    def _check_shared(self) -> None:
        """Say so where node 0, with which this node trains, writes its notes on another volume."""
        if 0 not in node_status.read(self.spec.config.run_dir):
            place = node_status.folder(self.spec.config.run_dir)
            say(
                f"k8scifar: node 0 trains, but has left nothing in {place}: this node's checkpoints volume is another "
                "one (a hostPath is not shared), so that it will not see the end of the training; give both the same "
                "one, or start both with distributed.storage=local"
            )

    def _judge(self, code: int | None, scratch: Scratch) -> int:
        """The attempt's exit code, and its reason."""
        self.reason = self.reason or scratch.reason
        seen = bool(scratch.exit_codes or self.signals or self._done)
        if self.spec.nnodes > 1 and not seen and self._is_finished():
            return 0
        if scratch.all_done:
            return 0 if self._marked() else PEER_LOST
        judged = scratch.judge(code, self.signals > 0, self.spec.nnodes == 1)
        if judged == PREEMPTED:
            self.reason = self.reason or "training was told to stop and has saved"
        return judged

    def _marked(self) -> bool:
        """Whether rank 0's marker is there too; without it rank 0 will need this node again."""
        if self.spec.node_rank == 0 or self.spec.own_folders or not self.spec.config.run_dir.is_dir():
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

    def _after_done(self, broken: bool = False) -> int:
        """Hold, or end; `broken`: another node was lost at the very end, and may not know that the run is finished."""
        self._note("done")
        self._journal("done")
        self._done = True
        if self.spec.when_done == "exit":
            if broken and self.spec.own_folders:
                say("k8scifar: training is done here; another node may still lack what it left: waiting for it")
                self._hold(self.spec.wait)
            if self.spec.nnodes > 1 and self._is_finished():
                say(f"k8scifar: training is done ({self.spec.config.run_dir})")
            return 0
        if self.spec.when_done == "scale-down" and self.spec.node_rank == 0:
            name = self.spec.environment.get("K8SCIFAR_STATEFULSET", "")
            problem = kubernetes.scale_down(name, self._sleep)
            done = f"could not scale down: {problem}" if problem else f"StatefulSet {name} is scaled to zero"
            say(f"k8scifar: {done}")
        found, wanted = read_summary(self.spec.config.run_dir) or {}, self.spec.config.fingerprint()
        other = " by another configuration; to train from the start, set another name" * (
            found.get("config_fingerprint", wanted) != wanted
        )
        say(f"k8scifar: training is done ({self.spec.config.run_dir}){other}; holding until the pod is stopped")
        self._hold()
        return 0

    def _hold(self, seconds: float | None = None) -> None:
        """Wait until a signal, or for so long; a node with folders of its own helps one that lost what was in them."""
        end = time.monotonic() + (seconds or math.inf)
        with Door(self.spec) as door:
            while not self.signals and time.monotonic() < end:
                if self._due("held", HOLD):
                    self.heartbeat.touch()
                if self.spec.own_folders and door.somebody_waits():
                    say("k8scifar: another node is not done yet: the ranks meet once more")
                    code, self.reason = self._attempt(), ""
                    self._journal("done")
                    if code == 0 and seconds:
                        return
                self._sleep(1.0 if self.spec.own_folders else HOLD)

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
        if code != LATE:  # who came after us writes the notes now
            self._journal("stopped" if code == PREEMPTED else "failed")
        return FAILED if code in (PEER_LOST, LATE) else code

    def _journal(self, state: str, attempt: int = 0, reason: str = "") -> None:
        if self.spec.restart:  # somebody else will ask
            alone = self.spec.own_folders
            node_status.write(
                self.spec.config.run_dir, self.spec.node_rank, state, reason or self.reason, attempt, alone
            )

    def _note(self, text: str) -> None:
        leave_message(text, self.spec.environment)

    def _on_signal(self, *_: object) -> None:
        self.signals += 1

    def _due(self, name: str, seconds: float) -> bool:
        """True at the first call with that name, then at most once in `seconds`."""
        now = time.monotonic()
        if now < self._next.get(name, 0.0):
            return False
        self._next[name] = now + seconds
        return True

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self.signals and (left := end - time.monotonic()) > 0:
            time.sleep(min(POLL, left))
