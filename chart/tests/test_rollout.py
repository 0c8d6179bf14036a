"""An upgrade that mends a mistake goes through: the StatefulSet controller's rule, played over the real commands.

The rule (RollingUpdate): from the highest ordinal down, a pod of an old revision is replaced; a pod of the new one is
waited for until it is Ready. So what a pod of the new revision needs to be Ready must never come from one of the old.
"""

import time

import pytest
from patience import patient
from rendered_pods import Pod, cluster, rendered, summary, until

pytestmark = [pytest.mark.helm, pytest.mark.slow, pytest.mark.timeout(900)]


def nothing_runs(pod: Pod) -> None:
    """As after ErrImagePull, or while no node has the memory that is asked for."""
    pod._stopping = True
    pod.host.kill()


# values of the first revision, what keeps its pods from running, what they say
MISTAKES = {
    "an image that is not there": ("image.tag=nonsense", nothing_runs, ""),
    "a data set that is not there": ("dataset.source=imagefolder:/nowhere", None, "there is no such file or folder"),
    "an interface that is not there": ("train.distributed.interface=eth77", None, "interface is eth77, which"),
}


def roll_out(hosts, pods: list[Pod], old: list[Pod], objects, folder) -> bool:
    """One look of the controller; whether it has nothing left to do."""
    for ordinal in reversed(range(len(pods))):
        if pods[ordinal] is old[ordinal]:
            pods[ordinal]._stopping = True
            hosts[ordinal].kill()
            pods[ordinal]._thread.join(30)
            pods[ordinal] = Pod(hosts[ordinal], ordinal, objects, folder)
            return False
        if not pods[ordinal].ready:
            return False
    return True


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_corrected_value_goes_through(tmp_path, mistake):
    wrong, act, words = MISTAKES[mistake]
    with cluster(rendered(tmp_path, options=(f"--set={wrong}",)), tmp_path) as (hosts, pods):
        if act:
            for pod in pods:
                act(pod)
        else:
            until(lambda: words in pods[0].text() + pods[1].text(), 120, pods)
        old, corrected = list(pods), rendered(tmp_path)
        end = time.monotonic() + patient(240)
        while not roll_out(hosts, pods, old, corrected, tmp_path):
            assert time.monotonic() < end, "\n\n".join(pod.text()[-3000:] for pod in pods)
            time.sleep(0.5)
        until(lambda: all("holding until" in pod.text() for pod in pods), 240, pods)
        assert (summary(tmp_path)["world_size"], summary(tmp_path)["epochs"]) == (2, 2)
