"""What a test starts ends with its runner, killed as it may be; limits of time follow the machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import hosts
import janitor
import patience
import pytest
from runs import HELPERS

HERE = HELPERS
PROJECT = HELPERS.parents[1] / "pyproject.toml"


@pytest.fixture
def case(tmp_path):
    """``case("-n0")`` starts pytest on stray_case.py; returns it, and what it says that it has started."""
    hosts.require()
    if subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    started = []

    def start(*options: str) -> tuple[subprocess.Popen, dict]:
        said = tmp_path / f"said-{len(started)}"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / "stray_case.py"), *options]
        # Its own mark, as of a runner that a person starts.
        environment = {key: value for key, value in os.environ.items() if key != janitor.MARK} | {
            "STRAY_CASE": str(said)
        }
        log = open(tmp_path / "log", "w")  # noqa: SIM115
        runner = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        started.append(runner)
        end = time.monotonic() + patience.patient(60)
        while not said.exists():
            assert time.monotonic() < end and runner.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        return runner, json.loads(said.read_text())

    yield start
    for runner in started:
        runner.kill()
        runner.wait()


def left(told: dict) -> list[str]:
    """What is still there of all that was started."""
    found = [f"process {pid}: {janitor.command_line(pid)}" for pid in told["pids"] if janitor.command_line(pid)]
    found += [space for space in told["spaces"] if space in os.listdir("/run/netns")]
    found += [space for space in told["spaces"] if Path("/etc/netns", space).exists()]
    return found + [told["mount"]] * os.path.ismount(told["mount"])


def until_nothing_is_left(told: dict) -> None:
    end = time.monotonic() + patience.patient(30)
    while found := left(told):
        assert time.monotonic() < end, found
        time.sleep(0.05)


@pytest.mark.parametrize("options", [("-n0",), ("-n1",)])
def test_a_killed_runner_leaves_nothing(case, options):
    runner, told = case(*options)
    assert len(left(told)) > 8, "it has started something"
    os.killpg(runner.pid, signal.SIGKILL)
    until_nothing_is_left(told)


def test_a_killed_worker_leaves_nothing(case):
    """As where pytest-timeout ends it; the one who started it lives on."""
    runner, told = case("-n1", "--max-worker-restart=0")
    assert told["runner"] != runner.pid
    os.kill(told["runner"], signal.SIGKILL)
    until_nothing_is_left(told)
    assert runner.wait(timeout=60) == 1


def test_a_test_that_is_ended_by_its_limit_leaves_nothing(case):
    runner, told = case("-n0", "--timeout=10")
    assert runner.wait(timeout=60) == 1
    until_nothing_is_left(told)


def test_what_a_dead_runner_and_a_dead_janitor_left_is_swept_by_the_next(case):
    runner, told = case("-n0")
    janitors = [int(pid) for pid in os.listdir("/proc") if pid.isdigit()]
    janitors = [
        pid for pid in janitors if janitor.command_line(pid).endswith(f"janitor.py {janitor.mark(runner.pid)} ")
    ]
    assert len(janitors) == 1
    janitor.kill(janitors[0])
    runner.kill()
    runner.wait()
    time.sleep(1)
    assert len(left(told)) > 6, "nobody cleans up"
    _, second = case("-n0")
    assert left(told) == []
    assert len(left(second)) > 8, "those of a runner that lives are left alone"


def test_limits_follow_the_machine():
    """By variable, by measure, and never below what is written."""

    def seconds(told: str | None) -> float:
        script = f"import sys; sys.path.insert(0, {str(HERE)!r}); import patience; print(patience.patient(10))"
        environment = {key: value for key, value in os.environ.items() if key != patience.VARIABLE}
        environment |= {patience.VARIABLE: told} if told else {}
        return float(
            subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True).stdout
        )

    assert seconds("3") == 30 and seconds("0.1") == 10 and seconds(None) >= 10


@pytest.mark.parametrize("timed", ["run", "wait", "communicate"])
def test_every_wait_for_a_process_is_patient(monkeypatch, timed):
    """A process that takes two seconds, with a limit of one on a machine that is ten times as slow."""
    monkeypatch.setenv(patience.VARIABLE, "10")
    command = [sys.executable, "-c", "import time; time.sleep(2)"]
    if timed == "run":
        assert subprocess.run(command, timeout=1).returncode == 0
    else:
        process = subprocess.Popen(command)
        getattr(process, timed)(timeout=1)
        assert process.returncode == 0
    monkeypatch.setenv(patience.VARIABLE, "1")
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(command, timeout=1)


def test_a_tests_own_limit_is_multiplied_too():
    """300 s of pytest.ini's, and what a test says itself."""
    script = (
        "import pytest, suite\n"
        "class Item:\n"
        "    def __init__(self, *marks): self.marks = list(marks)\n"
        "    def get_closest_marker(self, name): return next((m for m in self.marks if m.name == name), None)\n"
        "    def add_marker(self, mark, append): self.marks.insert(0, mark.mark)\n"
        "class Config:\n"
        "    def getoption(self, name, default): return 300.0\n"
        "items = [Item(), Item(pytest.mark.timeout(900).mark)]\n"
        "suite.pytest_collection_modifyitems(Config(), items)\n"
        "print([item.marks[0].args[0] for item in items])\n"
    )
    environment = os.environ | {patience.VARIABLE: "2", "PYTHONPATH": str(HERE)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout == "[600.0, 1800.0]\n", done.stderr


TWO_TESTS = """
def test_one(tmp_path, module_path):
    (tmp_path / "mine").write_text("x")
    (module_path / "shared").write_text("x")

def test_two(tmp_path, module_path):
    (tmp_path / "mine").write_text("x")
    assert (module_path / "shared").exists() and {passes}
"""


def suite_of(folder: Path, *arguments: str, temporary: Path) -> subprocess.CompletedProcess:
    """Run pytest in `folder` as the Makefile does."""
    command = [sys.executable, "-m", "pytest", "-c", str(PROJECT), "-p", "suite", "-p", "no:cacheprovider", *arguments]
    environment = {key: value for key, value in os.environ.items() if key != janitor.MARK} | {"TMPDIR": str(temporary)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("workers", ["-n0", "-n2"])
@pytest.mark.parametrize("passes", [True, False])
def test_the_files_of_tests_that_pass_go_with_them(tmp_path, passes, workers):
    """A run of all tests wrote 20 GB, which stayed: three of them filled a disk."""
    case, temporary = tmp_path / "test_case.py", tmp_path / "temporary"
    case.write_text(TWO_TESTS.format(passes=passes))
    temporary.mkdir()
    done = suite_of(tmp_path, workers, "--dist=loadfile", str(case), temporary=temporary)
    assert ("2 passed" if passes else "1 failed, 1 passed") in done.stdout, done.stdout + done.stderr
    left = sorted(path.name for path in temporary.rglob("*") if path.name in ("mine", "shared"))
    assert left == ([] if passes else ["mine", "shared"]), "only what shows why a test failed"


def test_a_disk_without_room_for_the_tests_is_named_at_once(small_disk, tmp_path):
    full = small_disk("1m")
    (tmp_path / "test_case.py").write_text("def test_one():\n    pass\n")
    for arguments in ([], [str(tmp_path)]):
        done = suite_of(tmp_path, *arguments, temporary=full)
        assert done.returncode == 2
        assert f"{full} has 0.0 GB left: make room there" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert suite_of(tmp_path, "test_case.py", temporary=full).returncode == 0, "one file may fit"
