"""Options: from flags, from a TOML file, and what is said of wrong ones."""

import json
import re
from inspect import signature
from pathlib import Path

import pytest
from rasters import picture, write_tif

from tilenet.cli_predict import predict
from tilenet.config import load_config
from tilenet.errors import UsageError


@pytest.fixture
def source(tmp_path):
    return write_tif(tmp_path / "a.tif", picture(150, 200), georeferenced=True)


def test_options_of_the_config_file_are_those_of_the_command(cli, source, models, tmp_path):
    config, model = tmp_path / "c.toml", models / "conv.onnx"
    config.write_text(
        f'model = "{model}"\nmodel-config = "{model.with_suffix(".json")}"\n'
        'no-skip = true\ntile = "auto"\nbatch-size = 2\n'
    )
    arguments = ["predict", source, "--out", tmp_path / "x.tif", "--config", config, "--dry-run"]
    done = cli(*arguments, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["estimate"]["batch_size"] == 2


FORMS = {
    "bands": ("2,3,1", [2, 3, 1], (2, 3, 1)),
    "classes": ("sea,land", ["sea", "land"], ("sea", "land")),
    "mean": ("0.5,1", [0.5, 1], (0.5, 1.0)),
    "std": ("2,4", [2, 4.0], (2.0, 4.0)),
    "value-range": ("0,1", [0.0, 1], (0.0, 1.0)),
}
"""Of each option that takes several values: a flag's form, TOML's own, and what they mean."""


@pytest.mark.parametrize("name", FORMS)
def test_several_values_of_the_config_file(tmp_path, name):
    *forms, meant = FORMS[name]
    for form in forms:
        (tmp_path / "c.toml").write_text(f"{name} = {json.dumps(form)}\n")
        config = load_config(tmp_path / "c.toml", {})
        assert getattr(config, name.replace("-", "_")) == meant


@pytest.mark.parametrize(("line", "meant"), [
    ("bands = 2", (2,)), ("mean = 0.5", (0.5,)), ("std = 2", (2.0,)), ('mean = "0"', (0.0,)),
    ('classes = "sea"', ("sea",)),
])  # fmt: skip
def test_one_value_where_several_may_be(tmp_path, line, meant):
    (tmp_path / "c.toml").write_text(line)
    assert getattr(load_config(tmp_path / "c.toml", {}), line.partition(" ")[0]) == meant


@pytest.mark.parametrize(("name", "text", "told"), [
    ("--value-range", "5", "'5' is not like 0,255; --value-range;"),
    ("--value-range", "1,2,3", "'1,2,3' is not like 0,255; --value-range;"),
    ("--value-range", "0,x", "'0,x' is not like 0.5 or 0.4,0.5,0.6; --value-range;"),
    ("--value-range", "0,inf", "finite number; --value-range;"),
    ("--mean", "a", "'a' is not like 0.5 or 0.4,0.5,0.6; --mean;"),
    ("--bands", "1,,2", "'1,,2' is not like 4,3,2 or red,green,blue; --bands;"),
])  # fmt: skip
def test_a_wrong_value_names_the_flag_that_there_is(cli, source, tmp_path, name, text, told):
    done = cli("predict", source, "--out", tmp_path / "x.tif", name, text)
    assert done.code == 2
    assert told in done.err


@pytest.mark.parametrize(("line", "told"), [
    ("tyle = 4", "there is no such option; --tyle;"),
    ('no-skip = "perhaps"', "'perhaps' is not true or false; --no-skip;"),
    ('skip-nodata = "perhaps"', "--no-skip;"),
    ("value-range = 5", "5 is not like 0,255; --value-range;"),
    ('mean = [0, "a"]', "valid number, unable to parse string as a number; --mean;"),
    ("model-config = 5", "--model-config;"),
])  # fmt: skip
def test_a_wrong_line_of_the_config_file(tmp_path, line, told):
    (tmp_path / "c.toml").write_text(line)
    with pytest.raises(UsageError) as caught:
        load_config(tmp_path / "c.toml", {})
    assert told in str(caught.value)


def test_the_config_file_takes_every_option_or_says_that_it_does_not(tmp_path):
    """What it does not take is what README says, and known to be an option all the same."""
    names = {name.removeprefix("as_") for name in signature(predict).parameters}
    refused = set()
    for name in names - {"inputs"}:  # an argument
        (tmp_path / "c.toml").write_text(f"{name.replace('_', '-')} = {{}}\n")
        with pytest.raises(UsageError) as caught:  # an empty table is no option's value
            load_config(tmp_path / "c.toml", {})
        assert caught.value.where == "--" + name.replace("_", "-")
        assert "no such option" not in caught.value.what
        if caught.value.what == "not taken from a file":
            assert caught.value.do == "give it on the command line"
            refused.add(caught.value.where)
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    [said] = re.findall(r"`--config FILE` takes .*? but (.*?), and flags win", readme, re.DOTALL)
    assert set(re.findall(r"`(--[a-z-]+)`", said)) | {"--config"} == refused
