"""Flags and QUIRE_* variables are made from the fields of a dataclass."""

import dataclasses
from typing import Any, Literal

import pytest
from quire.engine.config import EngineConfig
from quire.engine.errors import ConfigError
from quire.serving.flags import Parser, add_flags, given_options


@dataclasses.dataclass(frozen=True)
class Options:
    """One field of each kind of type."""

    name: str | None = dataclasses.field(default=None, metadata={"help": "100 % text"})
    size: int = dataclasses.field(default=3, metadata={"help": "number", "metavar": "BYTES"})
    share: float = dataclasses.field(default=0.5, metadata={"help": "fraction"})
    limit: int | Literal["auto"] | None = dataclasses.field(
        default=None, metadata={"help": "limit"}
    )
    kind: Literal["a", "b"] = dataclasses.field(default="a", metadata={"help": "kind"})
    is_on: bool = dataclasses.field(default=True, metadata={"help": "switch"})
    sizes: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"help": "sizes"})
    keys: tuple[str, ...] = dataclasses.field(default=(), metadata={"help": "keys"})
    secret: tuple[str, ...] = dataclasses.field(
        default=(), metadata={"help": "secrets", "is_secret": True, "fallback": "OTHER_SECRET"}
    )
    port: int | None = dataclasses.field(default=None, metadata={"help": "port", "unset": "none"})


def parse(*arguments: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    parser = Parser(prog="p")
    add_flags(parser, Options)
    return given_options(parser.parse_args(arguments), Options, environment or {})


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((), {}),  # what is not given is left to the dataclass
        (("--name", "x"), {"name": "x"}),
        (("--name", ""), {"name": ""}),
        (("--size", "7"), {"size": 7}),
        (("--share=1e-2",), {"share": 0.01}),
        (("--limit", "auto"), {"limit": "auto"}),
        (("--limit", "8"), {"limit": 8}),
        (("--kind", "b"), {"kind": "b"}),
        (("--is-on",), {"is_on": True}),
        (("--no-is-on",), {"is_on": False}),
        (("--sizes", "2, 4,8"), {"sizes": (2, 4, 8)}),
        (("--keys", "a,b"), {"keys": ("a", "b")}),
        (("--keys", "a,b", "--keys", "c"), {"keys": ("a", "b", "c")}),
        (("--sizes", "2", "--size", "1", "--sizes=4,8"), {"sizes": (2, 4, 8), "size": 1}),
        (("--size", "2", "--size", "3"), {"size": 3}),
        (("--secret", "a,b", "--secret", " c"), {"secret": ("a,b", " c")}),
        (("--secret", ""), {"secret": ("",)}),
    ],
)
def test_flags_are_read_in_the_type_of_their_field(
    arguments: tuple[str, ...], options: dict[str, Any]
):
    assert parse(*arguments) == options


@pytest.mark.parametrize(
    ("variable", "value", "options"),
    [
        ("QUIRE_NAME", "x", {"name": "x"}),
        ("QUIRE_SIZE", "7", {"size": 7}),
        ("QUIRE_LIMIT", "auto", {"limit": "auto"}),
        ("QUIRE_KIND", "b", {"kind": "b"}),
        ("QUIRE_IS_ON", "No", {"is_on": False}),
        ("QUIRE_IS_ON", "1", {"is_on": True}),
        ("QUIRE_SIZES", "2,4", {"sizes": (2, 4)}),
        ("QUIRE_KEYS", "a", {"keys": ("a",)}),
        ("QUIRE_SECRET", "a,b", {"secret": ("a,b",)}),
        ("OTHER_SECRET", "a,b", {"secret": ("a,b",)}),
        ("QUIRE_OTHER", "x", {}),
    ],
)
def test_variables_are_read_in_the_type_of_their_field(
    variable: str, value: str, options: dict[str, Any]
):
    assert parse(environment={variable: value}) == options


def test_a_flag_wins_over_its_variable():
    environment = {"QUIRE_SIZE": "1", "QUIRE_NAME": "from environment"}
    assert parse("--size", "2", environment=environment) == {"size": 2, "name": "from environment"}


def test_a_variable_of_ours_wins_over_its_fallback_and_a_flag_over_both():
    environment = {"QUIRE_SECRET": "ours", "OTHER_SECRET": "theirs"}
    assert parse(environment=environment) == {"secret": ("ours",)}
    assert parse("--secret", "flag", environment=environment) == {"secret": ("flag",)}


def test_variables_are_those_of_the_process(monkeypatch: pytest.MonkeyPatch):
    """os.environ refuses to be asked for a fallback that there is not; a dict does not."""
    monkeypatch.setenv("QUIRE_SIZE", "7")
    parser = Parser(prog="p")
    add_flags(parser, Options)
    assert given_options(parser.parse_args([]), Options)["size"] == 7


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("QUIRE_SIZE", "many", "the variable QUIRE_SIZE: must be a whole number, got 'many'"),
        ("QUIRE_SIZE", " ", "the variable QUIRE_SIZE: must be a whole number, got ' '"),
        ("QUIRE_SHARE", "x", "the variable QUIRE_SHARE: must be a number, got 'x'"),
        ("QUIRE_LIMIT", "x", "the variable QUIRE_LIMIT: must be a whole number or 'auto', got 'x'"),
        ("QUIRE_KIND", "c", "the variable QUIRE_KIND: must be 'a' or 'b', got 'c'"),
        ("QUIRE_IS_ON", "maybe", "the variable QUIRE_IS_ON: must be true or false, got 'maybe'"),
        ("QUIRE_SIZES", "2,x", "the variable QUIRE_SIZES: must be a whole number, got 'x'"),
    ],
)
def test_a_wrong_variable_is_refused_by_name(variable: str, value: str, message: str):
    with pytest.raises(ConfigError) as caught:
        parse(environment={variable: value})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "x"), "p: argument --size: must be a whole number, got 'x' (see p --help)"),
        (("--kind", "c"), "p: argument --kind: invalid choice: 'c' (choose from"),
        (("--szie", "3"), "p: unknown flag --szie; did you mean --size? (see p --help)"),
        (("--siz=3",), "p: unknown flag --siz; did you mean --size? (see p --help)"),
        (("--zzz",), "p: unknown flag --zzz (see p --help)"),
        (("extra",), "p: unexpected argument extra (see p --help)"),
        (("--size",), "p: argument --size: expected one argument"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as caught:
        parse(*arguments)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(message)
    assert said.count("\n") == 1


def test_help_names_every_option_with_its_unit_and_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("QUIRE_SECRET", "sesame")
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "--name NAME 100 % text (default: chosen)",
        "--size BYTES number (default: 3)",
        "--kind {a,b} kind (default: a)",
        "--is-on, --no-is-on switch (default: true)",
        "--keys KEYS keys (default: none)",
        "--secret SECRET secrets (default: none)",
        "--port PORT port (default: none)",
    ):
        assert part in text
    assert "sesame" not in text


def test_every_engine_option_has_a_flag_and_a_variable():
    parser = Parser(prog="p")
    add_flags(parser, EngineConfig, skip=("model",))
    flags = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(EngineConfig)}
    assert flags - set(parser._option_string_actions) == {"--model"}
    texts = {"max_model_len": "64", "enable_prefix_caching": "false", "token_buckets": "2,1024"}
    environment = {f"QUIRE_{name.upper()}": text for name, text in texts.items()}
    options = given_options(parser.parse_args([]), EngineConfig, environment)
    config = EngineConfig(**options)
    assert (config.max_model_len, config.enable_prefix_caching) == (64, False)
    assert config.token_buckets == (2, 1024)
