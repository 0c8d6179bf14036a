"""`make diagnose`: what it collects, and that no secret is in it; kubectl is a stand-in."""

from __future__ import annotations

import json
import tarfile

import pytest
from cluster_stage import everything_runs

pytestmark = pytest.mark.helm
SECRETS = {
    "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLE": "an AWS secret key",
    "AKIAIOSFODNN7EXAMPLE": "an AWS key id",
    "hunter2proxy": "a proxy's password",
    "mount0password": "a mount option",
    "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJzYSJ9.c2lnbmF0dXJl": "a service account's token",
    "b3RoZXJzZWNyZXQ=": "a Secret's data",
    "f00dsignature": "a signed address",
    "correct horse": "a variable whose name says nothing",
}
AWS, AWS_ID, PROXY, MOUNTED, TOKEN, DATA, SIGNATURE, PLAIN = SECRETS


def test_diagnose_collects_everything_but_secrets(stage, rendered):
    items = everything_runs(rendered)
    spec = items[-2]["spec"]["containers"][0]
    spec["env"] += [{"name": "HTTPS_PROXY", "value": f"http://me:{PROXY}@proxy:3128"}]
    spec["env"] += [{"name": "AWS_SECRET_ACCESS_KEY", "value": AWS}, {"name": "PLAIN", "value": PLAIN}]
    items.append({"kind": "Secret", "metadata": {"name": "keys"}, "data": {"password": DATA}})
    items[0]["metadata"]["annotations"]["kubectl.kubernetes.io/last-applied-configuration"] = json.dumps(
        {"env": [{"name": "X", "value": PROXY}]}
    )
    items[0]["spec"]["mountOptions"] = [f"vers=3.0,password={MOUNTED}", f"username=me,pass={MOUNTED}"]
    stage.objects(items)
    (stage.home / "description").write_text(
        f"Mount options: nfsvers=4.1,password={MOUNTED}\nHTTPS_PROXY: http://me:{PROXY}@proxy:3128\n"
        f"PLAIN:  {PLAIN}\nNode: node-a\n"
    )
    (stage.home / "log").write_text(
        f"downloading https://me:{PROXY}@host/a.tar.gz?X-Amz-Signature={SIGNATURE}&file=7\n"
        f"Authorization: Bearer {TOKEN}\nAWS_SECRET_ACCESS_KEY={AWS} aws_access_key_id: {AWS_ID}\nstep 7 loss 1.25\n"
    )
    values = {"dataset": {"credentialsSecret": "keys"}, "extraEnv": [{"name": "P", "value": PROXY}]}
    values["anything"] = {"password": MOUNTED}
    stage.tool("helm", f"test $1 != get || echo '{json.dumps(values)}'")
    done = stage.run("diagnose")
    assert done.returncode == 0, done.stderr
    (path,) = (stage.home / "results").glob("diagnose-cifar-*.tar.gz")
    with tarfile.open(path) as tar:
        texts = {name.partition("/")[2]: tar.extractfile(name).read().decode() for name in tar.getnames()}
    for name, text in texts.items():
        for secret, what in SECRETS.items():
            assert secret not in text, f"{what} in {name}"
    names = ("versions.txt", "preflight.txt", "release/objects.json", "release/helm-values.json", "release/events.txt")
    assert {*names, "logs/cifar-0.trainer.log", "logs/cifar-1.preflight.previous.log", "run/status.json"} <= set(texts)
    assert "step 7 loss 1.25" in texts["logs/cifar-0.trainer.log"], "what is no secret stays"
    assert json.loads(texts["release/helm-values.json"])["dataset"] == {"credentialsSecret": "keys"}
    assert "cifar-0 preflight: exit code 0" in texts["preflight.txt"]
    shown = [item for item in json.loads(texts["release/objects.json"])["items"] if item["kind"] == "Pod"]
    variables = {each["name"]: each.get("value") for each in shown[1]["spec"]["containers"][0]["env"]}
    assert variables["K8SCIFAR_HEARTBEAT"] == "/tmp/heartbeat"
    assert variables["HTTPS_PROXY"] == variables["PLAIN"] == "[left out]"
    assert not [line for line in stage.said("get") if "secret" in line]
