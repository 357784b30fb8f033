"""The server's options: what they hold, what they refuse, and who may be served where."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from quire.engine.config import EngineConfig
from quire.engine.errors import ConfigError
from quire.serving.config import ServeConfig, check_bind, read_keys


def test_defaults_are_sound_and_every_option_has_help():
    config = ServeConfig()
    assert (config.host, config.grpc_port, config.metrics_port) == ("127.0.0.1", 50051, None)
    assert (config.step_timeout, config.drain_timeout) == (30.0, 30.0)
    assert (config.max_num_queued_reqs, config.max_num_queued_tokens) == (1024, 1_000_000)
    for field in dataclasses.fields(config):
        assert field.metadata["help"], field.name
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.grpc_port = 1  # type: ignore[misc]
    check_bind(config, read_keys(config))


def test_no_option_has_the_name_of_an_engine_option():
    names = [{f.name for f in dataclasses.fields(c)} for c in (ServeConfig, EngineConfig)]
    assert not names[0] & names[1]


@pytest.mark.parametrize(
    ("option", "given", "held"),
    [
        ("host", "::1", "::1"),
        ("host", "example.org", "example.org"),
        ("grpc_port", 0, 0),
        ("grpc_port", 65535, 65535),
        ("metrics_port", 0, 0),
        ("served_model_name", ["a", "b"], ("a", "b")),
        ("api_key", ["a,b"], ("a,b",)),
        ("api_key_file", Path("/keys"), "/keys"),
        ("step_timeout", 1, 1.0),
        ("drain_timeout", 0, 0.0),
        ("max_log_len", 0, 0),
        ("log_level", "debug", "debug"),
        ("log_format", "json", "json"),
    ],
)
def test_a_value_is_held_in_the_type_of_its_field(option: str, given: Any, held: Any):
    value = getattr(ServeConfig(**{option: given}), option)
    assert value == held
    assert type(value) is type(held)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": ""}, "host must be a name, or an address without brackets and port, got '';"),
        ({"host": "a b"}, "without brackets and port, got 'a b'; the port is grpc_port"),
        ({"host": "[::1]"}, "without brackets and port, got '[::1]'"),
        ({"host": "127.0.0.1:80"}, "without brackets and port, got '127.0.0.1:80'"),
        ({"host": "http://me"}, "without brackets and port, got"),
        ({"host": "me\n"}, "without brackets and port, got"),
        ({"grpc_port": 65536}, "grpc_port must be 0 (any free one) to 65535, got 65536"),
        ({"grpc_port": -1}, "grpc_port must be 0 (any free one) to 65535, got -1"),
        ({"grpc_port": "50051"}, "grpc_port must be a whole number, got '50051'"),
        ({"metrics_port": 70000}, "metrics_port must be 0 (any free one) to 65535, got 70000"),
        ({"metrics_port": 50051}, "metrics_port and grpc_port must differ, both are 50051;"),
        ({"served_model_name": [""]}, "served_model_name must not be empty; leave it out"),
        ({"ssl_certfile": "c"}, "ssl_certfile goes with ssl_keyfile; give both"),
        ({"ssl_keyfile": "k"}, "ssl_keyfile goes with ssl_certfile; give both"),
        ({"ssl_ca_certs": "a"}, "ssl_ca_certs goes with TLS; give ssl_certfile and ssl_keyfile"),
        ({"max_num_queued_reqs": 0}, "max_num_queued_reqs must be at least 1, got 0"),
        ({"max_num_queued_tokens": 0}, "max_num_queued_tokens must be at least 1, got 0"),
        ({"max_log_len": -1}, "max_log_len must be at least 0, got -1"),
        ({"step_timeout": 0}, "step_timeout must be a finite number of seconds above 0, got 0.0"),
        ({"step_timeout": float("inf")}, "step_timeout must be a finite number"),
        ({"step_timeout": float("nan")}, "step_timeout must be a finite number"),
        ({"drain_timeout": -1}, "drain_timeout must be a finite number of seconds, 0 or more, got"),
        ({"drain_timeout": float("inf")}, "drain_timeout must be a finite number"),
        ({"log_level": "INFO"}, "log_level must be 'debug' or 'info' or 'warning' or 'error'"),
        ({"log_format": "xml"}, "log_format must be 'text' or 'json', got 'xml'"),
        ({"allow_unauthenticated": 1}, "allow_unauthenticated must be bool, got 1"),
        ({"api_key": ""}, "api_key must be a list of str, got a str"),
        ({"api_key": [""]}, "api_key must not be empty; for none leave out the flag and the"),
    ],
)
def test_a_wrong_value_is_refused_with_the_rule(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as caught:
        ServeConfig(**options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["sesame opens", "sesame\n", "sesamé", "sesame\x7f", b"sesame", 7])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(key: Any):
    with pytest.raises(ConfigError) as caught:
        ServeConfig(api_key=["ok", key])
    assert str(caught.value) == (
        "api_key 2 of 2: a key is one or more ASCII characters without spaces; choose another"
    )
    with pytest.raises(ConfigError) as caught:
        ServeConfig(api_key=key)
    assert "sesam" not in str(caught.value)


def test_keys_are_not_in_the_repr():
    assert "sesame" not in repr(ServeConfig(api_key=("sesame",)))


def test_keys_of_the_file_come_after_those_of_the_option(tmp_path: Path):
    file = tmp_path / "keys"
    file.write_bytes(b"\xef\xbb\xbf# ours\r\n\n one,two \r\nb\nb\n  # more\nthree#3")
    config = ServeConfig(api_key=("a", "b", "a"), api_key_file=str(file))
    assert read_keys(config) == ("a", "b", "one,two", "three#3")
    assert read_keys(ServeConfig(api_key=("a", "b", "a"))) == ("a", "b")
    assert read_keys(ServeConfig()) == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read (No such file or directory); give a file that this user can read"),
        (b"", "has no key; write one a line, or leave the option out"),
        (b"# key\n\n", "has no key; write one a line, or leave the option out"),
        (b"\xff\xfe", "is not text; it holds one key a line"),
        (b"one\nse same\n", "a key is one or more ASCII characters without spaces"),
    ],
)
def test_a_file_without_sound_keys_is_refused(tmp_path: Path, content: bytes | None, message: str):
    """Also when the option has keys: whoever gives the file relies on it."""
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_keys(ServeConfig(api_key=("a",), api_key_file=str(file)))
    assert f"api_key_file {str(file)!r}" in str(caught.value)
    assert message in str(caught.value)
    assert "se same" not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost", "LocalHost"])
def test_loopback_needs_no_key(host: str):
    check_bind(ServeConfig(host=host), ())


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org", "127.1", "2130706433"],
)
def test_an_address_that_others_can_reach_needs_a_key(host: str):
    with pytest.raises(ConfigError) as caught:
        check_bind(ServeConfig(host=host), ())
    assert str(caught.value) == (
        f"host {host} can be reached by others and there is no key; give one with QUIRE_API_KEY, "
        "--api-key-file or --api-key, or allow everybody with --allow-unauthenticated"
    )
    check_bind(ServeConfig(host=host), ("key",))
    check_bind(ServeConfig(host=host, allow_unauthenticated=True), ())
