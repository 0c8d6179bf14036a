"""The chart's values: what is refused, that each has an effect, and that the generated files are fresh."""

import copy
import json

import jsonschema
import pytest
import yaml
from chart_cases import DEFAULTS, leaves, put
from chart_helpers import CHART, NFS, container, refused, run, trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from k8scifar.config import loading
from k8scifar.errors import UserError

pytestmark = pytest.mark.helm
SCHEMA = json.loads((CHART / "values.schema.json").read_text())


@pytest.mark.parametrize("major", [3, 4])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "set nfs.server to your NFS server's address"),
        (("two-node.yaml",), "set nfs.server to your NFS server's address"),
        ((*NFS, "--set=nfs.path="), "nfs.path"),
        ((*NFS, "--set=nodes=0"), "nodes"),
        ((*NFS, "--set=nodes=-1"), "nodes"),
        ((*NFS, "--set=nodes=two"), "nodes"),
        ((*NFS, "--set=dataset.existingClaim=a,dataset.nfs.server=b"), "dataset.nfs.server and dataset.existingClaim"),
        (("--set=nfs.server=a,dataset.existingClaim=b,checkpoints.existingClaim=c",), "remove nfs.server"),
        (("--set=dataset.existingClaim=a,checkpoints.existingClaim=a,dataset.folder=runs",), "different names"),
        ((*NFS, "--set=dataset.folder=runs"), "different names"),
        ((*NFS, "--set=dataset.folder=runs/data"), "different names"),
        ((*NFS, "--set=dataset.nfs.server=b"), "dataset.nfs.path"),
        ((*NFS, "--set=dataset.folder=a/../../b"), "must not lead out"),
        ((*NFS, "--set=dataset.accessMode=ReadWriteOnce"), "ReadWriteMany"),
        ((*NFS, "--set=nod=3"), "nod"),
        ((*NFS, "--set=train.optimizer.lrr=3"), "lrr"),
        ((*NFS, "--set=train.epochs=0"), "epochs"),
        (
            (*NFS, "--set=train.recipe=fast"),
            "is unknown: set it to one of best, demo, quick",
        ),
        ((*NFS, "--set=train.name=.."), 'train.name ".." is not a name of a run'),
        ((*NFS, "--set=train.name=a b"), "train.name"),
        ((*NFS, "--set=train.distributed.interface=eth0 eth1"), "train.distributed.interface"),
        ((*NFS, "--set=train.optimizer.lr=1000.5"), "train.optimizer.lr 1000.5 must be at most 100"),
        ((*NFS, "--set=train.resolution[0].until=1.5,train.resolution[0].pixels=8"), "resolution[0].until 1.5 must be"),
        ((*NFS, "--set=affinity.podAntiAffinity.requiredDuringSchedulingIgnoredDuringExecution.a=b"), "required"),
        ((*NFS, "--set=tensorboard=false"), "tensorboard"),
        ((*NFS, "--set=train.optimizer=null"), "optimizer"),
        ((*NFS, "--set=train.data.dir=/x"), "data"),
        ((*NFS, "--set=train.distributed.world_size=2"), "world_size"),
        ((*NFS, "--set=tensorboard.ingress.hosts=3"), "hosts"),
        (
            (*NFS, "--set=nodes=3,train.global_batch=500,train.micro_batch=250"),
            "3 ranks (nodes x processes) can't share: each needs one; set train.micro_batch to a divisor of 500 that",
        ),
        ((*NFS, "--set=nodes=4,train.global_batch=500,train.micro_batch=250"), "that is at most 125, or start fewer"),
        ((*NFS, "--set=processesPerNode=2,train.global_batch=500,train.micro_batch=250"), "is at most 125"),
        (
            (*NFS, "--set=nodes=3,train.global_batch=250,train.micro_batch=50,train.distributed.comm=local-sgd"),
            "can't share equally, as train.distributed.comm=local-sgd asks: choose a train.global_batch that 150",
        ),
        ((*NFS, "--set=train.global_batch=510,train.micro_batch=250"), "not a multiple"),
        ((*NFS, "--set=gpu.enabled=true,gpu.resourceName="), "gpu.resourceName"),
        ((*NFS, "--set=gpu.enabled=true,train.hardware.device=cpu"), "train.hardware.device"),
        ((*NFS, "--set=workload.shutdownTimeoutSeconds=85"), "terminationGracePeriodSeconds 90 must be at least"),
        ((*NFS, "--set=workload.kind=Job,completion.policy=scaleDown"), "is for a StatefulSet"),
        ((*NFS, "--set=workload.kind=Job,elastic.enabled=true"), "no pod of an Indexed Job may be missing"),
        ((*NFS, "--set=elastic.minNodes=3"), "elastic.minNodes 3 is more than nodes 2: lower it"),
        ((*NFS, "--set=probes.livenessSeconds=60"), "must be more than train.distributed.timeout_seconds 60"),
        ((*NFS, "--set=tensorboard.ingress.enabled=true"), "tensorboard.ingress.host"),
        ((*NFS, "--set=user.uid=0"), "uid"),
        ((*NFS, "--set=hostNetwork=true,podAntiAffinity.mode=preferred"), "would claim its port 29500 together"),
        ((*NFS, "--set=dataset.s3Endpoint=minio"), "s3Endpoint"),
    ],
)
def test_bad_values_are_refused_with_a_sentence(options, words, major):
    said = refused(*options, major=major)
    assert words in said
    assert "nil pointer" not in said and "executing" not in said


@pytest.mark.parametrize("what", ["schema", "docs"])
def test_generated_files_are_fresh(what, capsys):
    import chart_files

    assert chart_files.main([what, "--check"]) == 0, capsys.readouterr().err


def test_a_stale_file_is_found(monkeypatch, tmp_path, capsys):
    import shutil

    import chart_files

    shutil.copytree(CHART, tmp_path / "chart")
    monkeypatch.setattr(chart_files, "CHART", tmp_path / "chart")
    values = tmp_path / "chart" / "values.yaml"
    values.write_text(values.read_text().replace("# Size of /tmp.", "# Size of the scratch folder."))
    assert chart_files.main(["schema", "--check"]) == 1
    assert chart_files.main(["docs", "--check"]) == 1
    assert "make schema" in capsys.readouterr().err


def test_the_schema_is_closed_and_knows_every_value():
    def walk(values, schema, path):
        if not isinstance(values, dict) or not values:
            return
        if "properties" not in schema:
            assert schema.get("additionalProperties"), path  # a map of the user's own keys
            return
        assert schema["additionalProperties"] is False, path
        for key, value in values.items():
            walk(value, schema["properties"][key], f"{path}.{key}")
        if not path.startswith(".train"):
            helms_own = set() if path else {"global"}  # what Helm hands to a chart that is part of another
            assert set(schema["properties"]) == set(values) | helms_own, path

    # Kubernetes' own objects, whose defaults name a part of their keys.
    known = copy.deepcopy(DEFAULTS)
    for path in ("resources", "initResources", "tensorboard.resources"):
        *parents, last = path.split(".")
        section = known
        for parent in parents:
            section = section[parent]
        section[last] = {}
    walk(known, SCHEMA, "")


def test_every_value_has_a_comment():
    import chart_files

    described = {path for path, key in chart_files.keys((CHART / "values.yaml").read_text()).items() if key.comment}
    for path in leaves(DEFAULTS):
        assert any(path == known or path.startswith(known + ".") for known in described), path


SCALARS = st.one_of(
    st.integers(-3, 10**6), st.floats(-2, 200, allow_nan=False), st.booleans(), st.none(), st.text(max_size=6)
)


def trainer_keys(schema, path=()):
    for key, child in schema["properties"].items():
        if child.get("properties"):
            yield from trainer_keys(child, (*path, key))
        else:
            yield (*path, key)


@given(path=st.sampled_from(sorted(trainer_keys(SCHEMA["properties"]["train"]))), value=SCALARS)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_what_the_schema_accepts_for_a_training_key_the_trainer_accepts(path, value):
    tree: dict = {}
    put(tree, ".".join(path), value)
    try:
        jsonschema.validate({"train": tree}, SCHEMA)
    except jsonschema.ValidationError:
        return
    try:
        loading.validate(tree)
    except UserError as error:
        # Rules between two keys are the trainer's (and the templates'), and text for a number has no limits here.
        between = ("micro_batch", "global_batch", "nesterov", "resolution")
        assert any(word in str(error) for word in between) or isinstance(value, str), error


@given(key=st.from_regex(r"[a-z][a-z_]{0,12}", fullmatch=True), section=st.sampled_from(["", *sorted(DEFAULTS)]))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_no_unknown_key_passes(key, section):
    place = SCHEMA["properties"][section] if section else SCHEMA
    if place.get("type") != "object" or key in place.get("properties", {}) or "properties" not in place:
        return
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({section: {key: 1}} if section else {key: 1}, SCHEMA)


@given(
    nodes=st.integers(1, 40),
    processes=st.integers(1, 4),
    micro=st.sampled_from([25, 50, 60, 125, 250]),
    batches=st.integers(1, 12),
    kind=st.sampled_from(["StatefulSet", "Job"]),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_helm_and_the_trainer_agree_on_what_ranks_can_share(nodes, processes, micro, batches, kind):
    ranks = nodes * processes
    batch = micro * batches
    train = {"global_batch": batch, "micro_batch": micro, "distributed": {"world_size": ranks}}
    try:
        loading.validate(train)
        fits = True
    except UserError:
        fits = False
    options = f"nodes={nodes},processesPerNode={processes},workload.kind={kind}"
    done = run(*NFS, f"--set={options},train.global_batch={batch},train.micro_batch={micro}")
    assert (done.returncode == 0) == fits, done.stderr
    if fits:
        objects = [item for item in yaml.safe_load_all(done.stdout) if item]
        assert f"--nnodes={nodes}" in container(trainer(objects))["args"]
        assert f"--nproc-per-node={processes}" in container(trainer(objects))["args"]
