"""Chaos: faults at random moments of a training on several hosts, then a comparison with an undisturbed training.

``python trainer/tests/helpers/chaos.py --kills 20 --hosts 3`` (`make chaos KILLS=20 HOSTS=3`) trains run after run,
strikes until the faults are used up, compares each finished run with the undisturbed one, bit for bit, and prints a
table. At the end one of two nodes of an elastic group is gone for good, and comes back later: that run's result is
equal but for rounding. Needs root and Linux.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import elastic
import hosts
import yaml
from pods import Group, names
from runs import TINY, history

from k8scifar.data.prepare import prepare
from k8scifar.exchange import modes
from k8scifar.training import checkpoint

TIMEOUT = 8.0  # seconds that a rank waits for a silent peer, here
SILENCE = TIMEOUT + 3.0  # how long a fault that must be noticed lasts
RANK, AGENT = (
    "-u -m k8scifar.launch.worker",
    "-m k8scifar.launch.agent",
)  # in their command lines; the agent's tells of the rank's too
LIMIT = 300.0  # seconds within which any fault must be mended

# What is trained: 10 epochs of 5 steps with an evaluation after each; a checkpoint every 4 steps.
CONFIG = TINY | {
    "epochs": 10,
    "global_batch": 120,  # one micro-batch a host: measured speeds can't divide the work of two runs differently
    "checkpoint": {"every_steps": 4, "keep": 3},
    "distributed": {"timeout_seconds": TIMEOUT, "local_sgd_steps": 3},  # averagings fall beside checkpoints, too
    "optimizer": {"name": "muon", "lr": 0.02},  # whose directions the owners exchange
    "log": {"every_seconds": 0.001, "every_steps": 1000, "tensorboard": False},
}


@dataclass
class Strike:
    """One fault and what came of it."""

    kind: str
    host: int
    step: int
    over: float = 0.0  # when the fault itself had ended
    recovered: bool = False  # its training came to its end
    seconds: float | None = None  # from the victim's restart to the next training step
    lost: int | None = None  # steps that had to be done again


@dataclass
class Report:
    """All faults of a chaos run, and how many finished runs were not the undisturbed one."""

    strikes: list[Strike] = field(default_factory=list)
    runs: int = 0
    wrong: int = 0

    def growth(self) -> str:
        """Whether faults in a row make recovery slower: the first and the last third of the times."""
        seconds = [strike.seconds for strike in self.strikes if strike.seconds is not None]
        third = max(1, len(seconds) // 3)
        if not seconds:
            return "no recovery was timed"
        first, last = statistics.median(seconds[:third]), statistics.median(seconds[-third:])
        whole = f"median {statistics.median(seconds):.1f} s, max {max(seconds):.1f} s, n = {len(seconds)}"
        return f"to the next step: {whole}; median of the first third {first:.1f} s, of the last {last:.1f} s"

    def table(self) -> str:
        """A markdown table, one row a kind of fault."""
        rows = ["| fault | tried | recovered | to the next step: median, max | steps done again: median, max |"]
        rows.append("|---|---|---|---|---|")
        for kind in KINDS:
            tried = [strike for strike in self.strikes if strike.kind == kind]
            if not tried:
                continue
            seconds = [strike.seconds for strike in tried if strike.seconds is not None]
            lost = [strike.lost for strike in tried if strike.lost is not None]
            times = f"{statistics.median(seconds):.1f} s, {max(seconds):.1f} s" if seconds else ""
            steps = f"{statistics.median(lost):.0f}, {max(lost)}" if lost else ""
            mended = sum(strike.recovered for strike in tried)
            rows.append(f"| {KINDS[kind].__doc__} | {len(tried)} | {mended} | {times} | {steps} |")
        return "\n".join(rows)


def kill_worker(group: Group, host: int) -> None:
    """SIGKILL of a rank"""
    group.machines[host].signal(signal.SIGKILL, RANK)


def kill_agent(group: Group, host: int) -> None:
    """SIGKILL of a torchrun agent"""
    group.machines[host].signal(signal.SIGKILL, AGENT)


def kill_pod(group: Group, host: int) -> None:
    """SIGKILL of a whole pod"""
    group.machines[host].kill()


def kill_all(group: Group, host: int) -> None:
    """SIGKILL of all pods at once"""
    for machine in group.machines:
        machine.kill()


def preempt(group: Group, host: int) -> None:
    """SIGTERM of a pod (preemption)"""
    group.machines[host].signal(signal.SIGTERM, "k8scifar launch")


def freeze_rank(group: Group, host: int) -> None:
    """a rank frozen for good (SIGSTOP)"""
    group.machines[host].signal(signal.SIGSTOP, RANK)


def freeze_agent(group: Group, host: int) -> None:
    """a torchrun agent and its rank frozen for good"""
    group.machines[host].signal(signal.SIGSTOP, AGENT)
    group.machines[host].signal(signal.SIGSTOP, RANK)


def freeze_pod(group: Group, host: int) -> None:
    """a pod frozen beyond the time-out, then thawed"""
    frozen = group.machines[host].signal(signal.SIGSTOP)
    time.sleep(SILENCE)
    hosts.send(frozen, signal.SIGCONT)


def cut_link(group: Group, host: int) -> None:
    """the network down beyond the time-out"""
    group.machines[host].link(up=False)
    time.sleep(SILENCE)
    group.machines[host].link(up=True)


def slow_link(group: Group, host: int) -> None:
    """the network at 200 Mb/s for a while"""
    group.machines[host].limit("200mbit")
    time.sleep(SILENCE / 2)
    group.machines[host].limit("")


def reset_connections(group: Group, host: int) -> None:
    """all connections reset"""
    group.machines[host].reset_connections()


def damage_checkpoint(group: Group, host: int) -> None:
    """all pods killed, then the newest checkpoint cut short"""
    kill_all(group, host)
    for path in checkpoint.listed(group.run_dir / "checkpoints")[:1]:
        path.write_bytes(path.read_bytes()[: random.randrange(path.stat().st_size)])


KINDS = {
    function.__name__: function
    for function in (
        *(kill_worker, kill_agent, kill_pod, kill_all, preempt),
        *(freeze_rank, freeze_agent, freeze_pod, cut_link, slow_link, reset_connections, damage_checkpoint),
    )
}
KILLS = ("kill_worker", "kill_agent", "kill_pod", "kill_all", "preempt", "reset_connections", "damage_checkpoint")


def train(folder: Path, data: Path, name: str, machines: list, plan: list[str], draw: random.Random, report: Report):
    """One training to its end, struck by faults of `plan`, which are taken off it; the finished run's folder."""
    config = folder / "config.yaml"
    group = Group(machines, folder, config, data, name)
    try:
        for rank in range(len(machines)):
            group.start(rank)
        while plan and not group.done:
            calm = draw.random() < 0.7  # else the fault falls into the recovery from the one before, or into the start
            if calm:
                mended(group, report)
            wait_for(group, draw.uniform(0.0, 4.0 if calm else 8.0))
            if not group.done:
                strike = Strike(plan.pop(0), draw.randrange(len(machines)), group.step)
                report.strikes.append(strike)
                print(f"{name}: step {strike.step}: {strike.kind} on host {strike.host}", file=sys.stderr, flush=True)
                KINDS[strike.kind](group, strike.host)
                strike.over = time.monotonic()
        mended(group, report)
        group.until(lambda: group.done, LIMIT, "the end of training")
        for strike in report.strikes:
            strike.recovered = True
        return group.run_dir
    finally:
        group.stop()


def wait_for(group: Group, seconds: float) -> None:
    """Sleep, but not beyond the end of training."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not group.done:
        time.sleep(0.05)


def mended(group: Group, report: Report) -> None:
    """Wait until training moves again after the last fault, or is done, and note how long it took."""
    strike = report.strikes[-1] if report.strikes else Strike("", 0, 0)
    group.until(
        lambda: group.done or any(at > strike.over for at, _ in group.steps[-1:]), LIMIT, f"a step after {strike.kind}"
    )
    resumed = [(at, step) for at, step in group.resumed if at > strike.over]
    if strike.seconds is not None or not resumed:
        return
    restart = max([strike.over, *(start for pod in group.pods for start in pod.starts)])
    steps = [at for at, _ in group.steps if at > resumed[-1][0]]
    if steps and restart < steps[0]:
        strike.seconds = steps[0] - restart
        strike.lost = max(0, strike.step - resumed[-1][1])


def undisturbed(folder: Path, data: Path, machines: list) -> Path:
    """The run that all others must equal."""
    return train(folder, data, "undisturbed", machines, [], random.Random(0), Report())


def chaos(
    folder: Path, kinds: list[str], kills: int, seed: int, report: Report, comm: str = "allreduce", count: int = 2
) -> None:
    """Strike `count` hosts `kills` times, each kind about equally often, in the mode of communication `comm`.

    Raises AssertionError where a training does not recover.
    """
    config = CONFIG | {"distributed": CONFIG["distributed"] | {"comm": comm}}
    config["micro_batch"] = config["global_batch"] // count
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    draw = random.Random(seed)
    random.seed(seed)
    plan = (kinds * (kills // len(kinds) + 1))[:kills]
    draw.shuffle(plan)
    data = folder / "data"
    prepare(data, "synthetic:600:303")
    with hosts.several(names(count)) as machines:
        reference = undisturbed(folder, data, machines)
        while plan:
            report.runs += 1
            run_dir = train(folder, data, f"run-{report.runs}", machines, plan, draw, report)
            same = _result(run_dir) == _result(reference)
            report.wrong += not same
            print(f"run {report.runs}: {'equals' if same else 'DIFFERS FROM'} the undisturbed", file=sys.stderr)


def gone(folder: Path, seed: int) -> str:
    """Take node 1 of an elastic group away for good at a random step, and bring it back later; returns what came of it.

    Raises AssertionError where the training does not go on, or ends otherwise than an undisturbed one.
    """
    draw, data, config = random.Random(seed), folder / "data", folder / "elastic.yaml"
    config.write_text(yaml.safe_dump(elastic.CONFIG))
    with hosts.several(names(2)) as machines:
        groups = [Group(machines, folder, config, data, name, *elastic.options()) for name in ("all-there", "one-gone")]
        try:
            for group in groups:
                for rank in range(2):
                    group.start(rank)
                if group is groups[0]:
                    group.until(lambda: groups[0].done, LIMIT, "the end")
                    group.stop()
            step = draw.randrange(3, 12)
            group.until(lambda: group.step >= step, LIMIT, f"step {step}")
            group.pods[1].stop()
            left = time.monotonic()
            frozen = elastic.goes_on_alone(group)
            alone = group.steps[-1][0] - left
            group.start(1)
            elastic.comes_back(group, frozen)
            back = time.monotonic() - group.pods[-1].starts[0]
            group.until(lambda: group.done, LIMIT, "the end")
            elastic.assert_equal_but_for_rounding(group.run_dir, groups[0].run_dir)
        finally:
            for group in groups:
                group.stop()
    return (
        f"one of two nodes gone for good after step {step}: trained on without it {alone:.1f} s later "
        f"({elastic.options()[1]}), with it again {back:.1f} s after its start; "
        "losses and weights as undisturbed, but for rounding"
    )


def _result(run_dir: Path) -> tuple:
    """What must be equal to the last bit."""
    summary = json.loads((run_dir / "summary.json").read_text())
    return summary["weights_sha256"], summary["accuracy"], summary["loss"], history(run_dir)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="how many faults (20)")
    parser.add_argument("--hosts", type=int, choices=(2, 3, 4), default=2, help="on how many hosts (2)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the kinds and moments (the time)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="which faults (all)")
    parser.add_argument(
        "--comm", choices=modes.KINDS, default="allreduce", help="how the ranks communicate (allreduce)"
    )
    args = parser.parse_args()
    print(f"seed {args.seed}", file=sys.stderr)
    report, error, left = Report(), "", ""
    with tempfile.TemporaryDirectory(prefix="k8scifar-chaos-") as folder:
        try:
            chaos(Path(folder), args.kinds, args.kills, args.seed, report, args.comm, args.hosts)
            if args.kinds == list(KINDS):
                left = gone(Path(folder), args.seed)
        except AssertionError as failure:
            error = f"error: with --seed {args.seed}: {failure}"
    print(f"{report.table()}\n\n{report.growth()}")
    print(
        f"{len(report.strikes)} faults in {report.runs} trainings on {args.hosts} hosts, seed {args.seed}; "
        f"trainings that did not equal the undisturbed one bit for bit: {report.wrong}"
    )
    print(left, end="\n" * bool(left))
    if error:
        print(error, file=sys.stderr)
    return 1 if report.wrong or error else 0


if __name__ == "__main__":
    sys.exit(main())
