"""The configuration: what is read, what is filled in, and what is refused with which words.

A refusal is checked by its text, because the text is all that a user sees: the place as a dotted path, what was got and
expected, and what to do. Each case is the one good file below with one thing changed.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from embeddings.optim import OPTIMIZERS
from embeddings.table import Admission
from trainer.bodies import BODIES
from trainer.config import Config, as_dict, flatten
from trainer.configfile import load
from trainer.errors import UserError, nearest
from trainer.learner import check, row_optimizer
from trainer.pieces import Names, make

GOOD = """
name: small
data: {path: logs, group: request_id}
features:
  user_id: {kind: id, table: user}
  history: {kind: ids, table: item, max_len: 10}
  position: {kind: id, table: item}
  price: {kind: number, transform: log1p}
tables:
  user: {dim: 8, capacity_rows: 64}
  item: {dim: 8}
tasks:
  click: {}
  cart: {given: click}
  buy: {given: cart}
  watch: {label: watch_s, loss: mse, where: click}
model:
  body: {kind: mmoe, num_experts: 3}
  position: {features: [position], tasks: [click]}
  balance: {weights: {watch: 0.1}}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "model.yaml"
    file.write_text(GOOD)
    return file


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as raised:
        load(str(path), overrides)
    return str(raised.value)


def refusal_of(path: Path, text: str) -> str:
    path.write_text(text)
    return refusal(path)


# What is read.


def test_what_is_not_written_has_its_default(path: Path) -> None:
    config = load(str(path))
    assert (config.train.workers, config.train.batch_size, config.train.precision) == (2, 4096, "fp32")
    assert (config.train.rows.optimizer, config.train.dense.optimizer) == ("rowwise_adagrad", "adam")
    assert (config.data.day_column, config.data.lanes, config.data.keys, config.data.weight) == ("day", 24, (), None)
    assert (config.tables["item"].capacity_rows, config.tables["item"].init_scale) == (65_536, 0.0)
    assert (config.features["user_id"].max_len, config.features["user_id"].pool) == (50, "mean")
    assert config.model.position is not None and config.model.position.layers == (16,)
    assert (config.nightly.missing_days, config.nightly.gate.tolerance) == ("stop", 0.03)
    assert config.tracking.mlflow == "sqlite:///mlflow.db" and config.fusion.powers == {}


def test_a_table_of_which_nothing_is_said_grows_admits_everyone_and_evicts_nobody(path: Path) -> None:
    table, train = load(str(path)).tables["item"], load(str(path)).train
    assert (table.grow, table.when_full, table.dtype, table.default_row) == (True, "evict", "float32", "zero")
    assert (table.min_count, table.admission) == (1, Admission("exact", 1 << 22, 30))
    assert (table.ttl_days, table.budget_rows, table.value, table.value_half_life_days) == (None, None, {}, 30.0)
    assert train.payload == "fp32" and {getattr(train.rows, name) for name in ("lr", "eps", "beta1", "l1")} == {None}


def test_everything_that_a_table_may_be_told_is_read(path: Path) -> None:
    settings = (
        "{dim: 8, dtype: float16, grow: false, when_full: reject, min_count: 3, default_row: trained, ttl_days: 30,"
        " budget_rows: 1000, value: {sightings: 0.1, impressions: 1, buy: 20}, value_half_life_days: 7,"
        " admission: {kind: sketch, cells: 65536, forget_days: 9}}"
    )
    table = load(str(path), [f"tables.user={settings}"]).tables["user"]
    assert (table.dtype, table.grow, table.when_full, table.default_row) == ("float16", False, "reject", "trained")
    assert (table.min_count, table.admission) == (3, Admission("sketch", 65536, 9))
    assert (table.ttl_days, table.budget_rows, table.value_half_life_days) == (30, 1000, 7.0)
    assert table.value == {"sightings": 0.1, "impressions": 1.0, "buy": 20.0}


def test_what_is_written_is_read_with_its_names_and_in_its_order(path: Path) -> None:
    config = load(str(path))
    assert config.name == "small" and config.data.group == "request_id"
    assert list(config.features) == ["user_id", "history", "position", "price"]
    assert list(config.tasks) == ["click", "cart", "buy", "watch"]
    assert config.features["history"].max_len == 10 and config.features["price"].transform == "log1p"
    assert config.tasks["watch"].label == "watch_s" and config.tasks["buy"].given == "cart"
    assert config.model.body == {"kind": "mmoe", "num_experts": 3}
    assert config.model.balance == {"weights": {"watch": 0.1}}


def test_a_configuration_is_frozen(path: Path) -> None:
    config = load(str(path))
    for frozen, name in [(config, "name"), (config.train, "workers"), (config.tables["user"], "dim")]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, name, 1)


def test_local_paths_lead_to_the_same_place_from_any_folder(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    config = load(path.name, ["checkpoints.path=s3://bucket/checkpoints"])
    assert config.data.path == str(path.parent / "logs")
    assert config.checkpoints.path == "s3://bucket/checkpoints"


def test_as_dict_and_flatten_give_every_value_its_dotted_path(path: Path) -> None:
    flat = flatten(as_dict(load(str(path))))
    assert flat["train.workers"] == 2 and flat["tables.user.dim"] == 8 and flat["model.body.num_experts"] == 3
    assert flat["tasks.buy.given"] == "cart" and flat["model.balance.weights.watch"] == 0.1
    assert flat["fusion.powers"] == {}, "an empty mapping stays, so that nothing is left out"
    assert flatten({"a": {"b": {"c": 1}}, "d": {}, "e": [1]}) == {"a.b.c": 1, "d": {}, "e": [1]}


@pytest.mark.parametrize(
    ("workers", "between"),
    [("4", (4, 4)), ("{min: 1, max: 4}", (1, 4)), ("{max: 4}", (1, 4)), ("{min: 2, max: 2}", (2, 2))],
)
def test_workers_are_a_number_or_bounds(path: Path, workers: str, between: tuple[int, int]) -> None:
    config = load(str(path), [f"train.workers={workers}"])
    assert config.train.workers_between == between
    assert flatten(as_dict(config)).keys() & {"train.workers", "train.workers.min"}, "they are told with their path"


@pytest.mark.parametrize(
    ("workers", "text"),
    [
        ("{max: 0}", "train.workers.max: out of bounds\n  got 0\n  expected 1 .. 24"),
        ("{min: 3, max: 2}", "train.workers.min: out of bounds\n  got 3\n  expected 1 .. 2"),
        ("{min: 1}", "train.workers.max: key 'max' is missing"),
        ("{max: 2, mxa: 2}", "train.workers.mxa: unknown key 'mxa'\n  -> did you mean 'max'?"),
        ("{min: few, max: 2}", "train.workers.min: wrong value\n  got 'few'\n  expected a whole number"),
        ("[1, 2]", "train.workers: wrong value\n  got [1, 2]\n  expected a whole number"),
    ],
)
def test_bounds_of_workers_that_are_none_are_refused(path: Path, workers: str, text: str) -> None:
    assert text in refusal(path, f"train.workers={workers}")


# Overrides.


def test_an_override_is_yaml_at_a_dotted_path_and_the_last_one_counts(path: Path) -> None:
    sets = ["train.workers=3", "train.workers=4", "data.keys=[a, b]", "name=other", "model.position=null"]
    config = load(str(path), sets)
    assert (config.train.workers, config.data.keys, config.name, config.model.position) == (
        4,
        ("a", "b"),
        "other",
        None,
    )
    assert load(str(path), ["data.path=hdfs://host/logs?a=b"]).data.path == "hdfs://host/logs?a=b"


def test_an_override_makes_the_sections_that_are_not_there(path: Path) -> None:
    config = load(str(path), ["train.dense.lr=0.5", "nightly.gate.addresses=[click@all]", "features.age.kind=number"])
    assert config.train.dense.lr == 0.5 and config.train.dense.optimizer == "adam"
    assert config.nightly.gate.addresses == ("click@all",)
    assert config.features["age"].kind == "number" and list(config.features)[-1] == "age"


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("train.workers", "--set: not an override\n  got train.workers\n  expected dotted.path=value"),
        ("=3", "--set: not an override"),
        (
            "name.x=1",
            "--set name.x: an override goes below a plain value\n  got 'name' is 'small'\n  -> end the path at 'name'",
        ),
        ("data.keys=[a", "--set data.keys=[a, line 1: not valid YAML"),
        ("tables={a: {dim: 1}, a: {dim: 2}}", "got key 'a' appears twice"),
        ("train.wokers=3", "train.wokers: unknown key 'wokers'\n  -> did you mean 'workers'?"),
        ("trian.workers=3", "trian: unknown key 'trian'\n  -> did you mean 'train'?"),
    ],
)
def test_a_bad_override_is_refused(path: Path, override: str, text: str) -> None:
    assert text in refusal(path, override)


# Files that are no configuration.


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"- a\n- b\n", "model.yaml: the configuration is not a mapping\n  got list\n  expected keys such as name"),
        (b"", "model.yaml: the configuration is not a mapping\n  got NoneType"),
        (b"name: x\n\tdata: 1\n", "model.yaml, line 2: not valid YAML\n  got found character"),
        (b"name: [x\n", "model.yaml, line 2: not valid YAML\n  got expected ',' or ']'"),
        (
            b"name: a\ntasks: {click: {}}\nname: b\n",
            "model.yaml, line 3: not valid YAML\n  got key 'name' appears twice",
        ),
        (b"tasks:\n  click: {}\n  click: {}\n", "model.yaml, line 3: not valid YAML\n  got key 'click' appears twice"),
        (b"? [a, b]\n: 1\n", "model.yaml, line 1: not valid YAML"),
        (b"PAR1\xff\xfe\x00", "model.yaml: cannot read the configuration\n  got a file that is not text"),
        (b"name: !!python/object/apply:os.getcwd []\n", "model.yaml, line 1: not valid YAML"),  # no code is run
    ],
)
def test_a_file_that_is_no_configuration_is_refused_with_its_line(path: Path, content: bytes, text: str) -> None:
    path.write_bytes(content)
    assert text in refusal(path)


def test_a_file_that_is_not_there_is_told_by_its_path(tmp_path: Path) -> None:
    for missing, why in [(tmp_path / "no.yaml", "No such file"), (tmp_path, "Is a directory")]:
        assert f"{missing}: cannot read the configuration\n  got {why}" in refusal(missing)


# Keys.


@pytest.mark.parametrize(
    ("override", "nearest_key"),
    [
        ("trains={}", "train"),
        ("data.groups=x", "group"),
        ("features.user_id.tabel=user", "table"),
        ("tables.user.capacity=9", "capacity_rows"),
        ("tasks.cart.givn=click", "given"),
        ("model.towers_layers=[8]", "tower_layers"),
        ("model.position.feature=[position]", "features"),
        ("train.rows.learn=0.1", "lr"),
        ("train.rows.bets1=0.9", "beta1"),
        ("train.payloads=bf16", "payload"),
        ("tables.user.min_counts=2", "min_count"),
        ("tables.user.when_fuil=evict", "when_full"),
        ("tables.user.admission.kinds=sketch", "kind"),
        ("tables.user.admission.forget=3", "forget_days"),
        ("features.user_id.off=[click]", "of"),
        ("nightly.gate.tolerence=0.1", "tolerance"),
        ("fusion.power={}", "powers"),
        ("tracking.mlfow=x", "mlflow"),
        ("checkpoints.paths=x", "path"),
    ],
)
def test_an_unknown_key_is_told_with_the_nearest_one_at_its_depth(path: Path, override: str, nearest_key: str) -> None:
    dotted = override.split("=")[0]
    text = refusal(path, override)
    assert f"{path}: {dotted}: unknown key '{dotted.split('.')[-1]}'" in text
    assert f"'{nearest_key}'?" in text or f"known: {nearest_key}" in text or f", {nearest_key}" in text


def test_the_nearest_word_is_offered_or_all_that_are_known() -> None:
    assert nearest("clik", ["click", "cart"]) == "did you mean 'click'?"
    assert nearest("zzz", ["click", "cart"]) == "known: cart, click"
    assert nearest("zzz", []) == "known: none"


@pytest.mark.parametrize("missing", ["name", "data", "features", "tables", "tasks", "model"])
def test_a_missing_key_is_named(path: Path, missing: str) -> None:
    tree = yaml.safe_load(GOOD)
    del tree[missing]
    assert refusal_of(path, yaml.safe_dump(tree)) == f"{path}: {missing}: key '{missing}' is missing\n  -> add it"


@pytest.mark.parametrize(
    ("override", "key"),
    [("data={}", "data.path"), ("features.x={}", "features.x.kind"), ("model={}", "model.body"),
     ("model.position={features: [position]}", "model.position.tasks")],
)  # fmt: skip
def test_a_missing_key_further_down_is_named_with_its_path(path: Path, override: str, key: str) -> None:
    assert f"{path}: {key}: key '{key.split('.')[-1]}' is missing" in refusal(path, override)


@pytest.mark.parametrize("tree", ["on: 1", "features: {no: {kind: number}}", "tables: {1: {dim: 8}}"])
def test_a_key_that_yaml_does_not_read_as_text_is_to_be_put_in_quotes(path: Path, tree: str) -> None:
    text = refusal_of(path, yaml.safe_dump(yaml.safe_load(GOOD) | yaml.safe_load(tree)))
    assert "a key is not text" in text and "-> put the key in quotes" in text


# Values.


@pytest.mark.parametrize(
    ("override", "got", "expected"),
    [
        ("train.workers=two", "'two'", "a whole number"),
        ("train.workers=1.5", "1.5", "a whole number"),
        ("nightly.hang_s=soon", "'soon'", "a number"),
        ("train.batch_size=null", "None", "a whole number"),
        ("train.dense.lr=fast", "'fast'", "a number"),
        ("features.user_id.kind=idx", "'idx'", "'id', 'ids', 'number' or 'id_stats'"),
        ("train.precision=fp16", "'fp16'", "'fp32' or 'bf16'"),
        ("train.payload=int8", "'int8'", "'fp32', 'bf16' or 'fp16'"),
        (
            "train.rows.optimizer=adamw",
            "'adamw'",
            "'sgd', 'adagrad', 'rowwise_adagrad', 'adam', 'rowwise_adam' or 'ftrl'",
        ),
        ("train.rows.beta1=high", "'high'", "a number"),
        ("tables.user.dtype=bfloat16", "'bfloat16'", "'float32' or 'float16'"),
        ("tables.user.when_full=drop", "'drop'", "'evict' or 'reject'"),
        ("tables.user.default_row=mean", "'mean'", "'zero' or 'trained'"),
        ("tables.user.admission.kind=bloom", "'bloom'", "'exact' or 'sketch'"),
        ("tables.user.admission=sketch", "'sketch'", "keys with values"),
        ("tables.user.admission.cells=1.5", "1.5", "a whole number"),
        ("tables.user.min_count=often", "'often'", "a whole number"),
        ("tables.user.ttl_days=1.5", "1.5", "a whole number"),
        ("tables.user.budget_rows=lots", "'lots'", "a whole number"),
        ("tables.user.value=click", "'click'", "keys with values"),
        ("tables.user.value.click=much", "'much'", "a number"),
        ("data.gauc=clicks", "'clicks'", "'impressions', 'positives' or 'equal'"),
        ("name=5", "5", "text"),
        ("data.keys=request_id", "'request_id'", "a list, such as [a, b]"),
        ("model.tower_layers=64", "64", "a list, such as [a, b]"),
        ("model.body=mmoe", "'mmoe'", "keys with values"),
        ("train=fast", "'fast'", "keys with values"),
        ("features=[user_id]", "['user_id']", "keys with values"),
    ],
)
def test_a_value_of_a_wrong_type_is_told_in_the_words_of_yaml(
    path: Path, override: str, got: str, expected: str
) -> None:
    place = override.split("=")[0]
    text = refusal(path, override)
    assert f"{path}: {place}: wrong value\n  got {got}\n  expected {expected}" in text
    assert "-> correct it in the file or with --set" in text


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.workers=0", "1 .. 24"),
        ("train.workers=25", "1 .. 24"),  # a lane is read by one worker
        ("nightly.max_failures=-1", "0 .. 1000000"),
        ("nightly.hang_s=-1", "0 .. 1000000"),
        ("train.batch_size=23", "24 .. 2147483648"),
        ("train.seed=-1", "0 .. 9223372036854775807"),
        ("nightly.gate.rows=0.5", "1.0 .. 1000000000.0"),
        ("nightly.gate.nulls=1.5", "0.0 .. 1.0"),
        ("nightly.gate.history=15", "1 .. 14"),
        ("nightly.gate.calibration_bounds={click@all: [1.2, 0.8]}", "1.2 .. 1000000000.0"),
        ("train.dense.lr=-0.1", "0 .. 1000000"),
        ("train.dense.lr=.nan", "0 .. 1000000"),
        ("train.rows.lr=.inf", "0 .. 1000000"),
        ("train.rows.l1=-1", "0 .. 1000000"),
        ("train.rows.beta1=1", "0 .. 0.999999"),
        ("train.rows.beta2=1.0", "0 .. 0.999999"),
        ("tables.user.min_count=0", "1 .. 2147483648"),
        ("tables.user={dim: 8, min_count: 256, admission: {kind: sketch}}", "1 .. 255"),  # where its counters end
        ("tables.user.admission.cells=0", "1 .. 1099511627776"),
        ("tables.user.admission.forget_days=0", "1 .. 1000000"),
        ("tables.user.ttl_days=0", "1 .. 1000000"),
        ("tables.user.budget_rows=0", "1 .. 1099511627776"),
        ("tables.user.value.click=-1", "0 .. 1000000000"),
        ("tables.user.value.click=.nan", "0 .. 1000000000"),
        ("tables.user.value_half_life_days=0", "1e-06 .. 1000000000.0"),
        ("tables.user.init_scale=-0.1", "0 .. 1000000"),
        ("data.lanes=0", "1 .. 65536"),
        ("data.max_bad_rows=0.6", "0 .. 0.5"),
        ("data.max_bad_rows=-0.1", "0 .. 0.5"),
        ("data.label_delay_days=-1", "0 .. 3650"),
        ("tasks.watch.scale=0", "1e-12 .. 1000000000000.0"),
        ("tables.user.dim=0", "1 .. 4096"),
        ("tables.user.capacity_rows=0", "1 .. 2147483648"),
        ("features.user_id.dropout=1.1", "0 .. 1"),
        ("features.history.max_len=0", "1 .. 2147483648"),
        ("model.tower_layers=[8, 0]", "1 .. 1048576"),
        ("model.position.layers=[-1]", "1 .. 1048576"),
        ("model.position.dropout=2", "0 .. 1"),
    ],
)
def test_a_number_out_of_its_bounds_is_told_with_the_bounds(path: Path, override: str, expected: str) -> None:
    text = refusal(path, override)
    assert "out of bounds" in text and f"expected {expected}" in text and "-> correct it" in text


@pytest.mark.parametrize("section", ["features", "tables", "tasks"])
def test_an_empty_section_is_refused(path: Path, section: str) -> None:
    numbers_only = {"features": {"price": {"kind": "number"}}, "model": {"body": {"kind": "mmoe"}}}
    text = refusal_of(path, yaml.safe_dump(yaml.safe_load(GOOD) | numbers_only | {section: {}}))
    assert text == f"{path}: {section}: no {section}\n  -> name at least one"


# Names.


@pytest.mark.parametrize(
    ("override", "place", "text"),
    [
        (
            "features.user_id.table=users",
            "features.user_id.table",
            "no table is called 'users'\n  -> did you mean 'user'?",
        ),
        ("features.x={kind: id}", "features.x", "an id feature names no table\n  -> add table: "),
        ("tasks.cart.given=clik", "tasks.cart.given", "no task is called 'clik'\n  -> did you mean 'click'?"),
        ("tasks.watch.where=zzz", "tasks.watch.where", "no task is called 'zzz'\n  -> known: buy, cart, click, watch"),
        (
            "tasks.buy.given=watch",
            "tasks.buy.given",
            "'watch' is no event\n  got loss: mse\n  expected a task with loss: bce",
        ),
        (
            "tasks.buy.where=click",
            "tasks.buy",
            "given goes without where\n  got where: click",
        ),
        (
            "tasks.cart.scale=2",
            "tasks.cart",
            "transform and scale go with a regression\n  got transform: none, scale: 2.0",
        ),
        (
            "tables.user.dim=6",
            "tables.user.dim",
            "a width that the kernels cannot keep\n  got 6\n  expected a multiple of 4",
        ),
        ("tasks.watch.given=click", "tasks.watch", "given goes without where\n  got where: click"),
        (
            "tasks.buy={given: click, via: watch}",
            "tasks.buy.via",
            "'watch' is no event\n  got loss: mse\n  expected a task with loss: bce",
        ),
        (
            "tasks.buy={via: cart}",
            "tasks.buy.via",
            "via goes with given\n  -> add given: the event before",
        ),
        (
            "tasks={click: {}, cart: {}, buy: {given: click, via: cart}, watch: {loss: mse}}",
            "tasks.buy.via",
            "a task and its via must be given the same event\n  got cart is given None, buy is given click\n  -> set",
        ),
        (
            "tasks.buy={given: click, propensity: {kind: ips}, where: cart}",
            "tasks.buy",
            "given goes without where\n  got where: cart",
        ),
        ("tasks.again={head: watchs}", "tasks.again.head", "no task is called 'watchs'\n  -> did you mean 'watch'?"),
        ("tasks.cart.links=[clik]", "tasks.cart.links.0", "no task is called 'clik'\n  -> did you mean 'click'?"),
        ("tasks.cart.calibrator=0.5", "tasks.cart.calibrator", "calibrator goes with transfer"),
        (
            "tasks.buy={where: click, transfer: click}",
            "tasks.buy.transfer",
            "transfer is between events over every row\n  got transfer: click, where: click\n  -> drop where",
        ),
        (
            "tasks.buy={given: click, cascade: click}",
            "tasks.buy.cascade",
            "cascade is between events over every row\n  got cascade: click, given: click\n  -> drop given",
        ),
        (
            "tasks.cart.propensity={kind: ips, product: -1}",
            "tasks.cart.propensity.product",
            "out of bounds\n  got -1.0",
        ),
        (
            "tasks.cart.negatives_kept=0.1",
            "tasks.cart.negatives_kept",
            "negatives_kept goes without given and where\n  got given: click, where: None",
        ),
        (
            "tasks.late={label: 2 * price}",
            "features.price",
            "a label is used as a feature\n  got column 'price' makes the label of task 'late'\n  -> drop the feature,",
        ),
        ("model.position.features=[price]", "model.position.features", "no id feature is called 'price'"),
        ("tables.user.value.clik=1", "tables.user.value", "no event is called 'clik'\n  -> did you mean 'click'?"),
        (
            "tables.user.value.impression=1",
            "tables.user.value",
            "no event is called 'impression'\n  -> did you mean 'im",
        ),
        ("tables.user.value.watch=1", "tables.user.value", "no event is called 'watch'\n  -> "),  # seconds are no event
        (
            "model.position.tasks=[clicks]",
            "model.position.tasks",
            "no task is called 'clicks'\n  -> did you mean 'click'?",
        ),
        (
            "model.position={features: [position], tasks: [watch], form: product}",
            "model.position.tasks",
            "'watch' is no event, and form: product multiplies chances\n  got loss: mse",
        ),
        (
            "features.position.dropout=0.1",
            "features.position.dropout",
            "a selection feature is dropped by the position",
        ),
    ],
)
def test_a_name_that_nothing_defines_is_told_with_the_nearest_one(
    path: Path, override: str, place: str, text: str
) -> None:
    assert f"{path}: {place}: {text}" in refusal(path, override)


@pytest.mark.parametrize(
    ("tasks", "circle"),
    [
        ("{click: {given: click}}", "click -> click"),
        ("{click: {given: buy}, cart: {given: click}, buy: {given: cart}}", "click -> buy -> cart -> click"),
        ("{click: {where: cart}, cart: {given: click}}", "click -> cart -> click"),
    ],
)
def test_tasks_that_hang_on_each_other_in_a_circle_are_refused(path: Path, tasks: str, circle: str) -> None:
    tree = yaml.safe_load(GOOD) | {"tasks": yaml.safe_load(tasks), "model": {"body": {"kind": "mmoe"}}}
    text = refusal_of(path, yaml.safe_dump(tree, sort_keys=False))
    assert "tasks.click: the tasks hang on each other in a circle" in text and f"got {circle}\n" in text


def test_an_unknown_name_is_found_wherever_it_stands_in_a_chain(path: Path) -> None:
    # The first task's chain runs into it before the task that names it is looked at.
    text = refusal(path, "tasks={click: {given: cart}, cart: {given: zzz}}", "model={body: {kind: mmoe}}")
    assert f"{path}: tasks.cart.given: no task is called 'zzz'" in text


@pytest.mark.parametrize("override", ["name=../x", "name='a/b'", "tables={'a/b': {}}", "tasks={'a@b': {}}", "name=''"])
def test_names_that_become_folders_or_addresses_hold_nothing_that_cuts_them(path: Path, override: str) -> None:
    text = refusal(path, override)
    assert "not a name" in text and "expected letters, digits, _, - and points" in text


def test_more_tables_than_a_store_can_tell_apart_are_refused(path: Path) -> None:
    assert len(load(str(path), [f"tables.t{i}={{}}" for i in range(250)]).tables) <= 255
    text = refusal(path, *[f"tables.t{i}={{}}" for i in range(300)])
    assert f"{path}: number of tables: out of bounds" in text and "expected 0 .. 255" in text


# A row optimizer's settings are its own: they are checked where it is made.


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_row_optimizer_takes_its_own_settings_and_refuses_those_of_others(path: Path, kind: str) -> None:
    config, own = load(str(path)), {field.name for field in dataclasses.fields(OPTIMIZERS[kind])}
    for field in dataclasses.fields(config.train.rows):
        if field.name == "optimizer":
            continue
        config = load(str(path), [f"train.rows={{optimizer: {kind}, {field.name}: 0.25}}"])
        if field.name in own:
            check(config)
            assert row_optimizer(config) == OPTIMIZERS[kind](**{field.name: 0.25})
            continue
        with pytest.raises(UserError) as raised:
            check(config)
        text = f"train.rows.{field.name}: not a setting of {kind}\n  got 0.25\n  -> drop it; {kind} knows lr"
        assert str(raised.value).startswith(text)


def test_a_row_optimizer_of_which_nothing_is_said_has_its_own_defaults(path: Path) -> None:
    for kind, optimizer in OPTIMIZERS.items():
        assert row_optimizer(load(str(path), [f"train.rows.optimizer={kind}"])) == optimizer()


# A feature's settings go with its kind.


@pytest.mark.parametrize(
    ("override", "text"),
    [
        (
            "features.price.table=user",
            "features.price.table: not a setting of kind: number\n  -> drop it; number knows",
        ),
        ("features.price.max_len=3", "features.price.max_len: not a setting of kind: number"),
        ("features.user_id.transform=log1p", "features.user_id.transform: not a setting of kind: id\n"),
        ("features.user_id.pool=sum", "features.user_id.pool: not a setting of kind: id\n"),
        ("features.history.of=[click]", "features.history.of: not a setting of kind: ids\n"),
        ("features.then.column=user", "features.then.column: not a setting of kind: id_stats\n  -> drop it; id_stats"),
        ("features.then.table=users", "features.then.table: no table is called 'users'\n  -> did you mean 'user'?"),
        ("features.then.of=[]", "features.then.of: nothing to count\n  -> add of: [impressions, click, ...]"),
        ("features.then.of=[clik]", "features.then.of: no event is called 'clik'\n  -> did you mean 'click'?"),
        ("features.then.of=[cart/clik]", "features.then.of: no event is called 'clik'"),
        ("features.then.of=[watch]", "features.then.of: no event is called 'watch'"),
        ("features.then.id=history", "features.then.id: no feature of kind id that reads table 'user' is called 'his"),
        (
            "features.other={kind: id, table: user}",
            "features.then: whose id the statistics are of is not clear\n  got 2",
        ),
        ("features.then.until=week", "features.then.until: wrong value\n  got 'week'\n  expected 'day' or 'batch'"),
        ("features.then.half_life_days=0", "features.then.half_life_days: out of bounds"),
        ("features.then.smoothing=-1", "features.then.smoothing: out of bounds"),
    ],
)
def test_a_feature_with_settings_that_do_not_fit_its_kind_is_refused(path: Path, override: str, text: str) -> None:
    statistics = "features.then={kind: id_stats, table: user, of: [impressions, click, cart/click]}"
    assert load(str(path), [statistics]).features["then"].of == ("impressions", "click", "cart/click")
    assert f"{path}: {text}" in refusal(path, statistics, override)


# The body's settings are the body's own: they are checked where it is made.


@pytest.mark.parametrize("zone", ["Europe/Berlim", "", "/etc/passwd", "UTC+3"])
def test_a_time_zone_that_is_none_is_told_with_the_nearest_one(path: Path, zone: str) -> None:
    text = refusal(path, f"data.time_zone={zone!r}")
    assert f"data.time_zone: no such time zone\n  got {zone!r}\n  expected a zone such as America/Sao_Paulo\n" in text
    assert len(text) < 400 and ("-> did you mean 'Europe/Berlin'?" in text) == (zone == "Europe/Berlim")


def test_a_column_of_times_goes_with_hours(path: Path) -> None:
    text = refusal(path, "data.time=at")
    assert "data.time: a column of times parts days into hours\n  got period: day\n  -> set data.period: hour" in text
    assert load(str(path), ["data.time=at", "data.period=hour"]).data.time_zone == "UTC"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "model.body.kind: no body is called ''\n  -> known: mmoe, omoe, ple, separate, shared_bottom, so"),
        ({"kind": "mmoee"}, "model.body.kind: no body is called 'mmoee'\n  -> did you mean 'mmoe'?"),
        ({"kind": ["mmoe"]}, "model.body.kind: no body is called '['mmoe']'"),
        ({"kind": "mmoe", "num_expert": 3}, "(mmoe): unknown key 'num_expert'\n  -> did you mean 'num_experts'?"),
        ({"kind": "mmoe", "layers": [8]}, "(mmoe): unknown key 'layers'\n  -> did you mean 'expert_layers'?"),
        ({"kind": "mmoe", "num_gates": 1}, "(mmoe): unknown key 'num_gates'"),  # a parameter, but no setting
        ({"kind": "mmoe", "num_experts": 0}, "got {'num_experts': 0}\n  expected a whole number from 1 up"),
        ({"kind": "mmoe", "num_experts": "many"}, "got {'num_experts': 'many'}\n  expected a whole number from 1 up"),
        ({"kind": "mmoe", "num_experts": True}, "got {'num_experts': True}"),
        ({"kind": "omoe", "expert_layers": [8, -1]}, "expected a list of whole numbers from 1 up"),
        ({"kind": "omoe", "expert_layers": 8}, "got {'expert_layers': 8}\n  expected a list of whole numbers"),
        (
            {"kind": "shared_bottom", "layers": "wide"},
            "model.body (shared_bottom): wrong value\n  got {'layers': 'wide'}",
        ),
        ({"kind": "mmoe", "gate_dropout": 1.5}, "expected a number from 0 to 1\n  -> correct its settings"),
    ],
)
def test_a_body_that_cannot_be_made_is_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError) as raised:
        make(settings, BODIES, "model.body", Names(), 8, 2)
    assert text in str(raised.value)


def test_every_configuration_that_is_shipped_is_good() -> None:
    for shipped in sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")):
        config = load(str(shipped))
        assert isinstance(config, Config)
        check(config)
