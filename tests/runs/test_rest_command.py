"""The command that does the rest of a run: part, summary and --continue differ from what was typed, and a shell reads it back."""

import os
import shlex
import subprocess

from crfrefine.runs.status.report import quote, rest_command, summary_of_part

TYPED = ["infer", "-i", "my images", "-p", "logits", "-o", "out", "--set", "bilateral.theta_beta=[0.1, 0.05]"]


def test_a_whole_run_is_continued(tmp_path, monkeypatch):
    command = rest_command([*TYPED, "--summary", "s.json", "--continue", "-v"], 1, 0, of_part=0, folder="")
    assert shlex.split(command) == ["crfrefine", *TYPED, "-v", "--continue", "--summary", "s.json"]
    monkeypatch.chdir(tmp_path)
    assert rest_command(TYPED, 1, 0, of_part=0, folder=str(tmp_path)).startswith("crfrefine infer -i 'my images'")
    for name in ("--continue", "--resume"):
        command = rest_command(("infer", "-i", "a", name, "-o", "b"), 1, 0, of_part=0, folder="")
        assert command == "crfrefine infer -i a -o b --continue"


def test_another_part_gets_its_number_and_its_summary():
    for options in (
        ["--num-parts", "5", "--part-id", "0", "--summary", "s_0.json"],
        ["--summary=s_0.json", "--part-id=0", "--continue", "--num-parts=5"],
    ):
        command = rest_command([*TYPED, *options], 5, 3, of_part=0, folder="/the data")
        there, _, rest = command.partition(" && ")
        assert shlex.split(there) == ["cd", "/the data"]
        assert shlex.split(rest) == ["crfrefine", *TYPED, "--continue", "--num-parts", "5", "--part-id", "3", "--summary", "s_3.json"]
    for summary, of_part, part_id, expected in (
        ("out/run0.part0.jsonl", 0, 12, "out/run0.part12.jsonl"),
        ("part_003.json", 3, 12, "part_012.json"),
        ("part_10.json", 10, 3, "part_3.json"),
        ("part_10.json", 0, 3, "part_10_3.json"),
        ("summary.jsonl", 2, 3, "summary_3.jsonl"),
    ):
        assert summary_of_part(summary, of_part, part_id) == expected


def test_a_shell_reads_back_every_word():
    words = ["plain", "a b", "it's", '$HOME `x` "y"', "tab\tline\nend", "caf\u00e9", os.fsdecode(b"\xff\\'"), "-x", ""]
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {' '.join(map(quote, words))}"], capture_output=True, check=True)
    assert done.stdout.split(b"\0")[:-1] == list(map(os.fsencode, words))
    assert all(quote(word).isprintable() for word in words)
