"""The loop around torchrun: one attempt after another until training is done, a person is needed or a signal comes.

It never imports torch. A peer's fault costs one attempt and a short pause that does not grow. The process stays alive,
so that the kubelet's crash back-off has nothing to grow from. Repeated failures of this node itself make the pauses
grow, and at last end the process with its reason, which the kubelet, the Job and people see.
"""

from __future__ import annotations

import enum
import math
import random
import time

from k8scifar.console import say
from k8scifar.errors import CRASHED, FAILED, LATE, PEER_LOST, PREEMPTED, USER_MISTAKE, UserError
from k8scifar.launch import kubernetes, processes
from k8scifar.launch.attempt import Attempt
from k8scifar.launch.elastic.membership import Membership
from k8scifar.launch.node import NodeSpec, record_state
from k8scifar.launch.prerequisites import Prerequisite, prerequisites
from k8scifar.launch.termination import write_message
from k8scifar.launch.timing import Every, Signals
from k8scifar.launch.unfinished_nodes import UnfinishedNodes
from k8scifar.liveness import Heartbeat
from k8scifar.results import lease, ownership
from k8scifar.results.summary import finished_summary, newest_checkpoint, read_summary

HOLD = 10.0  # seconds between two heartbeats once training is done
CRASHES = 5  # of this node's ranks, without a new checkpoint between them, that end the process
LONGEST_PAUSE = 60.0  # seconds between two attempts after failures of this node
OTHER = " with another configuration; to train from the start, set another name"


class State(enum.Enum):
    """What the supervisor is doing; `Supervisor` has one function for each state."""

    CHECKING = "checks that the run folder is this release's and this pod's"
    PREPARING = "waits for node 0's name, a free port and the data set"
    TRAINING = "runs one attempt"
    FAILED = "an attempt has failed: pauses, or gives up"
    DONE = "training is done: ends, or goes on to hold"
    HOLDING = "waits for a signal, and helps nodes that are not done"
    STOPPED = "was stopped by a signal"
    ENDED = "the exit code is known"


class Supervisor:
    """Runs one node's part of the training; `run` returns the process's exit code."""

    def __init__(self, spec: NodeSpec) -> None:
        self.spec = spec
        self.code, self.reason = PREEMPTED, ""
        self.attempts = 0
        self.failures = 0  # of this node itself, since the last new checkpoint
        self.signals = Signals()
        self.heartbeat = Heartbeat(spec.environment.get("K8SCIFAR_HEARTBEAT"))
        self._newest = ""  # checkpoint at the last failure
        self._membership = Membership(spec) if spec.is_elastic and not spec.node_rank else None
        self._run_is_done = False

    def run(self) -> int:
        """Go from state to state until the exit code is known."""
        self.signals.install()
        processes.adopt_orphans()
        functions = {
            State.CHECKING: self._checking,
            State.PREPARING: self._preparing,
            State.TRAINING: self._training,
            State.FAILED: self._failed,
            State.DONE: self._done,
            State.HOLDING: self._holding,
            State.STOPPED: self._stopped,
        }
        state = State.CHECKING
        while state is not State.ENDED:
            state = functions[state]()
        return self.code

    # One function for each state

    def _checking(self) -> State:
        try:
            ownership.check_owner(self.spec.config.run_dir, self.spec.config.checkpoint.adopt)
            lease.check_holder(self.spec.config.run_dir)
        except UserError as error:
            self.code, self.reason = FAILED if error.code == LATE else error.code, str(error)
            say(f"k8scifar: error: {self.reason}")
            write_message(self.reason, self.spec.environment)  # no state in the run folder, which is another's
            return State.ENDED
        except OSError:
            pass  # a volume that is away for a while: rank 0 checks again
        return State.PREPARING

    def _preparing(self) -> State:
        self.code = PREEMPTED
        if not self.signals.count and self.spec.nnodes > 1 and self._is_finished():
            return State.DONE
        if not all(self._has(need) for need in prerequisites(self.spec)):
            say(f"k8scifar: error: {self.reason}")
            if not self.spec.restart:
                return self._end(USER_MISTAKE)
            self._record_failure()
            return State.PREPARING  # it may still come, and this container must not end for it
        return State.STOPPED if self.signals.count else State.TRAINING

    def _training(self) -> State:
        self.attempts += 1
        record_state(self.spec, "waiting", self.reason, self.attempts)
        self.code = self._attempt(self.attempts)
        if self.signals.count:
            return State.STOPPED
        if self.code == 0:
            return State.DONE
        if self.code in (USER_MISTAKE, LATE) or not self.spec.restart:
            return self._end(self.code)
        return State.FAILED

    def _failed(self) -> State:
        self.reason = self.reason or ("a peer was lost" if self.code == PEER_LOST else "the ranks reported no reason")
        pause = self._next_pause()
        if self.code == CRASHED and self.failures >= CRASHES:
            self.reason = f"failed {self.failures} times without a new checkpoint between: {self.reason}"
            say(f"k8scifar: error: {self.reason}")
            return self._end(CRASHED)
        self._record_failure()
        say(f"k8scifar: attempt {self.attempts} ended ({self.reason}); the next starts in {pause:.1f} s")
        self.signals.sleep(pause)
        return State.PREPARING

    def _done(self) -> State:
        write_message("done", self.spec.environment)
        record_state(self.spec, "done", self.reason)
        self._run_is_done = True
        if self.spec.when_done != "exit":
            self._scale_down()
            other = "" if self._is_this_configuration() else OTHER
            say(f"k8scifar: training is done ({self.spec.config.run_dir}){other}; holding until the pod is stopped")
            return State.HOLDING
        failed_at_the_end = self.attempts > 0 and self.code != 0
        if failed_at_the_end and self.spec.own_folders:  # a peer may not know that the run is finished
            say("k8scifar: training is done here; waiting for another node that may still need the result")
            return State.HOLDING
        return self._end_well()

    def _holding(self) -> State:
        ends = self.spec.when_done == "exit"
        end = time.monotonic() + (self.spec.wait if ends else math.inf)
        held = Every(HOLD)
        with UnfinishedNodes(self.spec) as others:
            while not self.signals.count and time.monotonic() < end:
                if held.due():
                    self.heartbeat.touch()
                if self.spec.own_folders and others.one_waits():
                    say("k8scifar: another node is not done yet; the ranks start once more")
                    code, self.reason = self._attempt(), ""
                    record_state(self.spec, "done")
                    if code == 0 and ends:
                        break
                self.signals.sleep(1.0 if self.spec.own_folders else HOLD)
        return self._end_well()

    def _stopped(self) -> State:
        if self.code in (0, PREEMPTED):
            self._end(PREEMPTED)
            if self.spec.when_done != "exit":
                self.code = 0  # in a Job, where when_done is exit, 0 would count as completed
            return State.ENDED
        self.reason = self.reason or "stopped before the ranks could save; training resumes from the last checkpoint"
        say(f"k8scifar: {self.reason}")
        return self._end(self.code)

    # What they use

    def _has(self, need: Prerequisite) -> bool:
        """Wait until the need is met or a signal comes; False, with the reason, where that takes too long."""
        start, report = time.monotonic(), Every(30)
        while not self.signals.count:
            self.heartbeat.touch()
            if need.is_met():
                return True
            waited = time.monotonic() - start
            if waited >= need.seconds:
                self.reason = f"{need.otherwise} (waited {waited:.0f} s)" if need.seconds else need.otherwise
                return False
            if waited > 5 and report.due():
                say(f"k8scifar: waiting: {need.otherwise} ({waited:.0f} of {need.seconds:.0f} s)")
                record_state(self.spec, "waiting", need.otherwise)
            self.signals.sleep(0.5)
        return True

    def _attempt(self, number: int = 0) -> int:
        attempt = Attempt(self.spec, self.signals, self.heartbeat, number, self._run_is_done)
        code = attempt.run(self._membership)
        self.reason = attempt.reason
        return code

    def _next_pause(self) -> float:
        """Seconds to the next attempt: twice as long each time that this node itself has failed again."""
        pause = self.spec.pause * random.uniform(0.5, 1.5)
        if self.code == PEER_LOST:
            return pause
        newest = newest_checkpoint(self.spec.config.run_dir)
        self.failures = self.failures + 1 if newest == self._newest else 1
        self._newest = newest
        return min(pause * 2 ** (self.failures - 1), LONGEST_PAUSE)

    def _is_finished(self) -> bool:
        return finished_summary(self.spec.config) is not None

    def _scale_down(self) -> None:
        """Set the StatefulSet's replicas to 0, where this is asked for and this is node 0."""
        if self.spec.when_done == "scale-down" and self.spec.node_rank == 0:
            name = self.spec.environment.get("K8SCIFAR_STATEFULSET", "")
            problem = kubernetes.scale_down(name, self.signals.sleep)
            done = f"could not scale down: {problem}" if problem else f"StatefulSet {name} is scaled to zero"
            say(f"k8scifar: {done}")

    def _is_this_configuration(self) -> bool:
        """Whether the finished run had the settings of this node."""
        summary, wanted = read_summary(self.spec.config.run_dir) or {}, self.spec.config.fingerprint()
        return summary.get("config_fingerprint", wanted) == wanted

    def _end_well(self) -> State:
        if self.spec.when_done == "exit" and self.spec.nnodes > 1 and self._is_finished():
            say(f"k8scifar: training is done ({self.spec.config.run_dir})")
        self.code = 0
        return State.ENDED

    def _end(self, code: int) -> State:
        """Record the reason and end; exit codes that only ranks use become FAILED."""
        write_message(self.reason, self.spec.environment)
        if code != LATE:  # the process that took over records the state now
            record_state(self.spec, "stopped" if code == PREEMPTED else "failed", self.reason)
        self.code = FAILED if code in (PEER_LOST, LATE) else code
        return State.ENDED

    def _record_failure(self) -> None:
        write_message(self.reason, self.spec.environment)
        record_state(self.spec, "failed", self.reason, self.attempts)
