"""Finished runs survive an interruption."""

import json

import pytest

from moeca_fx.bench.store import Store
from moeca_fx.errors import InputError, MoecaError

KEY, OTHER = {"entry": "fora", "steps": 20}, {"steps": 20, "entry": "toca"}


def test_a_record_is_found_again_whatever_the_order_of_its_key(tmp_path):
    path = tmp_path / "new" / "runs.jsonl"
    store = Store(path)
    assert store.get(KEY) is None
    store.add(KEY, {"psnr": 30.5})
    store.add(OTHER, None)
    again = Store(path)
    assert again.get({"steps": 20, "entry": "fora"}) == {"psnr": 30.5}
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == [KEY, OTHER]


def test_a_line_that_was_cut_off_is_dropped_and_the_next_one_is_whole(tmp_path):
    path = tmp_path / "runs.jsonl"
    Store(path).add(KEY, 1)
    with path.open("a") as file:
        file.write('{"key": {"entry": "to')
    store = Store(path)
    assert store.get(KEY) == 1
    store.add(OTHER, 2)
    assert Store(path).get(OTHER) == 2
    path.write_text('{"key": {"ent')  # cut off in the first line
    assert Store(path).get(KEY) is None
    assert path.read_text() == ""


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"key": {"a": 1}, "record": 1}\nnot a record\n')
    with pytest.raises(InputError, match=r"runs.jsonl, line 2: expected a record of a bench run"):
        Store(path)


def test_an_unwritable_folder_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MoecaError, match="cannot write into the folder"):
        Store(tmp_path / "file" / "runs.jsonl")
