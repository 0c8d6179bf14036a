"""The configuration: precedence, and each mistake answered with the key's path and what would be right."""

from __future__ import annotations

import json

import pytest
import yaml
from runs import cli

from k8scifar.config import loading
from k8scifar.config.loading import merge
from k8scifar.config.schema import Config, flatten
from k8scifar.config.sections import Stage
from k8scifar.errors import UserError


def test_precedence_defaults_recipe_file_set(tmp_path):
    path = tmp_path / "user.yaml"
    path.write_text("epochs: 7\noptimizer: {momentum: 0.8}\n")
    assert loading.load(recipe_name="quick").epochs == 18
    config = loading.load(path, ["optimizer.lr=0.5"], "quick")
    assert (config.epochs, config.optimizer.momentum, config.optimizer.lr) == (7, 0.8, 0.5)
    assert config.label_smoothing == loading.recipe("quick")["label_smoothing"]
    assert config.model.name == "resnet18"


def test_file_can_name_its_recipe_and_command_line_wins(tmp_path):
    path = tmp_path / "user.yaml"
    path.write_text("recipe: standard\n")
    assert loading.load(path).recipe == "standard"
    assert loading.load(path, recipe_name="quick").recipe == "quick"


@pytest.mark.parametrize("name", loading.recipe_names())
def test_every_recipe_is_valid_and_suits_two_ranks(name):
    config = loading.load(recipe_name=name, sets=["distributed.world_size=2"])
    assert config.recipe == name
    assert 50_000 % config.global_batch < 100, "nearly every picture once an epoch"


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["epoch=3"], ["'epoch'", "'epochs'"]),
        (["optimiser.lr=1"], ["optimizer"]),
        (["lr=1"], ["'lr'", "'optimizer.lr'"]),
        (["optimizer.momentun=0.9"], ["optimizer.momentum"]),
        (["optimizer.lr=-1"], ["optimizer.lr", "-1", "greater than 0"]),
        (["epochs=many"], ["epochs", "'many'", "integer"]),
        (["global_batch=100", "micro_batch=33"], ["global_batch 100", "micro_batch to 25"]),
        (["distributed.world_size=7"], ["7 ranks", "global_batch"]),
        (["resolution=[{until: 0.4, pixels: 32}]"], ["resolution", "1.0"]),
        (["augment.flip=sometimes"], ["augment.flip", "'sometimes'", "True, False or 'alternating'"]),
        (["recipe=quik"], ["'quik'", "'quick'"]),
        (["epochs"], ["key=value"]),
        (["epochs=[1"], ["not YAML"]),
    ],
)
def test_mistakes_name_the_key_and_the_remedy(sets, words):
    with pytest.raises(UserError) as caught:
        loading.load(sets=sets)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: [1", "not YAML"), ("- 1\n- 2\n", "key: value"), ("epochs: 0\n", "epochs"), ("\xff", "epochs: ")],
)
def test_bad_files(tmp_path, text, words):
    path = tmp_path / "user.yaml"
    path.write_bytes(text.encode("latin-1"))
    if words == "epochs: ":
        words = "not YAML"
    with pytest.raises(UserError, match=words):
        loading.load(path)


def test_missing_file():
    with pytest.raises(UserError, match=r"nowhere\.yaml.*check the path"):
        loading.load("nowhere.yaml")


def test_lists_are_replaced_and_mappings_merged():
    assert merge({"a": {"b": 1, "c": [1, 2]}}, {"a": {"c": [3]}}) == {"a": {"b": 1, "c": [3]}}
    assert flatten({"a": {"b": 1}, "c": [2]}) == {"a.b": 1, "c": [2]}


def test_fingerprint_sees_what_ranks_must_share_and_nothing_else():
    base = Config()
    assert base.fingerprint() == Config(name="other", runs_dir="/elsewhere").fingerprint()
    assert base.fingerprint() != Config(seed=1).fingerprint()
    assert base.fingerprint() != Config(resolution=[Stage(until=1.0, pixels=24)]).fingerprint()


@pytest.mark.parametrize(
    "change",
    ["optimizer.lr=0.3", "optimizer.weight_decay=0", "schedule.warmup=0.3", "augment.translate=1", "data.holdout=100",
     "label_smoothing=0.3", "micro_batch=120", "seed=5", "last_batch=pad", "epochs=3", "model.zero_init=true"],
)  # fmt: skip
def test_what_decides_the_weights_is_a_difference_and_must_be_alike_on_all_ranks(change):
    base, other = loading.load(), loading.load(sets=[change])
    assert list(other.differences(base.identity())) == [change.partition("=")[0]]
    assert other.shared() != base.shared() and other.fingerprint() != base.fingerprint()


def test_places_and_logs_may_differ_from_rank_to_rank():
    sets = [
        "runs_dir=/a",
        "name=b",
        "data.dir=/c",
        "log.every_steps=3",
        "hardware.threads=2",
        "distributed.interface=eth7",
    ]
    base, other = loading.load(), loading.load(sets=sets)
    assert other.shared() == base.shared() and other.differences(base.identity()) == {}


def test_config_command_prints_what_load_resolves():
    done = cli("config", "--recipe", "quick", "--set", "seed=3")
    assert done.returncode == 0, done.stderr
    assert Config.model_validate(yaml.safe_load(done.stdout)) == loading.load(sets=["seed=3"], recipe_name="quick")


def test_schema_is_closed_and_documents_every_field():
    schema = json.loads(cli("config", "--schema").stdout)
    for section in [schema, *schema["$defs"].values()]:
        assert section["additionalProperties"] is False
        for name, field in section["properties"].items():
            assert field.get("description") or "$ref" in field, f"{name} is undocumented"


def test_a_configuration_that_a_former_version_wrote_still_loads(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("ema: {decay: 0.0}\ndata: {source: auto}\ndistributed: {powersgd_rank: 4, comm: bf16}\n")
    assert loading.load(path) == loading.load(sets=["distributed.comm=bf16"])
    for key, value in (("ema", "{decay: 0.9}"), ("distributed.powersgd_rank", "8"), ("data.source", "cifar10")):
        section, _, name = key.partition(".")
        path.write_text(f"{section}: {{{name}: {value}}}" if name else f"{section}: {value}")
        with pytest.raises(UserError, match=f"{key} is no longer there; leave it out"):
            loading.load(path)
    with pytest.raises(UserError, match=r"distributed\.comm = 'powersgd': input should be 'auto', .* or 'local-sgd'"):
        loading.load(sets=["distributed.comm=powersgd"])
