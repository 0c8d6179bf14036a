"""`make results`: whose run a folder holds, and that a copy replaces it as a whole or not at all."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chart_helpers import component
from cluster_stage import TOOLS, everything_runs, installed

pytestmark = pytest.mark.helm
FILES = {"model.safetensors", "report.html", "summary.json"}


def shown(folder: Path) -> set[str]:
    """The names of what was copied, but for the note on whose it is."""
    return {path.name for path in folder.iterdir()} - {".k8scifar-run.json"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_runs_are_never_mixed(stage, rendered, run_folder):
    stage.objects(everything_runs(rendered))
    (run_folder / "events.out.tfevents.1").write_text("the first run's")
    results = stage.home / "results"
    assert stage.run("cluster", "results").returncode == 0
    first = contents(results / "cifar")
    (run_folder / "events.out.tfevents.1").rename(run_folder / "events.out.tfevents.2")
    (run_folder / "summary.json").write_text(json.dumps({"accuracy": 0.1, "epochs": 1, "heldout_images": 9}))
    done = stage.run("cluster", "results", "--namespace=lab")
    assert done.returncode == 0, done.stderr
    assert "results/cifar holds run cifar of cifar in default: this one goes to results/lab-cifar-cifar" in done.stdout
    assert "held-out accuracy 10.00% after 1 epochs" in done.stdout
    assert contents(results / "cifar") == first
    assert shown(results / "lab-cifar-cifar") == FILES | {"events.out.tfevents.2"}
    # Each goes to its own from now on, replaced as a whole; another run of the same release is another run, too.
    assert stage.run("cluster", "results").returncode == 0
    assert shown(results / "cifar") == FILES | {"events.out.tfevents.2"}
    run_folder.rename(run_folder.with_name("second"))
    done = stage.run("cluster", "results", "--run-dir=/volumes/checkpoints/runs/second")
    assert "goes to results/default-cifar-second" in done.stdout and shown(results / "default-cifar-second")
    assert {path.name for path in results.iterdir()} == {"cifar", "lab-cifar-cifar", "default-cifar-second"}


def test_a_run_of_another_cluster_by_the_same_name_is_another_run(stage, rendered, run_folder):
    for uid in ("one", "two", "three"):
        objects = everything_runs(rendered)
        for item in objects:
            item["metadata"]["uid"] = uid
        stage.objects(objects)
        assert stage.run("cluster", "results").returncode == 0
    names = sorted(path.name for path in (stage.home / "results").iterdir())
    assert names[:2] == ["cifar", "default-cifar-cifar"] and names[2].startswith("default-cifar-cifar-")


def test_what_a_person_put_beside_stays_and_a_copy_is_not_made_poorer(stage, rendered, run_folder):
    stage.objects(everything_runs(rendered))
    stage.run("cluster", "results", "--checkpoints")
    target = stage.home / "results" / "cifar"
    (target / "my notes.txt").write_text("lr was too high")
    (run_folder / "report.html").unlink()
    assert stage.run("cluster", "results").returncode == 0
    assert shown(target) == FILES - {"report.html"} | {"my notes.txt", "checkpoints"}
    assert (target / "my notes.txt").read_text() == "lr was too high"


def test_a_folder_of_somebody_elses_is_left_alone(stage, rendered, run_folder):
    stage.objects(everything_runs(rendered))
    other = stage.home / "results" / "cifar"
    other.mkdir(parents=True)
    (other / "events.out.tfevents.0").write_text("of an earlier version of this tool")
    done = stage.run("cluster", "results")
    assert done.returncode == 0 and "results/cifar holds something else" in done.stdout
    assert shown(other) == {"events.out.tfevents.0"} and shown(other.with_name("default-cifar-cifar")) == FILES
    done = stage.run("cluster", "results", f"--target={other}")
    assert done.returncode == 2 and "holds something else: choose another folder, or move it away" in done.stderr
    assert shown(other) == {"events.out.tfevents.0"}


@pytest.mark.parametrize("how", ["cut", "killed", "full"])
def test_an_interrupted_copy_leaves_the_earlier_result_untouched(stage, rendered, run_folder, how):
    stage.objects(everything_runs(rendered))
    stage.run("cluster", "results")
    before = contents(stage.home / "results" / "cifar")
    (run_folder / "summary.json").write_text("{}")
    if how == "cut":
        (stage.home / "cut").write_text("always")
        done = stage.run("cluster", "results")
        assert done.returncode == 2 and "the run could not be copied" in done.stderr
    elif how == "full":  # a disk without room, as a limit on the size of files
        limited = ["sh", "-c", 'ulimit -f 20; exec "$@"', "sh", sys.executable, str(TOOLS / "cluster.py"), "results"]
        path = {"PATH": f"{stage.bin}:/usr/bin:/bin", "HOME": str(stage.home)}
        done = subprocess.run(limited, env=path, cwd=stage.home, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    else:
        (stage.home / "slow").touch()
        command = [sys.executable, str(TOOLS / "cluster.py"), "results"]
        path = {"PATH": f"{stage.bin}:/usr/bin:/bin", "HOME": str(stage.home)}
        process = subprocess.Popen(command, env=path, cwd=stage.home, stderr=subprocess.PIPE, text=True)
        while not (stage.home / "begun").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 143 and "Traceback" not in said
    assert contents(stage.home / "results" / "cifar") == before
    assert [path.name for path in (stage.home / "results").iterdir()] == ["cifar"], "nothing temporary stays"


def test_an_exchange_that_was_cut_off_is_undone(stage, rendered, run_folder):
    """SIGKILL between the two renamings: the earlier result is found again by the next command."""
    stage.objects(everything_runs(rendered))
    stage.run("cluster", "results")
    target = stage.home / "results" / "cifar"
    (target / "mine").touch()
    target.rename(target.with_name(".cifar.earlier"))
    assert stage.run("cluster", "results").returncode == 0
    assert shown(target) == FILES | {"mine"} and not target.with_name(".cifar.earlier").exists()


def kept(rendered: list[dict], name: str, created: str, run: str) -> dict:
    """A claim of the release's checkpoints."""
    (claim,) = (
        item
        for item in copy.deepcopy(rendered)
        if item["kind"] == "PersistentVolumeClaim"
        and item["metadata"]["labels"]["app.kubernetes.io/component"] == "checkpoints"
    )
    claim["metadata"] |= {"name": name, "creationTimestamp": created}
    claim["metadata"]["annotations"]["k8scifar/run-dir"] = f"/volumes/checkpoints/runs/{run}"
    return claim


def test_of_several_claims_the_one_in_use_else_the_newest_is_read(stage, rendered, run_folder):
    objects = installed(rendered)
    used = component(objects, "PersistentVolumeClaim", "checkpoints")
    name = used["metadata"]["name"]
    used["metadata"]["creationTimestamp"] = "2026-01-02T00:00:00Z"
    old = kept(rendered, "cifar-checkpoints-0ld", "2026-01-01T00:00:00Z", "old")
    new = kept(rendered, "cifar-checkpoints-n3w", "2026-01-03T00:00:00Z", "cifar")
    (run_folder.parent / "old").mkdir()
    (run_folder.parent / "old" / "summary.json").write_text("{}")

    def read(*words: str) -> tuple[str, str]:
        """The claim that the pod made for it mounts, and what was said."""
        done = stage.run("cluster", "results", *words)
        assert done.returncode == 0, done.stderr
        made = json.loads([call["given"] for call in stage.calls if call["given"]][-1])
        return made["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"], done.stdout

    stage.objects([old, *objects, new])
    claim, said = read()
    assert claim == name and f"reading {name}, in use; older claims were kept" in said
    told = stage.run("cluster", "status").stdout
    assert f"volume {name}: unknown, in use\n" in told
    assert "volume cifar-checkpoints-0ld: unknown, not in use, kept\n" in told
    stage.objects([old, new])  # after helm uninstall
    claim, said = read()
    assert claim == "cifar-checkpoints-n3w" and "cifar-checkpoints-n3w, the newest" in said
    claim, said = read("--claim=cifar-checkpoints-0ld")
    assert claim == "cifar-checkpoints-0ld" and "copied 1 files" in said
    done = stage.run("cluster", "results", "--claim=nonesuch")
    assert done.returncode == 2 and "has no claim nonesuch: CLAIM=cifar-checkpoints-n3w or" in done.stderr


def test_a_pod_of_the_former_volume_is_not_read(stage, rendered, run_folder):
    """After an upgrade to another claim the pods of before still run."""
    objects = everything_runs(rendered)
    for item in objects:
        if item["kind"] == "StatefulSet":
            volumes = {each["name"]: each for each in item["spec"]["template"]["spec"]["volumes"]}
            volumes["checkpoints"]["persistentVolumeClaim"] = {"claimName": "cifar-checkpoints-n3w"}
    stage.objects([*objects, kept(rendered, "cifar-checkpoints-n3w", "2026-01-03T00:00:00Z", "cifar")])
    assert stage.run("cluster", "results").returncode == 0
    made = json.loads(next(call["given"] for call in stage.calls if call["given"]))
    assert made["spec"]["volumes"][0]["persistentVolumeClaim"] == {"claimName": "cifar-checkpoints-n3w"}
