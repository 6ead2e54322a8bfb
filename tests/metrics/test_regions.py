"""Regions of the command line; what is wrong with one is named."""

import pytest

from crfrefine.errors import ConfigError
from crfrefine.metrics.regions import Region, parse_region


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
