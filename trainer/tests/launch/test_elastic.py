"""An elastic group on two hosts: a node leaves for good, flaps, is cut off, comes back; training goes on meanwhile."""

from __future__ import annotations

import json
import signal

import elastic
import hosts
import pods
import pytest
import yaml
from runs import cli_command, history, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder(module_path):
    (module_path / "config.yaml").write_text(yaml.safe_dump(elastic.CONFIG))
    return module_path


@pytest.fixture(scope="module")
def undisturbed(folder, tiny_data):
    """The run folder of an undisturbed training by two ranks."""
    paths = ["--config", str(folder / "config.yaml"), "--data-dir", str(tiny_data), "--runs-dir", str(folder / "runs")]
    done = run(cli_command("launch", *paths, "--name", "undisturbed"))
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "undisturbed"


@pytest.fixture
def group(folder, tiny_data, request):
    """Two pods that train, of a run named like the test, of which one may go on alone."""
    with pods.group(folder, folder / "config.yaml", tiny_data, request.node.name[5:25], *elastic.options()) as pair:
        for rank in (0, 1):
            pair.start(rank)
        pair.until(lambda: pair.step >= 4, 150, "step 4")
        yield pair


def test_a_node_that_is_gone_for_good_is_done_without_and_taken_back(group, undisturbed):
    group.pods[1].stop()
    frozen = elastic.goes_on_alone(group)
    ended = group.pods[0].text().count("ended (")
    for lives in (1, 2):  # it flaps
        second = group.start(1)
        group.until(lambda lives=lives, second=second: elastic.outside(second) == lives, 150, "node 1 outside")
        if lives == 1:
            second.stop()
    assert group.pods[0].text().count("ended (") == ended, "who flaps outside disturbs nobody"
    elastic.comes_back(group, frozen)
    group.until(lambda: group.done, 250, "the end")
    assert "saved; the same command resumes" in group.pods[0].text()
    elastic.assert_equal_but_for_rounding(group.run_dir, undisturbed)
    members = group.summary()["members"]
    assert [(each["nodes"], each["world_size"]) for each in members] == [([0, 1], 2), ([0], 1), ([0, 1], 2)]
    assert (members[0]["from"], members[-1]["to"]) == (0, 24)
    assert history(group.run_dir)[-1]["members"][-1]["to"] == 24
    assert json.loads((group.run_dir / "members.json").read_text())["most"] == 2
    assert group.pods[0].codes == [], "the container of who stayed did not end"


@pytest.mark.nightly
def test_a_node_that_was_cut_off_with_an_older_view_trains_nothing_until_it_is_taken_back(group, undisturbed):
    def files() -> dict:
        return {path: path.read_bytes() for path in group.run_dir.rglob("*") if path.is_file()}

    group.machines[0].link(up=False)
    asleep = group.machines[1].signal(signal.SIGSTOP)  # its rank and its agent keep the former attempt's view
    frozen = elastic.goes_on_alone(group)
    before = files()
    group.machines[0].link(up=True)
    hosts.send(asleep, signal.SIGCONT)
    group.until(lambda: elastic.outside(group.pods[1]), 150, "node 1 outside")
    assert files() == before
    elastic.comes_back(group, frozen)
    group.until(lambda: group.done, 250, "the end")
    assert [pod.codes for pod in group.pods] == [[], []]
    elastic.assert_equal_but_for_rounding(group.run_dir, undisturbed)
