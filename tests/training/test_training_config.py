"""Settings of a training run: what is read, what is refused and how that is said."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support.checkouts import ROOT
from support.small_training import settings

from anyup.cli import command as cli
from anyup.training import config
from anyup.training.config import ConfigError, Guidance, Settings


def test_overrides_replace_what_the_file_says(tmp_path: Path) -> None:
    changed = settings(tmp_path, "optimizer.steps=7", "encoders=['tiny:4', 'tiny:8']", "data.cache=", "run.threads=1")
    assert changed.optimizer.steps == 7
    assert changed.encoders == ("tiny:4", "tiny:8")
    assert changed.data.cache == ""
    assert changed.optimizer.batch == 4


def test_a_value_that_is_no_toml_is_a_text(tmp_path: Path) -> None:
    assert settings(tmp_path, "data.photographs=some/where else").data.photographs == "some/where else"


def test_a_mark_of_the_order_of_bytes_is_no_setting(tmp_path: Path) -> None:
    """As editors on Windows write it."""
    (tmp_path / "a.toml").write_text('\ufeffencoders = ["some"]', encoding="utf-8")
    found = config.read(str(tmp_path / "a.toml"), ["output=run", "data.photographs=photographs"])
    assert found.encoders == ("some",)


def test_an_integer_stands_for_a_number(tmp_path: Path) -> None:
    assert settings(tmp_path, "optimizer.learning_rate=1").optimizer.learning_rate == 1.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.stepz=3", "optimizer.stepz: there is no such setting; did you mean 'optimizer.steps'?"),
        ("steps=3", "steps: there is no such setting; did you mean 'optimizer.steps'?"),
        ("loss.batch=3", "loss.batch: there is no such setting; did you mean 'optimizer.batch'?"),
        ("optimiser.steps=3", "optimiser: there is no such setting; did you mean 'optimizer'?"),
        ("optimizer.steps=many", "optimizer.steps: expected an integer, got 'many'"),
        ("optimizer.steps=1.5", "optimizer.steps: expected an integer, got 1.5"),
        ("optimizer.steps=true", "optimizer.steps: expected an integer, got True"),
        ("optimizer.steps=0", "optimizer.steps: expected 1 or more, got 0"),
        ("optimizer.steps=\N{ARABIC-INDIC DIGIT THREE}", "optimizer.steps: expected an integer"),
        ("run.threads=99999999", "run.threads: expected at most 1024"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate: expected a finite number"),
        ("optimizer.betas=[0.9]", "optimizer.betas: expected 2 values, got 1"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas: expected two numbers in [0, 1)"),
        ("optimizer=3", "optimizer: expected a section, got 3"),
        ("encoders=tiny:8", "encoders: expected a list of a text, got 'tiny:8'"),
        ("encoders=[]", "encoders: expected at least one name"),
        ("guidance.schedule=[[5, 112]]", "guidance.schedule: expected [first step, pixels] pairs that begin at step 0"),
        ("guidance.schedule=[[0, 112], [0, 224]]", "guidance.schedule: expected steps that increase"),
        ("data.crops_per_sample=4", "data.crops_per_sample: expected at most crops, 3, got 4"),
        ("data.held_out_every=1", "data.held_out_every: expected 0, or 2 and more, got 1"),
        ("variation.synthetic=1.5", "variation.synthetic: expected a number in [0, 1], got 1.5"),
        ("loss.place=-1", "loss.place: expected 0 or more, got -1.0"),
        ("run.precision=half", "run.precision: expected one of float32, bfloat16, float16, got 'half'"),
        ("data.photographs=", "data.photographs: expected a folder, got ''"),
        ("nothing", "expected key=value"),
    ],
)
def test_a_mistake_is_named_with_what_was_expected(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        settings(tmp_path, override)
    assert message in str(error.value)


def test_a_file_that_is_no_toml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("output = ", encoding="utf-8")
    with pytest.raises(ConfigError, match="broken.toml: not TOML"):
        config.read(str(path))


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    text = config.shipped()["mini"].read_text(encoding="utf-8")
    (tmp_path / "plain.toml").write_text(text, encoding="utf-8")
    (tmp_path / "marked.toml").write_text(text, encoding="utf-8-sig")
    assert config._parse(tmp_path / "marked.toml") == config._parse(tmp_path / "plain.toml")


def test_a_missing_file_names_the_shipped_ones() -> None:
    with pytest.raises(FileNotFoundError, match="one of mini, published"):
        config.read("maxi")


@pytest.mark.parametrize("name", ["mini", "published"])
def test_shipped_configurations_are_read(name: str) -> None:
    assert config.read(name, ["output=here"]).output == "here"


def test_the_published_recipe_is_the_published_one() -> None:
    published = config.read("published")
    assert published.optimizer == Settings().optimizer
    assert (published.optimizer.learning_rate, published.optimizer.betas) == (2e-4, (0.9, 0.999))
    assert (published.optimizer.weight_decay, published.optimizer.batch, published.optimizer.steps) == (
        1e-5,
        4,
        100_000,
    )
    assert (published.loss.input_consistency, published.loss.self_consistency) == (0.1, 0.1)
    assert (published.data.image_size, published.data.crop_size, published.data.crops_per_sample) == (448, 224, 4)
    assert published.run.precision == "bfloat16"


def test_guidance_size_changes_at_the_step_that_the_schedule_names() -> None:
    guidance = Guidance(((0, 112), (10, 224)))
    assert [guidance.size(step) for step in (0, 9, 10, 11)] == [112, 112, 224, 224]


def test_a_mistake_on_the_command_line_is_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--config", "mini", "optimizer.stepz=3"]) == 2
    assert capsys.readouterr().err == (
        "anyup: error: optimizer.stepz: there is no such setting; did you mean 'optimizer.steps'?\n"
    )


def test_the_documentation_lists_every_setting_with_its_default() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `([\w.]+)` \| `(.+?)` \|", text, re.MULTILINE))
    flat = json.loads(json.dumps(Settings().flat()))
    assert {name: json.loads(default) for name, default in told.items()} == flat


def test_settings_may_stand_behind_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(config, "read", lambda file, overrides: seen.append(overrides) or Settings())
    monkeypatch.setattr("anyup.training.loop.train", lambda *arguments, **more: None)
    assert cli.main(["train", "--config", "mini", "seed=1", "--resume", "output=x"]) == 0
    assert seen == [["seed=1", "output=x"]]
    assert cli.main(["train", "--config", "mini", "--resum", "--no-such", "output=x"]) == 2
