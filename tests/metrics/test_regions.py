"""Regions from the command line, from JSON files and from `dataset.json`; what is wrong with one is named."""

import json

import pytest

from crfrefine.errors import ConfigError, InputError
from crfrefine.metrics.regions import Region, parse_region, read_regions


def _write(tmp_path, content):
    path = tmp_path / "regions.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("core=1+3+4", Region("core", (1, 3, 4))),
        ("enhancing=4", Region("enhancing", (4,))),
        (" whole tumor = 4 + 2+1+ 3+4", Region("whole tumor", (1, 2, 3, 4))),
    ],
)
def test_a_region_of_the_command_line(text, expected):
    assert parse_region(text) == expected


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("core", "expected NAME=LABEL+LABEL+..."),
        ("=1+2", "it has no name"),
        ("core=1,3", "'1,3' is not the number of a label"),
        ("core=0+1", "label 0 is the background"),
        ("mean=1", "choose another one"),
    ],
)
def test_a_bad_region_of_the_command_line_is_named(text, complaint):
    with pytest.raises(ConfigError) as raised:
        parse_region(text)
    assert repr(text) in str(raised.value)
    assert complaint in str(raised.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"whole": [1, 2, 4], "core": "1+3+4", "enhancing": 4}, {"whole": (1, 2, 4), "core": (1, 3, 4), "enhancing": (4,)}),
        ({"name": "x", "labels": {"background": 0, "anterior": 1, "posterior": 2, "ignore": 3}}, {"anterior": (1,), "posterior": (2,)}),
        (  # label regions of nnU-Net, and a "regions" entry beside them that may repeat one
            {
                "labels": {"background": 0, "whole": [1, 2, 3], "tumor": 3},
                "regions_class_order": [1],
                "regions": {"core": [2, 3], "tumor": [3]},
            },
            {"whole": (1, 2, 3), "tumor": (3,), "core": (2, 3)},
        ),
    ],
)
def test_a_json_file(tmp_path, content, expected):
    assert read_regions(_write(tmp_path, content)) == tuple(Region(name, labels) for name, labels in expected.items())


def test_labels_of_the_first_nnunet_were_numbers_to_names(tmp_path):
    file = _write(tmp_path, {"labels": {"0": "background", "1": "liver", "2": "tumor"}})
    assert read_regions(file) == (Region("liver", (1,)), Region("tumor", (2,)))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "not JSON"),
        ([1, 2], "expected a mapping of names to labels"),
        ({"core": []}, "region 'core': it has no labels"),
        ({"core": [1.5]}, "region 'core': 1.5 is not the number of a label"),
        ({"core": True}, "region 'core': True is not the number of a label"),
        ({"labels": {"a": 1}, "regions": [1]}, '"regions": expected a mapping'),
        ({"labels": {"a": 1}, "regions": {"a": [1, 2]}}, "region 'a' appears twice, with different labels"),
    ],
)
def test_a_bad_file_is_named_with_its_entry(tmp_path, content, complaint):
    path = _write(tmp_path, content)
    with pytest.raises(InputError) as raised:
        read_regions(path)
    assert str(path) in str(raised.value)
    assert complaint in str(raised.value)
    with pytest.raises(InputError, match=r"nowhere\.json: no such file"):
        read_regions(tmp_path / "nowhere.json")
