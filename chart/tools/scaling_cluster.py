"""The same training on 1, 2, ... nodes of a cluster: speed-up and efficiency beside the ideal. `make scaling` calls it.

scaling_cluster.py --nodes N [--epochs N] [--release NAME] [--namespace NAME] [--context NAME] -- Helm's options ...
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from kube import Kubectl, Release, ToolError, arguments, exit_code
from scaling_chart import OVER_YOURS, Chart, workload
from scaling_machines import fitting, others
from scaling_record import Series
from scaling_run import Failed, Run


def measure(chart: Chart, kubectl: Kubectl, series: Series, nodes: int, poll: float, patience: float) -> None:
    """Train on each number of nodes that is not measured yet. Raises ToolError where a training fails."""
    installed = chart.series()
    for count in range(1, nodes + 1):
        if count in series.measured:
            print(f"  nodes={count}: measured before, {series.measured[count]['images_per_second']:,.1f} images/s")
            continue
        if installed not in (None, series.name):  # its pods may hang, which would hold an upgrade up
            chart.uninstall()
        installed = series.name
        chart.install(count, series.name)
        run = Run(kubectl, chart.release, chart.run_name(count, series.name), count, poll, patience)
        try:
            figures = run.finished()
        except Failed as error:
            raise ToolError(
                f"nodes={count}: the training came to no end: {error}; the release is left as it is: "
                f"{typed(chart, 'status')}, {typed(chart, 'logs')}; the same command goes on"
            ) from None
        series.add(figures)
        print(f"  nodes={count}: {figures['images_per_second']:,.1f} images/s", flush=True)


def typed(chart: Chart, task: str) -> str:
    """What a person types for the release."""
    where = f" NAMESPACE={chart.namespace}" if chart.namespace != "default" else ""
    return f"make {task} RELEASE={chart.release}{where}{f' CONTEXT={chart.context}' if chart.context else ''}"


def check(chart: Chart, kubectl: Kubectl, nodes: int) -> None:
    """Refuse what can't be measured before anything is installed; say what may surprise. Raises ToolError."""
    yours = workload(chart.rendered(nodes, ours=False))
    specs = [workload(chart.rendered(count))["spec"]["template"]["spec"] for count in range(nodes, 0, -1)]
    if yours["kind"] == "Job":
        print("your values ask for a Job; a StatefulSet measures the same, and keeps its pods until they are read")
    apart = ((specs[0].get("affinity") or {}).get("podAntiAffinity") or {}).get(
        "requiredDuringSchedulingIgnoredDuringExecution"
    )
    machines = fitting(kubectl, specs[0])
    if apart and machines is not None and len(machines) < nodes:
        raise ToolError(
            f"NODES={nodes}, but {len(machines)} of the cluster's machines take such a pod "
            f"({', '.join(machines) or 'none'}): "
            + (f"NODES={len(machines)}, or more machines" if len(machines) > 1 else "more machines are needed")
        )
    if not apart:
        print("podAntiAffinity lets several pods share a machine: the speed-up is that of fewer machines than nodes")
    for name in others(kubectl, chart.release):
        print(f"{name} has pods in this cluster: if it trains meanwhile, the figures are of what it leaves")


def leave(chart: Chart, kubectl: Kubectl) -> None:
    """Uninstall the release, and say what is left of it."""
    if chart.series() is None:
        return
    chart.uninstall()
    print(f"release {chart.release} is uninstalled", flush=True)
    try:
        found = Release.find(chart.release, kubectl).objects.get("PersistentVolumeClaim", [])
    except ToolError:
        return
    if claims := [item["metadata"]["name"] for item in found if not item["metadata"].get("deletionTimestamp")]:
        chosen = f"-l app.kubernetes.io/instance={chart.release}"
        print(
            f"its claims are kept, with data set and runs: {', '.join(claims)}; to be rid of them:\n"
            f"  kubectl {kubectl.options()} delete pods,pvc,configmaps {chosen} && "
            f"kubectl delete pv {chosen},k8scifar/namespace={chart.namespace}"
        )


def main(words: list[str]) -> int:
    """The command line; what follows -- is for Helm."""
    cut = words.index("--") if "--" in words else len(words)
    parser = arguments(__doc__)
    parser.add_argument("--nodes", required=True, help="measure on 1 to so many nodes")
    parser.add_argument("--epochs", default="1", help="of each training; the last one counts")
    parser.add_argument("--poll", type=float, default=5.0, help="seconds between two looks at the training")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds for what may mend itself")
    args = parser.parse_args(words[:cut])
    if not re.fullmatch(r"[1-9]\d{0,3}", args.nodes) or int(args.nodes) < 2:
        raise ToolError(f"NODES={args.nodes}: a number from 2 on; without NODES, make scaling measures this machine")
    if not re.fullmatch(r"[1-9]\d{0,4}", args.epochs):
        raise ToolError(f"EPOCHS={args.epochs}: a number from 1 on")
    nodes, kubectl = int(args.nodes), Kubectl(args.namespace, args.context)
    name = f"{args.release}-scaling"
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", name) or len(name) > 53:
        raise ToolError(f"RELEASE={args.release} is no release's name: small letters, digits and -, 45 at most")
    chart = Chart(name, args.namespace, args.context, tuple(words[cut + 1 :]), int(args.epochs))
    check(chart, kubectl, nodes)
    current = kubectl.run("config", "current-context").stdout.strip()
    print(
        f"release {name}: 1 to {nodes} nodes, {args.epochs} epoch(s) on each; your values, but {OVER_YOURS}", flush=True
    )
    series = Series(Path("results") / name, chart.key(args.context or current))
    try:
        measure(chart, kubectl, series, nodes, args.poll, args.patience)
    except (KeyboardInterrupt, SystemExit):
        print(
            f"\nstopped; measured so far: {', '.join(map(str, series.measured)) or 'nothing'}, kept in {series.path}; "
            f"the training goes on in the cluster: the same command takes it up again, {typed(chart, 'uninstall')} "
            "ends it",
            flush=True,
        )
        raise
    series.draw(f"release {name} in namespace {args.namespace}")
    leave(chart, kubectl)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
