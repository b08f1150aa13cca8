"Where values from outside come in: ranges, settings, JSON, paths, the environment."
import dataclasses
import math
import subprocess
import sys
import typing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamer4_nb.core import UserError
from dreamer4_nb.inputs import (COUNT, DECAY, NATURAL, POSITIVE, SEED, SHARE, Count, Range, Share, check_fields,
                                environment_number, from_dict, local_path, read_json, read_json_lines, to_dict)
from dreamer4_nb.runs.presets import PRESETS, Preset, resolve


@pytest.mark.parametrize(("value_range", "inside", "outside"), [
    (COUNT, [1, 7, np.int64(3)], [0, -1, 1.0, True, "1", None, math.nan]),
    (NATURAL, [0, 1], [-1, 0.5, False]),
    (SEED, [0, 2**32 - 1], [-1, 2**32]),
    (POSITIVE, [1e-9, 1, np.float32(2)], [0, -1.0, math.inf, math.nan]),
    (SHARE, [0, 0.5, 1.0], [-1e-9, 1 + 1e-9, math.nan]),
    (DECAY, [0, 0.999], [1, 1.0])])
def test_a_range_holds_its_ends_and_nothing_else(value_range, inside, outside):
    for value in inside:
        assert value_range.check("x", value) == value
    for value in outside:
        with pytest.raises(UserError, match="x is .*; expected a"):
            value_range.check("x", value)


@given(st.floats(), st.floats(-10, 10), st.floats(-10, 10), st.booleans(), st.booleans())
def test_a_range_is_the_interval_that_it_says(value, low, high, open_low, open_high):
    expected = (value > low if open_low else value >= low) and (value < high if open_high else value <= high)
    assert (value in Range(low=low, high=high, open_low=open_low, open_high=open_high)) == expected


def numeric_fields(cls: type, where: str = "") -> list[tuple[str, object]]:
    "(name, type) of all fields of numbers, in a dataclass and in those inside it."
    found = []
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            found += numeric_fields(hint, f"{where}{field.name}.")
        elif any(kind in (int, float) for kind in [typing.get_origin(hint) or hint, *typing.get_args(hint)]):
            found.append((where + field.name, hint))
    return found


def test_every_numeric_setting_declares_its_range():
    fields = numeric_fields(Preset)
    assert len(fields) > 90
    bare = [name for name, hint in fields
            if not any(isinstance(data, Range) for kind in (hint, *typing.get_args(hint))
                       for data in typing.get_args(kind))]
    assert bare == []


def changed(config: object, path: list[str], value: object) -> object:
    "A config with one field, at any depth, of another value."
    name, *rest = path
    return dataclasses.replace(config, **{name: changed(getattr(config, name), rest, value) if rest else value})


@pytest.mark.parametrize("name", [name for name, _ in numeric_fields(Preset)])
def test_no_setting_takes_nan_text_or_a_negative_number(name):
    preset = PRESETS["tiny"]
    for value in (math.nan, "many", -3, -math.inf, [1]):
        with pytest.raises(UserError, match=name.rpartition(".")[2]):
            changed(preset, name.split("."), value)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_made_and_read_back(name):
    preset = resolve(PRESETS[name])
    assert from_dict(Preset, to_dict(preset)) == preset


@dataclass(frozen=True)
class Inner:
    size: Count = 1
    share: Share | None = None
    pairs: tuple[tuple[str, int], ...] = ()
    kind: typing.Literal["a", "b"] = "a"

    def __post_init__(self):
        check_fields(self)


@pytest.mark.parametrize("values", [
    {"size": 0}, {"size": 1.5}, {"size": True}, {"share": 2}, {"share": "half"}, {"pairs": [("a", 1)]}, {"pairs": (("a", "b"),)},
    {"pairs": (("a", 1, 2),)}, {"kind": "c"}])
def test_fields_of_all_kinds_are_checked(values):
    with pytest.raises(UserError, match=f"Inner.{next(iter(values))}"):
        Inner(**values)


def test_good_fields_pass():
    assert Inner(3, None, (("a", 1), ("b", 2)), "b").size == 3
    assert Inner(share=0.5).share == 0.5


def test_json_that_cannot_be_read_says_which_file_and_what_to_do(tmp_path):
    path = tmp_path / "a.json"
    for text in (b"", b'{"a": ', b"[]", b"3", b"\xff\xfe", b"nul"):
        path.write_bytes(text)
        with pytest.raises(UserError, match="a.json .*; make it again"):
            read_json(path, "make it again")
    with pytest.raises(UserError, match="no file .*; make it again"):
        read_json(tmp_path / "b.json", "make it again")
    with pytest.raises(UserError, match="make it again"):
        read_json(tmp_path, "make it again")
    path.write_bytes(b'{"a": 1}')
    assert read_json(path, "") == {"a": 1}


def test_one_torn_record_costs_one_record(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo\xff\n3\n{"step": 4}\n{"st')
    assert read_json_lines(path) == [{"step": 1}, {"step": 4}]


@pytest.mark.parametrize("address", ["s3://bucket/x.zarr", "file:///tmp/x", "http://a/b", "zip://x", Path("s3://bucket/x")])
def test_an_address_is_no_local_path(address):
    with pytest.raises(UserError, match="is an address"):
        local_path(address)


def test_local_paths():
    assert local_path("~/a") == Path.home() / "a"
    assert local_path("a/b:c") == Path("a/b:c")
    assert local_path("C:/x") == Path("C:/x")
    for bad in ("", " ", "a\0b"):
        with pytest.raises(UserError, match="is no path"):
            local_path(bad)
    with pytest.raises(UserError, match="home folder is not known"):
        local_path("~nobody_of_this_name/x")


def test_numbers_of_the_environment(monkeypatch):
    for text, value in (("3", 3), ("2,1", 2), (" 4 ", 4), ("", None)):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert environment_number("OMP_NUM_THREADS") == value
    for text in ("auto", "0", "-1", "1.5", "1e3"):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        with pytest.raises(UserError, match="OMP_NUM_THREADS is .*unset OMP_NUM_THREADS"):
            environment_number("OMP_NUM_THREADS")
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert environment_number("OMP_NUM_THREADS") is None


def test_output_never_dies_of_its_encoding():
    program = "from dreamer4_nb.inputs import tolerant_output; tolerant_output(); print('±→ü')"
    shown = subprocess.run([sys.executable, "-c", program], env={"PYTHONIOENCODING": "ascii", "PATH": ""}, capture_output=True)
    assert (shown.returncode, shown.stdout) == (0, b"???\n")


@pytest.mark.parametrize(("given", "expected"), [
    ({}, "3000 None"), ({"GOMP_SPINCOUNT": "7"}, "7 None"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None ACTIVE")])
def test_threads_that_wait_leave_their_core_unless_the_user_says_otherwise(given, expected):
    program = "import dreamer4_nb, os, sys; print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_WAIT_POLICY'), 'torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", program], env={"PATH": "", **given}, capture_output=True, text=True)
    assert shown.stdout == f"{expected} False\n", shown.stderr
