"""Files of tuned sizes: what is there, and what a file may not be."""

import json
from importlib import resources
from typing import Any

import pytest
from quire.pallas_kernels.tuning import TuningError, load, parse, stages_that_fit


def content() -> dict[str, Any]:
    text = (resources.files("quire.pallas_kernels") / "tuned" / "h200.json").read_text()
    values: dict[str, Any] = json.loads(text)
    return values


def test_no_device_stands_behind_the_sizes_yet() -> None:
    sizes = load("h200")
    assert (sizes.device, sizes.measured, sizes.num_sms) == ("NVIDIA H200", False, 132)
    assert "no run on a device" in content()["why"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_sms": 0}, r"f.json: num_sms must be a positive whole number, got 0"),
        ({"num_sms": "132"}, r"num_sms must be a positive whole number, got '132'"),
        ({"speed": 1}, r"f.json: missing \[\], unknown \['speed'\]"),
        ({"decode": {"keys": 64}}, r"f.json: decode: missing \['most_stages', .*\], unknown \[\]"),
        ({"prefill": {"keys": 96, "most_stages": 2}}, r"keys must be a multiple of 64, got 96"),
        ({"linear": {}}, r"f.json: linear: missing \['columns', "),
    ],
)
def test_a_file_that_cannot_be_used_says_why(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TuningError, match=message):
        parse(content() | change, "f.json")


def test_stages_are_what_shared_memory_holds() -> None:
    sizes = load("h200")
    assert stages_that_fit(sizes, 64 << 10, 0, 9) == 3
    assert stages_that_fit(sizes, 64 << 10, 0, 2) == 2
    assert stages_that_fit(sizes, 64 << 10, 1 << 20, 9) == 0
