"""Messages with what users name things: bounded, on one line, and without characters that steer a terminal."""

from hypothesis import given, settings
from hypothesis import strategies as st

from crfrefine.base.text import MAX_CHARACTERS, for_terminal, listed, printable, shorten, shorten_value


def test_what_does_not_print_is_written_as_in_python_and_long_texts_end_in_an_ellipsis():
    for text, shown in (
        ("a name with é, 漢字 and \\", "a name with é, 漢字 and \\"),
        ("a\tb\nc\rd", r"a\tb\nc\rd"),
        ("\x1b[31mred \u202eto left", r"\x1b[31mred \u202eto left"),
        ("no text: \udcff \u2028\x85\x9b", r"no text: \udcff \u2028\x85\x9b"),
    ):
        assert printable(text) == shown
    assert shorten("x" * 80) == "x" * 80
    assert shorten("x" * 81) == "x" * 79 + "…"
    assert len(shorten("\0" * 60)) == MAX_CHARACTERS  # Escaped, it is longer.


def test_values():
    for value, shown in (
        (2.5, "2.5"),
        ("a\n", r"'a\n'"),
        ("x" * 100_000, "'" + "x" * 58 + "…"),
        (1 << 40_000, "a whole number of about 12042 digits"),
        ([1 << 40_000], "a list too large to show"),
        (list(range(1000)), "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, …"),
    ):
        assert shorten_value(value) == shown
        assert len(shorten_value(value)) <= 60
    assert listed(range(100_000)) == "0, 1, 2, 3, 4 and 99995 more"
    assert listed(["x" * 100, "y"], most=1) == "x" * 79 + "… and 1 more"


def test_the_lines_of_a_message_stay_and_those_of_names_do_not():
    message = "case 'a': two grids\n  a.nii  3×4\n  b.nii  5×6"
    assert for_terminal(message) == message
    assert for_terminal("a\nb.nii: no such file") == r"a\nb.nii: no such file"
    assert for_terminal("a\ncrfrefine: error: forged") == r"a\ncrfrefine: error: forged"
    assert len(for_terminal("x" * 100_000)) == 5000


@settings(max_examples=40)
@given(st.text())
def test_no_text_steers_a_terminal(text):
    shown = for_terminal(text)
    assert all(line.isprintable() for line in shown.split("\n"))
    assert all(line.startswith("  ") for line in shown.split("\n")[1:])
    assert printable(text).isprintable()
    assert shorten(text).isprintable()
    assert len(shorten(text)) <= MAX_CHARACTERS
