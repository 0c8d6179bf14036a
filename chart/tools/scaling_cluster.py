"""Train on 1, 2, ... nodes of a cluster and draw speed-up and efficiency. `make scaling NODES=2` calls it.

scaling_cluster.py --nodes N [--epochs N] [--release NAME] [--namespace NAME] [--context NAME] -- Helm's options ...
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from kube import Kubectl, Release, ToolError, arguments, exit_code
from kube_objects import condition, label, named
from scaling_chart import OVERRIDES, Chart, stateful_set
from scaling_record import Record
from scaling_run import Failed, Run


def measure(chart: Chart, record: Record, nodes: int, poll: float, patience: float) -> None:
    """Train on each number of nodes that the record lacks. Raises ToolError if a training fails."""
    installed = chart.series()
    for count in range(1, nodes + 1):
        if count in record.measured:
            print(f"  nodes={count}: measured before, {record.measured[count]['images_per_second']:,.1f} images/s")
            continue
        if installed not in (None, record.series):  # pods of other values may hang and block an upgrade
            chart.uninstall()
        installed = record.series
        chart.install(count, record.series)
        try:
            figures = Run(chart, count, record.series, poll, patience).figures()
        except Failed as error:
            raise ToolError(
                f"nodes={count}: the training failed: {error}; the release is still installed: "
                f"{command(chart, 'status')}, {command(chart, 'logs')}; the same command goes on"
            ) from None
        record.add(figures)
        print(f"  nodes={count}: {figures['images_per_second']:,.1f} images/s", flush=True)


def command(chart: Chart, task: str) -> str:
    """What to type for a task of make with this release."""
    choices = {"NAMESPACE": chart.kubectl.namespace, "CONTEXT": chart.kubectl.context}
    given = [f" {name}={value}" for name, value in choices.items() if value not in ("", "default")]
    return f"make {task} RELEASE={chart.release}{''.join(given)}"


def check(chart: Chart, nodes: int) -> None:
    """Refuse what can't be measured, and warn of what changes the figures. Raises ToolError."""
    (spec, *_) = [stateful_set(chart.rendered(count))["spec"]["template"]["spec"] for count in range(nodes, 0, -1)]
    rules = (spec.get("affinity") or {}).get("podAntiAffinity") or {}
    if not rules.get("requiredDuringSchedulingIgnoredDuringExecution"):
        print("podAntiAffinity lets several pods share a machine: the speed-up is that of fewer machines than nodes")
    elif (machines := fitting(chart.kubectl, spec)) is not None and len(machines) < nodes:
        advice = f"NODES={len(machines)}, or more machines" if len(machines) > 1 else "more machines are needed"
        raise ToolError(
            f"NODES={nodes}, but {len(machines)} of the cluster's machines take such a pod "
            f"({', '.join(machines) or 'none'}): {advice}"
        )
    for name in others(chart):
        print(f"{name} has pods in this cluster: training there makes this measurement slower")


def fitting(kubectl: Kubectl, spec: dict[str, Any]) -> list[str] | None:
    """The machines that take a pod of this spec; None if the user may not list nodes."""
    items = kubectl.items("nodes", "--ignore-not-found")
    return None if items is None else [named(item) for item in items if fits(spec, item)]


def fits(spec: dict[str, Any], node: dict[str, Any]) -> bool:
    """Whether a node is ready and takes a pod of this spec; a pod with tolerations is taken to tolerate every taint."""
    own, labels = node.get("spec", {}), node["metadata"].get("labels", {})
    tainted = any(taint["effect"] != "PreferNoSchedule" for taint in own.get("taints") or [])
    ready = condition(node, "Ready").get("status") == "True" and not own.get("unschedulable")
    selected = (spec.get("nodeSelector") or {}).items() <= labels.items()
    return ready and selected and not (tainted and not spec.get("tolerations"))


def others(chart: Chart) -> list[str]:
    """The other releases in the cluster that have running trainers; empty if the user may not list them."""
    chosen = "--selector=app.kubernetes.io/part-of=k8scifar,app.kubernetes.io/component=trainer"
    pods = chart.kubectl.items("pods", "--all-namespaces", chosen) or []
    found = {
        f"release {label(pod, 'instance')} in namespace {pod['metadata'].get('namespace', '')}"
        for pod in pods
        if pod.get("status", {}).get("phase") == "Running"
    }
    return sorted(found - {f"release {chart.release} in namespace {chart.kubectl.namespace}"})


def uninstall(chart: Chart) -> None:
    """Uninstall the release and list the claims that stay."""
    if chart.series() is None:
        return
    chart.uninstall()
    print(f"release {chart.release} is uninstalled", flush=True)
    try:
        kept = Release.find(chart.release, chart.kubectl).claims_of_all_kinds()
    except ToolError:  # nothing is left of it
        return
    if claims := [named(item) for item in kept if not item["metadata"].get("deletionTimestamp")]:
        chosen = f"-l app.kubernetes.io/instance={chart.release}"
        print(
            f"its claims stay, with data set and runs: {', '.join(claims)}; to delete them:\n"
            f"  kubectl {chart.kubectl.options()} delete pods,pvc,configmaps {chosen} && "
            f"kubectl delete pv {chosen},k8scifar/namespace={chart.kubectl.namespace}"
        )


def main(words: list[str]) -> int:
    """Run the command line; what follows -- goes to Helm."""
    cut = words.index("--") if "--" in words else len(words)
    parser = arguments(__doc__)
    parser.add_argument("--nodes", required=True, help="measure on 1 to so many nodes")
    parser.add_argument("--epochs", default="1", help="epochs of each training; the last one counts")
    parser.add_argument("--poll", type=float, default=5.0, help="seconds between two looks at the training")
    parser.add_argument(
        "--patience", type=float, default=300.0, help="seconds after which a fault ends the measurement"
    )
    args = parser.parse_args(words[:cut])
    if not re.fullmatch(r"[1-9]\d{0,3}", args.nodes) or int(args.nodes) < 2:
        raise ToolError(f"NODES={args.nodes}: give 2 or more; without NODES, make scaling measures this machine")
    if not re.fullmatch(r"[1-9]\d{0,4}", args.epochs):
        raise ToolError(f"EPOCHS={args.epochs}: give 1 or more")
    nodes, name = int(args.nodes), f"{args.release}-scaling"
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", name) or len(name) > 53:
        raise ToolError(f"RELEASE={args.release} is not a release's name: small letters, digits and -, 45 at most")
    chart = Chart(name, Kubectl(args.namespace, args.context), tuple(words[cut + 1 :]), int(args.epochs))
    check(chart, nodes)
    print(
        f"release {name}: 1 to {nodes} nodes, {args.epochs} epoch(s) on each; your values, but {OVERRIDES}", flush=True
    )
    record = Record(Path("results") / name, chart.digest())
    try:
        measure(chart, record, nodes, args.poll, args.patience)
    except (KeyboardInterrupt, SystemExit):
        print(
            f"\nstopped; measured so far: {', '.join(map(str, record.measured)) or 'nothing'}, kept in {record.path}; "
            "the training goes on in the cluster: the same command waits for it again, "
            f"{command(chart, 'uninstall')} ends it",
            flush=True,
        )
        raise
    record.draw(f"release {name} in namespace {args.namespace}")
    uninstall(chart)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
