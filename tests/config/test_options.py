from __future__ import annotations

import argparse
import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_batch.cli import COMMANDS, main
from clip_batch.config import (
    EmbedConfig,
    MergeConfig,
    PlanConfig,
    SlurmConfig,
    SparkConfig,
    StorageConfig,
    TargetConfig,
    options,
    parse_bytes,
)
from clip_batch.errors import ConfigError
from docs.generate import GENERATED
from tests import ROOT

ALL = [*options.SECTIONS.values(), TargetConfig]


@pytest.mark.parametrize("section", ALL)
def test_every_field_has_a_help(section: type) -> None:
    assert set(options.helps(section)) == {field.name for field in dataclasses.fields(section)}


def test_no_two_sections_of_a_command_share_a_name() -> None:
    for name, command in COMMANDS.items():
        names = list(command.fields)
        for section in (*command.sections, StorageConfig):
            names += [field.name for field in dataclasses.fields(section)]
        assert len(names) == len(set(names)), name


def test_flag_beats_environment_beats_file_beats_default() -> None:
    file = {"embed": {"batch_size": 1, "threads": 2, "device": "cpu"}}
    environ = {"CLIP_BATCH_BATCH_SIZE": "3", "CLIP_BATCH_THREADS": "4"}
    found = options.gather(EmbedConfig, {"batch_size": "5"}, file, environ)
    assert found == EmbedConfig(batch_size=5, threads=4, device="cpu")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"batch_size": "many"}, "--batch-size 'many'"),
        ({"broken_shard": "shrug"}, "--broken-shard 'shrug'.*'record' or 'fail'"),
    ],
)
def test_a_wrong_value_is_named(flags: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options.gather(EmbedConfig, flags, {}, {})


def test_lists_and_json_from_the_environment() -> None:
    environ = {"CLIP_BATCH_INPUT": "a.tar b.tar", "CLIP_BATCH_STORAGE_OPTIONS": '{"anon": true}'}
    assert options.gather(PlanConfig, {}, {}, environ).input == ["a.tar", "b.tar"]
    assert options.gather(StorageConfig, {}, {}, environ).storage_options == {"anon": True}
    with pytest.raises(ConfigError, match="not JSON"):
        options.gather(StorageConfig, {"storage_options": "{"}, {}, {})


def test_an_unknown_key_lists_the_valid_ones(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("embed:\n  batchsize: 3\n")
    with pytest.raises(ConfigError, match=r"no key 'batchsize'; valid: batch_size, broken_shard"):
        options.read_file(str(path))
    path.write_text("embeddings: {}\n")
    with pytest.raises(ConfigError, match=r"no key 'embeddings'; valid: .*embed, "):
        options.read_file(str(path))


def test_bool_flags_have_a_no_form() -> None:
    parser = argparse.ArgumentParser()
    options.add_flags(parser, TargetConfig, ["serve"])
    assert vars(parser.parse_args(["--no-serve"])) == {"serve": False}
    assert vars(parser.parse_args([])) == {}


@pytest.mark.parametrize("name", GENERATED)
def test_generated_documents_are_fresh(name: str) -> None:
    assert (ROOT / name).read_text() == GENERATED[name](), "run `make docs`"


def test_shipped_configurations_are_valid() -> None:
    paths = sorted((ROOT / "configs").glob("*.yaml"))
    assert len(paths) >= 3
    for path in paths:
        found = options.read_file(str(path))
        for section in ALL:
            options.gather(section, {}, found, {})


@pytest.mark.parametrize(
    ("text", "size"), [("4GB", 4 * 10**9), ("512MiB", 512 * 2**20), ("1000", 1000), ("1.5k", 1500)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "4 apples", "-1GB", "1.2.3GB"])
def test_a_wrong_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="size"):
        parse_bytes(text)


def test_no_two_sections_share_an_environment_variable_of_different_kinds() -> None:
    import typing

    kinds: dict[str, object] = {}
    for section in ALL:
        for name, kind in typing.get_type_hints(section).items():
            assert name == "serve" or kinds.setdefault(name, kind) == kind, name


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"clip-batch {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "the commands are demo, plan"),
        (["plan", "--nonsense"], "--nonsense"),
        (["plan", "--output", "x"], "needs --input"),
        (["embed"], "--output OUT is needed"),
        (["worker", "--output", "x"], "either --partitions"),
        (["worker", "--output", "x", "--partitions", "a-b"], "not understood"),
        (["worker", "--output", "x", "--slot", "1"], "--slots N"),
        (["search", "--index", "x"], "one of --text"),
        (["merge", "--output", "x"], "--index INDEX is needed"),
        (["plan", "--config", "missing.yaml"], "missing.yaml cannot be read"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@given(st.data())
def test_flags_made_of_a_section_give_it_back(data: st.DataObject) -> None:
    section = data.draw(st.sampled_from([EmbedConfig, MergeConfig, SlurmConfig, SparkConfig]))
    words = st.text(st.characters(codec="utf-8"), min_size=1)
    drawn: dict[Any, Any] = {str: words, int: st.integers(-9, 99), bool: st.booleans(), float: st.floats(0, 1)}
    drawn |= {list[str]: st.lists(words, min_size=1), dict[str, Any]: st.dictionaries(words, words)}
    values = {}
    for name, kind in typing.get_type_hints(section).items():
        if typing.get_origin(kind) is typing.Literal:
            drawn[kind] = st.sampled_from(typing.get_args(kind))
        if kind in drawn and data.draw(st.booleans()):
            values[name] = data.draw(drawn[kind])
    made = section(**values)
    parser = argparse.ArgumentParser(allow_abbrev=False)
    options.add_flags(parser, section)
    assert options.gather(section, vars(parser.parse_args(options.to_flags(made))), {}, {}) == made
