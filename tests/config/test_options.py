from __future__ import annotations

import argparse
import dataclasses
import re
import typing
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_batch.cli import COMMANDS, main
from clip_batch.cli.embed import WorkerArguments
from clip_batch.cli.parser import argument_names, sections
from clip_batch.cli.run import RunArguments
from clip_batch.cli.search import QueryArguments
from clip_batch.cli.serve import DemoArguments
from clip_batch.config import (
    EmbedConfig,
    MergeConfig,
    PlanConfig,
    ServeConfig,
    SlurmConfig,
    SparkConfig,
    StorageConfig,
    options,
    parse_bytes,
)
from clip_batch.config.fields import helps, required
from clip_batch.errors import ConfigError
from docs.generate import GENERATED
from tests import ROOT

ARGUMENTS = {section.kind for run in COMMANDS.values() for section in sections(run).values()}
ALL = [*options.SECTIONS.values(), *sorted(ARGUMENTS - {*options.SECTIONS.values()}, key=lambda kind: kind.__name__)]


@pytest.mark.parametrize("section", ALL)
def test_every_field_has_a_help(section: type) -> None:
    assert set(helps(section)) == {field.name for field in dataclasses.fields(section)}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_two_sections_of_a_command_share_a_flag(command: str) -> None:
    names = [flag for section in sections(COMMANDS[command]).values() for flag in section.flags]
    assert len(names) == len(set(names))
    assert "storage_options" in names


def test_flag_beats_environment_beats_file_beats_default() -> None:
    file = {"embed": {"batch_size": 1, "threads": 2, "device": "cpu"}}
    environ = {"CLIP_BATCH_BATCH_SIZE": "3", "CLIP_BATCH_THREADS": "4"}
    found = options.gather(EmbedConfig, {"batch_size": "5"}, file, environ)
    assert found == EmbedConfig(batch_size=5, threads=4, device="cpu")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"batch_size": "many"}, "--batch-size is 'many': it must be a whole number, 0 or more"),
        ({"broken_shard": "shrug"}, "--broken-shard is 'shrug': it must be one of record, fail"),
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


def test_a_variable_holds_a_list_as_words_or_as_json() -> None:
    environ = {"CLIP_BATCH_INPUT": '["my cats.tar", "[ab].tar"]', "CLIP_BATCH_TEXT": "a red bicycle"}
    assert options.gather(PlanConfig, {}, {}, environ).input == ["my cats.tar", "[ab].tar"]
    assert options.gather(PlanConfig, {}, {}, {"CLIP_BATCH_INPUT": "[ab].tar"}).input == ["[ab].tar"]
    assert options.gather(QueryArguments, {"index": ["x"]}, {}, environ).text == ["a red bicycle"]
    environ["CLIP_BATCH_TEXT"] = '["a", "b"]'
    assert options.gather(QueryArguments, {"index": ["x"]}, {}, environ).text == ["a", "b"]
    with pytest.raises(ConfigError, match="it must be a list, each one of image, text; in the environment a list has "):
        options.gather(PlanConfig, {}, {}, {"CLIP_BATCH_PLAN_MODALITIES": "image,text"})


def test_a_single_item_stands_for_a_list_in_a_file() -> None:
    file = {"plan": {"input": "my cats.tar", "caption_extensions": "cap"}, "spec": "pictures"}
    plan = options.gather(PlanConfig, {}, file, {})
    assert (plan.input, plan.caption_extensions) == (["my cats.tar"], ["cap"])
    assert options.gather(RunArguments, {}, file, {}).spec == ["pictures"]


def test_a_key_in_a_wrong_place_is_told_where_it_belongs(tmp_path: Path) -> None:
    path, names = tmp_path / "options.yaml", argument_names(COMMANDS.values())
    for text, says in {
        "batch_size: 3\n": "has no key 'batch_size': write it below `embed:`, indented by two spaces",
        "model: demo\n": "has no key 'model': write it below `plan:` or `search:` or `serve:`, indented by two spaces",
        "merge:\n  batch_size: 3\n": "section merge has no key 'batch_size': write it below `embed:`",
        "embed:\n  output: x\n": "section embed has no key 'output': write it at the top of the file",
    }.items():
        path.write_text(text)
        with pytest.raises(ConfigError, match=re.escape(says)):
            options.read_file(str(path), names)


@pytest.mark.parametrize(
    "words", [["--output", "A", "--output", "B"], ["--output=A", "--config", "a", "--config", "b"], ["--output=A"] * 2]
)
def test_a_flag_of_one_value_is_refused_where_it_is_given_twice(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The second would replace the first, and nothing would say so."""
    assert main(["status", *words]) == 2
    assert " is given more than once: give it once; clip-batch status --help" in capsys.readouterr().err


def test_an_emptied_variable_of_several_sections_sets_nothing() -> None:
    assert options.gather(PlanConfig, {}, {}, {"CLIP_BATCH_MODALITIES": ""}) == PlanConfig()
    assert options.gather(MergeConfig, {}, {}, {"CLIP_BATCH_MODALITIES": ""}) == MergeConfig()


def test_help_shows_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["embed", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "Largest fraction of failed samples that a partition may have before it fails itself" in told
    for bound in ("never does. (0 to 1) [1.0]", "or one. (0 to 4,096) [0]", "(auto, cpu, cuda or cuda:N) [auto]"):
        assert bound in told
    assert (
        "| `port` | `1234` | Port to listen on; the default is clip-retrieval's. (0 to 65,535) |"
        in GENERATED["docs/config.md"]()
    )


def test_an_unknown_key_lists_the_valid_ones(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("embed:\n  batchsize: 3\n")
    with pytest.raises(ConfigError, match=r"no key 'batchsize'; valid: allow_empty, batch_size"):
        options.read_file(str(path))
    path.write_text("embeddings: {}\n")
    with pytest.raises(ConfigError, match=r"no key 'embeddings'; valid: .*embed, "):
        options.read_file(str(path))


def test_a_key_that_names_a_section_and_an_argument_is_told_by_its_value(tmp_path: Path) -> None:
    path, names = tmp_path / "options.yaml", argument_names(COMMANDS.values())
    found = {}
    for text in ("serve: false", "serve:\n  port: 5", "serve:"):
        path.write_text(f"{text}\n")
        file = options.read_file(str(path), names)
        found[text] = options.gather(DemoArguments, {}, file, {}).serve, options.gather(ServeConfig, {}, file, {}).port
    assert [*found.values()] == [(False, 1234), (True, 5), (True, 1234)]
    path.write_text("embed: false\n")
    with pytest.raises(ConfigError, match="section embed is not a mapping"):
        options.read_file(str(path), names)
    path.write_text("nonsense: 1\n")
    with pytest.raises(ConfigError, match=r"valid: .*search, serve, slot"):
        options.read_file(str(path), names)


def test_keys_at_the_top_of_a_file_mean_one_thing() -> None:
    """Arguments of one name are of one kind in all commands, and none that is named as a section takes a mapping."""
    kinds = defaultdict(set)
    for section in ARGUMENTS - {*options.SECTIONS.values()}:
        for name, kind in get_type_hints(section).items():
            kinds[name].add(kind)
    assert {name: kind for name, kind in kinds.items() if len(kind) > 1 and {*kind} != {str, list[str]}} == {}
    assert {name: kinds[name] for name in kinds if name in options.SECTIONS} == {"serve": {bool}}


@pytest.mark.parametrize("content", [b"output: caf\xe9\n", b"\x00\xff\xfe\x01", b"PK\x03\x04\x00", None])
def test_a_configuration_that_is_no_text_is_refused(
    tmp_path: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "options.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    assert main(["status", "--config", str(path)]) == 2
    told = capsys.readouterr().err
    assert f"--config {path} cannot be read: " in told and told.count("\n") == 1


def test_bool_flags_have_a_no_form() -> None:
    parser = argparse.ArgumentParser()
    options.add_flags(parser, DemoArguments, ["serve"])
    assert vars(parser.parse_args(["--no-serve"])) == {"serve": False}
    assert vars(parser.parse_args([])) == {}


@pytest.mark.parametrize("name", GENERATED)
def test_generated_documents_are_fresh(name: str) -> None:
    assert (ROOT / name).read_text() == GENERATED[name](), "run `make docs`"


def test_shipped_configurations_are_valid() -> None:
    paths = sorted((ROOT / "configs").glob("*.yaml"))
    assert len(paths) >= 3
    for path in paths:
        file = options.read_file(str(path), argument_names(COMMANDS.values()))
        for section in options.SECTIONS.values():
            options.gather(section, {}, file, {})


@pytest.mark.parametrize(
    ("text", "size"), [("4GB", 4 * 10**9), ("512MiB", 512 * 2**20), ("1000", 1000), ("1.5k", 1500)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "4 apples", "-1GB", "1.2.3GB"])
def test_a_wrong_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="size"):
        parse_bytes(text)


def test_no_variable_means_two_fields() -> None:
    """Neither the long names collide, nor a short name with the long name of another field."""
    long = defaultdict(set)
    for section in ALL:
        for field in dataclasses.fields(section):
            owner = section if section in options.SECTIONS.values() else None
            long[options.variable(section, field.name)].add((owner, field.name))
    assert not {name: owners for name, owners in long.items() if len(owners) > 1}
    for section in options.SECTIONS.values():
        for field in dataclasses.fields(section):
            name = f"CLIP_BATCH_{field.name.upper()}"
            if long.get(name, set()) <= {(section, field.name)}:
                continue
            with pytest.raises(
                ConfigError, match=f"{name} does not say whose .*: set .*{options.variable(section, field.name)}"
            ):
                options.gather(section, {}, {}, {name: "1"}, argument_names(COMMANDS.values()))


def test_the_long_name_of_a_variable_says_its_section() -> None:
    environ = {"CLIP_BATCH_EMBED_MAX_PIXELS": "900000000", "CLIP_BATCH_SERVE_DEVICE": "cpu"}
    assert options.gather(EmbedConfig, {}, {}, environ) == EmbedConfig(max_pixels=900_000_000)
    assert options.gather(ServeConfig, {}, {}, environ) == ServeConfig(device="cpu")
    both = {"CLIP_BATCH_EMBED_THREADS": "2", "CLIP_BATCH_THREADS": "3"}
    assert options.gather(EmbedConfig, {}, {}, both).threads == 2
    assert options.variable(SlurmConfig, "slurm_partition") == "CLIP_BATCH_SLURM_PARTITION"
    assert options.variable(WorkerArguments, "slot") == "CLIP_BATCH_SLOT"


@pytest.mark.parametrize("name", ["DEVICE", "MAX_PIXELS", "MODEL", "PRETRAINED"])
def test_a_variable_of_several_sections_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(f"CLIP_BATCH_{name}", "1")
    assert main(["serve", "--index", "nowhere"]) == 2
    told = capsys.readouterr().err
    assert f"CLIP_BATCH_{name} does not say" in told and f"CLIP_BATCH_SERVE_{name}" in told
    assert (f"CLIP_BATCH_EMBED_{name}" in told) == (name in ("DEVICE", "MAX_PIXELS"))
    monkeypatch.setenv(f"CLIP_BATCH_SERVE_{name}", "1")
    assert main(["serve", "--index", "nowhere"]) != 0
    assert "does not say" not in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"clip-batch {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "the commands are run, demo, plan"),
        (["plan", "--nonsense"], "--nonsense"),
        (["plan", "--output", "x"], "needs --input"),
        (["embed"], "--output OUTPUT is needed: the embeddings folder OUT"),
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
    drawn: dict[Any, Any] = {str: words, int: st.integers(0, 99), bool: st.booleans(), float: st.floats(0, 1)}
    drawn |= {list[str]: st.lists(words, min_size=1), dict[str, Any]: st.dictionaries(words, words)}
    values = {}
    for name, kind in typing.get_type_hints(section, include_extras=True).items():
        if typing.get_origin(kind) is typing.Literal:
            drawn[kind] = st.sampled_from(typing.get_args(kind))
        if typing.get_origin(kind) is Annotated and typing.get_args(kind)[0] in (int, float):
            number, bound = typing.get_args(kind)
            drawn[kind] = drawn[number].filter(bound.allows)
        if kind in drawn and data.draw(st.booleans()):
            values[name] = data.draw(drawn[kind])
    made = section(**values)
    parser = argparse.ArgumentParser(allow_abbrev=False)
    options.add_flags(parser, section)
    assert options.gather(section, vars(parser.parse_args(options.to_flags(made))), {}, {}) == made


@given(st.builds(EmbedConfig), st.dictionaries(st.text(), st.text()))
def test_the_environment_of_a_section_gives_it_back(embed: EmbedConfig, stored: dict[str, str]) -> None:
    storage = StorageConfig(stored)
    inherited = {"CLIP_BATCH_THREADS": "77", "CLIP_BATCH_SHARE": "false", "CLIP_BATCH_INDEX_CACHE": "1GB"}
    environ = inherited | options.to_environment(embed, storage)
    assert options.gather(EmbedConfig, {}, {}, environ) == embed
    assert options.gather(StorageConfig, {}, {}, environ) == storage


def test_a_needed_argument_is_named_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["filter", "--index", "x", "--text", "a"]) == 2
    assert "--output OUTPUT is needed: the folder to write" in capsys.readouterr().err
    assert main(["export", "sql", "--index", "x", "y"]) == 2
    assert "--index INDEX is needed, once" in capsys.readouterr().err


def test_help_shows_each_field(capsys: pytest.CaptureFixture[str]) -> None:
    help(PlanConfig)
    shown = capsys.readouterr().out
    assert "Target size of a partition's tars; larger tars are split." in shown
    for section in options.SECTIONS.values():
        assert section.__doc__ is not None and section.__doc__.count("\n\n") == 1
        assert all(f"\n{field.name}\n    " in section.__doc__ for field in dataclasses.fields(section))


@pytest.mark.parametrize("section", ALL)
def test_every_help_stands_by_itself(section: type) -> None:
    for name, text in helps(section).items():
        assert text[0] == text[0].upper() or text.split()[0].rstrip(",;:") in WORDS, (name, text)
        assert text.endswith(".") and len(text.split()) > 1 and not text.startswith(("Of ", "Its ", "Likewise")), (
            name,
            text,
        )


WORDS = {"open_clip's", "faiss", "recall@10", "spark://host:7077"}
"""Names that begin a help text in lower case."""


@pytest.mark.parametrize("section", options.SECTIONS.values())
def test_a_text_in_place_of_a_list_is_refused(section: type) -> None:
    """`list("jpg")` would be the extensions j, p and g."""
    for name, kind in get_type_hints(section).items():
        if get_origin(kind) is list:
            with pytest.raises(ConfigError, match=f"{section.__name__}: {name} is 'jpg': it must be a list"):
                section(**{name: "jpg"})


@pytest.mark.parametrize("section", options.SECTIONS.values())
def test_an_unknown_choice_is_refused(section: type) -> None:
    """A plan of an unknown format would be frozen otherwise."""
    for name, kind in get_type_hints(section).items():
        if get_origin(kind) is typing.Literal:
            with pytest.raises(ConfigError, match=f"{section.__name__}: {name} is 'zip': it must be one of "):
                section(**{name: "zip"})


def test_a_second_condition_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """The second would replace the first."""
    assert main(["search", "--index", "x", "--text", "a", "--where", "a = 1", "--where", "b = 2"]) == 2
    assert "--where is given more than once: give it once, and join conditions by and" in capsys.readouterr().err


def test_a_variable_that_no_option_reads_is_told_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("CLIP_BATCH_EMBED_BATCHSIZE", "3")
    monkeypatch.setenv("CLIP_BATCH_EMBED_THREADS", "3")
    monkeypatch.setenv("CLIP_BATCH_OUTPUT", "here")
    monkeypatch.setenv("CLIP_BATCH_PORT", "3")
    main(["status", "--output", str(tmp_path)])
    (line, _) = capsys.readouterr().err.splitlines()
    assert "no option reads the environment's CLIP_BATCH_EMBED_BATCHSIZE" in line
    assert line.endswith("the nearest is CLIP_BATCH_EMBED_BATCH_SIZE")


@pytest.mark.parametrize(
    ("section", "field", "value", "says"),
    [
        (ServeConfig, "port", 99_999, "a whole number between 0 and 65,535"),
        (EmbedConfig, "max_bad_share", 7, "a number between 0 and 1"),
        (EmbedConfig, "max_pixels", 0, "a whole number, 1 or more"),
        (EmbedConfig, "prefetch", "foo", "a size like 4GB or 512MiB"),
        (StorageConfig, "index_cache", "9" * 400 + "GGB", "a size like 4GB or 512MiB"),
        (MergeConfig, "index_memory", "1", "a size of 1,000 bytes or more, like 4GB"),
        (MergeConfig, "recall_target", 0, "a number between 0.01 and 1"),
        (MergeConfig, "rerank", 99_999, "a whole number between 0 and 10,000, or auto"),
        (MergeConfig, "rerank", "foo", "a whole number between 0 and 10,000, or auto"),
        (MergeConfig, "queries", -3, "a whole number between 1 and 100,000"),
        (MergeConfig, "queries", 0, "a whole number between 1 and 100,000"),
        (MergeConfig, "made_by", ["a", "b", "c"], "a list, each a text, 1 to 2 of them"),
        (ServeConfig, "poll", float("inf"), "a number between 0 and 86,400"),
        (EmbedConfig, "device", "gpu", "auto, cpu, cuda or cuda:N"),
    ],
)
def test_a_value_out_of_bounds_is_refused_alike_wherever_it_comes_from(
    section: type, field: str, value: Any, says: str
) -> None:
    name = next(name for name, known in options.SECTIONS.items() if known is section)
    text = " ".join(value) if isinstance(value, list) else str(value)
    flag, variable = f"--{field.replace('_', '-')}", options.variable(section, field)
    with pytest.raises(ConfigError, match=re.escape(f"{section.__name__}: {field} is ") + f".*: it must be {says}$"):
        section(**{field: value})
    for where, flags, file, environ in (
        (flag, {field: value if isinstance(value, list) else text}, {}, {}),
        (f"key {field} of --config", {}, {name: {field: value}}, {}),
        (variable, {}, {}, {variable: text}),
    ):
        with pytest.raises(ConfigError, match=rf"^{re.escape(where)} is [^\n]*: it must be {says}$"):
            options.gather(section, flags, file, environ)


def test_every_number_has_a_bound_that_its_default_keeps() -> None:
    """A number without one is 0 or more, and no number is NaN, whatever section has it."""
    for section in ALL:
        kinds = get_type_hints(section)
        needed = [field.name for field in dataclasses.fields(section) if required(field)]
        given: dict[str, Any] = {name: ["x"] if get_origin(kinds[name]) is list else "x" for name in needed}
        for name, kind in kinds.items():
            if {int, float} & {kind, *typing.get_args(kind)} and get_origin(kind) is not list:
                with pytest.raises(ConfigError, match=r"it must be a (whole )?number"):
                    options.gather(section, {**given, name: "nan"}, {}, {})
        options.gather(section, given, {}, {})


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["embed", "--output", "x", "--workers", "-1"],
            "--workers is '-1': it must be a whole number between 0 and 4,096",
        ),
        (
            ["worker", "--output", "x", "--slot", "0", "--slots", "0"],
            "--slots is '0': it must be a whole number, 1 or more",
        ),
        (["search", "--index", "x", "--id", "-1"], "--id is ['-1']: it must be a list, each a whole number, 0 or more"),
        (
            ["serve", "--index", "x", "--port", "99999"],
            "--port is '99999': it must be a whole number between 0 and 65,535",
        ),
    ],
)
def test_arguments_of_commands_have_bounds_too(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err == f"clip-batch {words[0]}: {says}\n"


@pytest.mark.parametrize(
    "text", ["embed:\n  threads: 1\n  threads: 2\n", "embed: {}\nmerge: {}\nembed: {threads: 1}\n"]
)
def test_a_key_that_a_file_has_twice_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"options.yaml has '(threads|embed)' twice, in lines [12] and 3: remove one"):
        options.read_file(str(tmp_path / "options.yaml"))
