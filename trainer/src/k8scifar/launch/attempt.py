"""One attempt: run torchrun on this node, watch it, and return one exit code and one reason."""

from __future__ import annotations

import enum
import math
import shutil
import signal
import tempfile
import time
from pathlib import Path

from k8scifar.console import say
from k8scifar.errors import PEER_LOST, PREEMPTED
from k8scifar.launch import processes, sockets
from k8scifar.launch.elastic.membership import Membership
from k8scifar.launch.node import NodeSpec, record_state
from k8scifar.launch.reports import Reports
from k8scifar.launch.timing import POLL, Every, Signals
from k8scifar.liveness import Heartbeat
from k8scifar.results import node_status, participants
from k8scifar.results.summary import MARKER, finished_summary

SILENCE = 10.0  # seconds, at least, without a beat of the agent after which it counts as frozen
LINGER = 5.0  # seconds that torchrun gets to end after its ranks have
UNSEEN = 60.0  # seconds of training after which node 0's state must be visible on a shared volume


class State(enum.Enum):
    """What the attempt is doing; `Attempt` has one function for each state."""

    MEETING = "the nodes meet, and no rank has started"
    TRAINING = "the ranks run"
    SAVING = "SIGTERM was sent: the ranks save and end"
    ENDING = "one rank has failed or all have ended: torchrun may end"
    OVER = "torchrun has ended, or has to be killed"


class Attempt:
    """One run of torchrun on this node. No process of it is left after `run`."""

    def __init__(
        self, spec: NodeSpec, signals: Signals, heartbeat: Heartbeat, number: int = 0, run_is_done: bool = False
    ) -> None:
        """`run_is_done`: this node has finished, and its ranks start once more for a node that has not."""
        self.spec, self.number, self.reason = spec, number, ""
        self._signals, self._heartbeat, self._run_is_done = signals, heartbeat, run_is_done
        self._state, self._begun = State.MEETING, time.monotonic()
        self._signals_sent, self._deadline, self._trains_since = 0, math.inf, math.inf
        self._beats, self._beat_at = 0, self._begun
        self._frozen_after = max(spec.config.distributed.timeout_seconds, SILENCE)
        self._volume_checked = not spec.waits_for_data
        self._touch, self._look, self._report_wait = Every(5), Every(5), Every(30)

    def run(self, membership: Membership | None) -> int:
        """Start torchrun and watch it to its end; returns the attempt's exit code and sets `reason`."""
        spec, folder = self.spec, Path(tempfile.mkdtemp(prefix="k8scifar-"))
        self._reports = Reports(folder, spec.nproc_per_node)
        if membership:
            membership.write_policy(folder)
        self._child = processes.Child(
            spec.command(spec.master_port or sockets.free_port()), spec.child_environment(folder)
        )
        try:
            self._heartbeat.touch()
            self._watch()
        finally:
            self._child.kill_tree()
            code = self._exit_code()
            if membership:
                membership.learn(self._reports.agent)
            shutil.rmtree(folder, ignore_errors=True)
        return code

    def _watch(self) -> None:
        """Go from state to state until torchrun has ended or has to be killed."""
        functions = {
            State.MEETING: self._meeting,
            State.TRAINING: self._training,
            State.SAVING: self._waiting_for_the_end,
            State.ENDING: self._waiting_for_the_end,
        }
        while self._state is not State.OVER and self._child.poll() is None:
            if time.monotonic() - self._trains_since < self.spec.first_step and self._touch.due():
                self._heartbeat.touch_unless_others()
            self._state = self._on_signal() or self._on_frozen_agent() or functions[self._state]()
            time.sleep(POLL)

    # In every state

    def _on_signal(self) -> State | None:
        """Pass a signal on: the first one lets the ranks save, a second one ends the attempt."""
        if self._signals.count <= self._signals_sent:
            return None
        self._signals_sent = self._signals.count
        return self._stop(self.spec.shutdown_timeout + LINGER if self._signals_sent == 1 else 0.0)

    def _stop(self, seconds: float) -> State:
        """Send SIGTERM; the ranks get so many seconds to save."""
        self._child.signal(signal.SIGTERM)
        self._deadline = time.monotonic() + seconds
        return State.SAVING

    def _on_frozen_agent(self) -> State | None:
        """End an attempt whose agent has shown life and then has not for long."""
        beats, now = self._reports.agent.beats, time.monotonic()
        if beats != self._beats:
            self._beats, self._beat_at = beats, now
        if not beats or now - self._beat_at <= self._frozen_after:
            return None
        self.reason = f"torchrun is frozen: it has shown no sign of life for {self._frozen_after:.0f} s"
        return State.OVER

    # One function for each state

    def _meeting(self) -> State:
        """Until a rank starts: log what is missing, and look whether another node has finished the run."""
        if self._reports.started:
            self._trains_since = time.monotonic()
            record_state(self.spec, "training", attempt=self.number)
            return State.TRAINING
        if not self._run_is_done and self.spec.nnodes > 1 and self._look.due() and finished_summary(self.spec.config):
            return State.OVER
        waited = time.monotonic() - self._begun
        if self.spec.nnodes > 1 and waited > 20 and self._report_wait.due():
            place = f"{self.spec.master_addr}:{self.spec.master_port}"
            if what := self._reports.agent.waits_for:
                say(f"k8scifar: waiting for {what} ({waited:.0f} s)")
            else:
                say(f"k8scifar: waiting for all {self.spec.nnodes} nodes to meet at {place} ({waited:.0f} s)")
        return self._on_returning_nodes() or State.MEETING

    def _training(self) -> State:
        """Until a rank fails, all have ended, or a node that was away can be taken back."""
        codes = self._reports.exit_codes
        all_ended = len(codes) == self.spec.nproc_per_node
        if any(codes) or (all_ended and self.spec.node_rank == 0):
            self._deadline = time.monotonic() + LINGER
            return State.ENDING
        if all_ended:  # torchrun waits until node 0 has written the last files
            self._deadline = time.monotonic() + self.spec.wait
            return State.ENDING
        if not self._volume_checked and time.monotonic() - self._trains_since > UNSEEN:
            self._check_volume()
        return self._on_returning_nodes() or State.TRAINING

    def _waiting_for_the_end(self) -> State:
        """Until torchrun ends or its time is over; in SAVING and in ENDING."""
        return State.OVER if time.monotonic() >= self._deadline else self._state

    def _on_returning_nodes(self) -> State | None:
        """Stop the ranks where nodes of an elastic group are to be taken back."""
        if not (nodes := self._reports.agent.returning):
            return None
        self.reason = f"{participants.named(nodes)} {'is' if len(nodes) == 1 else 'are'} back: all nodes meet again"
        say(f"k8scifar: {self.reason} once the ranks have saved")
        return self._stop(self.spec.shutdown_timeout + LINGER)

    def _check_volume(self) -> None:
        """Warn where node 0, which trains with this node, writes its state to another volume."""
        self._volume_checked = True
        if 0 not in node_status.read(self.spec.config.run_dir):
            say(
                f"k8scifar: node 0 trains, but has written nothing to {node_status.folder(self.spec.config.run_dir)}: "
                "this node has another checkpoints volume (a hostPath is not shared), and cannot see when training "
                "ends; give both nodes the same volume, or start both with distributed.storage=local"
            )

    # The end

    def _exit_code(self) -> int:
        """Return the attempt's exit code, and set its reason."""
        reports, signals = self._reports, self._signals
        self.reason = self.reason or reports.reason
        ended_alone = self.spec.nnodes > 1 and not (reports.exit_codes or signals.count or self._run_is_done)
        if ended_alone and finished_summary(self.spec.config):
            return 0
        if reports.all_done:
            return 0 if self._rank_0_is_done() else PEER_LOST
        code = reports.exit_code(self._child.code, signals.count > 0, self.spec.nnodes == 1)
        if code == PREEMPTED:
            self.reason = self.reason or "stopped by a signal after saving"
        return code

    def _rank_0_is_done(self) -> bool:
        """Whether rank 0 has written the summary; without it rank 0 needs this node again."""
        if self.spec.node_rank == 0 or self.spec.own_folders or not self.spec.config.run_dir.is_dir():
            return True  # rank 0 has written it, or the run folder is on another machine
        end = time.monotonic() + 10  # a file shows late on another NFS client
        while not self._signals.count and time.monotonic() < end:
            if finished_summary(self.spec.config):
                return True
            self._heartbeat.touch()
            self._signals.sleep(1.0)
        self.reason = f"the ranks of this node are done, but rank 0 has written no {MARKER}"
        return bool(self._signals.count)
