"""The rendered pods: they train, hold, survive each other's end, and converge after an upgrade."""

import shutil
import subprocess

import pytest
from rendered_pods import BIN, Pod, cluster, commands, epochs, rendered, summary, until, volume_of

pytestmark = [pytest.mark.helm, pytest.mark.slow]


def test_the_rendered_pods_train_hold_and_idle_again(tmp_path):
    objects = rendered(tmp_path)
    with cluster(objects, tmp_path) as (hosts, pods):
        until(lambda: all("holding until" in pod.text() for pod in pods), 120, pods)
        found = summary(tmp_path)
        assert (found["world_size"], found["epochs"]) == (2, 2)
        assert [pod.codes for pod in pods] == [[], []]
        for host, pod in zip(hosts, pods, strict=True):
            until(lambda host=host: "k8scifar.launch.agent" not in commands(host), 10, pods)
            assert "k8scifar launch" in commands(host)
            assert (pod.folder / "termination-log").read_text() == "done\n"
        assert "packed into" in pods[0].text() and "packed into" not in pods[1].text()

        status = subprocess.run(
            [BIN / "k8scifar", "status", str(tmp_path / "checkpoints/runs/cifar")], capture_output=True, text=True
        )
        assert status.returncode == 0 and status.stdout.startswith("cifar: done: test accuracy"), status

        assert pods[1].stop() == 0
        pods[1] = Pod(hosts[1], 1, objects, tmp_path)
        until(lambda: "holding until" in pods[1].text(), 20, pods)
        assert "k8scifar.launch.agent" not in commands(hosts[1])
        assert epochs(tmp_path) == 2
        before = (pods[1].folder / "heartbeat").stat().st_mtime
        until(lambda: (pods[1].folder / "heartbeat").stat().st_mtime > before, 15, pods)
        assert [pod.stop() for pod in pods] == [0, 0]


def test_a_lost_pod_costs_the_other_nothing_and_an_upgrade_converges(tmp_path):
    with cluster(rendered(tmp_path, epochs=2000), tmp_path) as (hosts, pods):
        until(lambda: epochs(tmp_path) >= 2, 120, pods)
        survivor = pods[0].process.pid

        # The machine of pod 1 loses power; the pod comes again.
        seen = epochs(tmp_path)
        hosts[1].kill()
        until(lambda: epochs(tmp_path) > seen + 1, 90, pods)
        assert pods[0].process.pid == survivor and pods[0].codes == []
        assert "resuming from" in pods[0].text()

        # helm upgrade: the last pod first, while the other still trains.
        upgraded = rendered(tmp_path, epochs=epochs(tmp_path) + 12, optimizer={"lr": 0.01})
        pods[1].stop()
        pods[1] = Pod(hosts[1], 1, upgraded, tmp_path)
        until(lambda: "do not belong together" in pods[0].text() + pods[1].text(), 90, pods)
        trained = epochs(tmp_path)
        pods[0].stop()
        assert epochs(tmp_path) == trained, "two ranks of different configurations have trained together"
        pods[0] = Pod(hosts[0], 0, upgraded, tmp_path)
        until(lambda: summary(tmp_path).get("identity", {}).get("optimizer.lr") == 0.01, 120, pods)
        assert epochs(tmp_path) == summary(tmp_path)["epochs"] > trained
        assert "resuming from" in pods[0].text()
        until(lambda: all("holding until" in pod.text() for pod in pods), 30, pods)


def test_pods_with_volumes_of_their_own_outlive_the_loss_of_pod_0s(tmp_path):
    """Its machine is replaced: the newcomer has an empty volume, prepares the data, and gets the other's checkpoint."""
    objects = rendered(tmp_path, options=("local.yaml", "--set=nfs.server="), epochs=6)
    with cluster(objects, tmp_path) as (hosts, pods):
        first, second = (volume_of(objects, ordinal, tmp_path) for ordinal in (0, 1))
        until(lambda: list(second.glob("checkpoints/runs/cifar/checkpoints/*.pt")), 120, pods)
        hosts[0].kill()
        pods[0]._stopping = True
        shutil.rmtree(first)
        pods[0] = Pod(hosts[0], 0, objects, tmp_path)
        until(lambda: all("holding until" in pod.text() for pod in pods), 180, pods)
        assert (summary(first)["world_size"], summary(first)["epochs"]) == (2, 6)
        assert f"resuming from {second}/checkpoints/runs/cifar" in pods[1].text(), "the checkpoint came from there"
        assert "packed into" in pods[0].text() and "packed into" not in pods[1].text(), "pod 1 prepares nothing"
        packed = [{path.name for path in own.glob("dataset/data/synthetic-*/[!.]*")} for own in (first, second)]
        assert packed[0] and packed[0] <= packed[1]


def test_a_jobs_pods_end_and_a_pod_made_anew_ends_at_once(tmp_path):
    objects = rendered(tmp_path, kind="Job")
    with cluster(objects, tmp_path) as (hosts, pods):
        until(lambda: [pod.codes for pod in pods] == [[0], [0]], 120, pods)
        assert (summary(tmp_path)["world_size"], summary(tmp_path)["epochs"]) == (2, 2)
        pods[1] = Pod(hosts[1], 1, objects, tmp_path)
        until(lambda: pods[1].codes == [0], 30, pods)
