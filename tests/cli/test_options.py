"""The table of options: same name, same short form, same type and same meaning in every command."""

import inspect
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import pytest
import typer

import vitscope
from tests.helpers.command_line import call, needs_bundled, photo_in_an_empty_folder
from vitscope.cli.app import app
from vitscope.cli.command import EARLIER, REPLACED
from vitscope.cli.commands import run as run
from vitscope.cli.examples import EXAMPLES
from vitscope.cli.inputs import split_models, split_objects, split_targets, split_values
from vitscope.cli.options import MODEL_PANEL, OPTIONS
from vitscope.tune.data_options import DataOptions
from vitscope.tune.recipe import Recipe

photo = photo_in_an_empty_folder
UNLISTED = {
    "--drop-artefacts",
    "--top-k",
    "--recipe",
    "--rank",
    "--segments",
}  # pages of their commands
REGISTERED = typer.main.get_command(app).commands
TRAINING_FIELDS = {f"--{field.name.replace('_', '-')}" for owner in (DataOptions, Recipe) for field in fields(owner)}


def declared() -> Iterator[tuple[str, Any, Any]]:
    """Yield the command, the parser's option and the annotated type of every option that is listed."""
    for command in app.registered_commands:
        assert command.callback is not None
        parameters = inspect.signature(command.callback).parameters
        name = command.callback.__name__
        for option in REGISTERED[name].params:
            if option.name in parameters and option.opts[0].startswith("-") and not getattr(option, "hidden", False):
                yield name, option, get_args(parameters[option.name].annotation)[0]


def value_type(annotation: Any) -> Any:
    """Return the type of one value: of ``list[str] | None``, str."""
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType] if NoneType in get_args(annotation) else []
    annotation = kinds[0] if kinds else annotation
    return get_args(annotation)[0] if get_origin(annotation) is list else annotation


ALL = list(declared())


def test_options_of_several_commands_are_in_the_table():
    commands = defaultdict(set)
    for command, option, _ in ALL:
        for name in option.opts:
            if name.startswith("--"):
                commands[name].add(command)
    shared = {name for name, takers in commands.items() if len(takers) > 1}
    assert shared - OPTIONS.keys() <= TRAINING_FIELDS, "add a row to OPTIONS, or choose another name"
    assert {name: set(row.commands) for name, row in OPTIONS.items()} == {name: commands[name] for name in OPTIONS}


@pytest.mark.parametrize(("command", "option", "annotation"), ALL, ids=lambda value: getattr(value, "name", ""))
def test_an_option_is_that_of_the_table(command, option, annotation):
    name = next(name for name in option.opts if name.startswith("--"))
    if name not in OPTIONS:
        return
    row = OPTIONS[name]
    assert option.opts == [name, *filter(None, [row.short])]
    assert option.secondary_opts == list(filter(None, [row.off]))
    assert option.help.startswith(row.help)
    assert value_type(annotation) == row.type
    assert bool(option.multiple) == (command in row.several)


def test_a_short_form_belongs_to_one_option():
    options = defaultdict(set)
    for _, option, _ in ALL:
        *_, long_name = sorted(option.opts, key=len)
        for name in option.opts:
            if not name.startswith("--"):
                options[name].add(long_name)
    assert all(len(names) == 1 for names in options.values()), options
    assert options["-t"] == {"--target"}


def test_the_training_fields_have_the_meaning_of_the_table():
    helps = defaultdict(set)
    for _, option, _ in ALL:
        if option.opts[0] in TRAINING_FIELDS - OPTIONS.keys():
            helps[option.opts[0]].add(option.help)
    assert all(len(texts) == 1 for texts in helps.values())


def values(command: str, *arguments: str) -> dict[str, Any]:
    """Return the parsed values of a call."""
    return REGISTERED[command].make_context(command, list(arguments)).params


LISTS = [(command, option) for command, option, _ in ALL if option.multiple]


@pytest.mark.parametrize(("command", "option"), LISTS, ids=lambda value: getattr(value, "name", value))
def test_a_list_is_repeated_or_separated_by_commas(command, option):
    name, (first, second) = max(option.opts, key=len), ("a=1,2,3,4", "b=5,6,7,8")
    required = ["data"] if command in ("data", "finetune", "compare") else ["photo.png"]
    required = [] if command == "demo" else required
    texts = (
        (["first", "second"], ["first,second"])
        if name not in ("--object", "--region")
        else ([first, second], [f"{first},{second}"])
    )
    parsed = [
        values(command, *required, *(word for text in value for word in (name, text)))[option.name] for value in texts
    ]
    if name == "--target":  # split when the labels of the model are read
        parsed = [split_targets(value, None) for value in parsed]
    assert parsed[0] == parsed[1] == [*texts[0]]
    assert "Several: repeat it, or separate" in option.help


def test_lists_in_detail(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_values(None) is None
    assert split_values(["a, b", "c,"]) == ["a", "b", "c"]
    (tmp_path / "a,b").mkdir()
    assert split_models(["a,b", "c,d"]) == ["a,b", "c", "d"]
    assert split_objects(["76,12,90,108", "dog=1,2,3,4,cat=mask.png"]) == [
        "76,12,90,108",
        "dog=1,2,3,4",
        "cat=mask.png",
    ]
    labels = ("tabby, tabby cat", "tiger cat", "boxer", "7")
    assert split_targets(["tabby, tabby cat"], labels) == ["tabby, tabby cat"]
    assert split_targets(["boxer,Tabby, tabby cat, tiger cat"], labels) == ["boxer", "Tabby, tabby cat", "tiger cat"]
    assert split_targets(["tabby,boxer", "5,"], labels) == ["tabby", "boxer", "5"]


@pytest.mark.parametrize("name", REGISTERED)
def test_the_examples_of_every_help_are_calls(name):
    assert len(EXAMPLES[name]) >= 2
    for example in EXAMPLES[name]:
        context = REGISTERED[name].make_context(name, example.split())
        assert set(context.params) == {
            parameter.name for parameter in REGISTERED[name].params if parameter.name != "help"
        }
        assert f"vitscope {name} {example}".rstrip() in REGISTERED[name].get_help(context)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("explain", "cat.png", "--target", "dog", "-t", "cat"), "--target was passed 2 times: explain takes one"),
        (("finetune", "x", "-t", "lora"), "finetune has no -t: pass --tuning"),
        (("rollout", "cat.png", "--output=logit"), "rollout has no --output: pass --model-output"),
        (("rollout", "cat.png", "--model", "vit-nano,swin-nano"), "this command takes one model"),
        (("lime", "cat.png", "--model", ","), "',' is no list: pass a name"),
    ],
    ids=str,
)
@needs_bundled
@pytest.mark.usefixtures("photo")
def test_a_mistake_is_one_line(capsys, monkeypatch, arguments, line):
    code, out, err = call(capsys, monkeypatch, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert line in err


def test_earlier_spellings_are_understood():
    assert values("compare", "data", "--models=a,b", "--tunings", "head") == values(
        "compare", "data", "--model", "a,b", "--tuning", "head"
    )
    assert values("heads", "photo.png", "--method", "gradient")["by"] == "gradient"
    listed = {(command, name) for command, option, _ in ALL for name in option.opts}
    for spellings in (EARLIER, REPLACED):
        for command, names in spellings.items():
            for earlier, today in names.items():
                assert (command, earlier) not in listed
                assert (command, today) in listed


def test_the_page_about_the_command_line_names_shared_options():
    page = Path(__file__).parents[2].joinpath("docs/command-line.md").read_text(encoding="utf-8")
    plain = {name for name, row in OPTIONS.items() if row.panel != MODEL_PANEL}
    assert {name for name in plain if f"`{name}`" not in page} <= UNLISTED


def test_the_version_is_printed(capsys, monkeypatch):
    assert call(capsys, monkeypatch, "--version") == (0, f"vitscope {vitscope.__version__}\n", "")
