"""The folder of a run: one writer, files that are whole, and what cannot be used."""

import os
import pathlib
import subprocess
import sys

import pytest

from examples.llama.config import TrainConfig, UsageError
from examples.llama.run_folder import (
    check_writable,
    choose_run_dir,
    only_writer,
    parse_object,
    read_text,
    write_whole,
)

ROOT = pathlib.Path(__file__).parents[2]


def test_a_second_writer_is_refused(tmp_path):
    with only_writer(tmp_path / "run"):
        with (
            pytest.raises(
                UsageError, match=rf"another run \(.*, process {os.getpid()}, "
            ),
            only_writer(tmp_path / "run"),
        ):
            pass
    with only_writer(tmp_path / "run"):
        pass


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path, capsys):
    program = (
        "import os, pathlib, signal, sys\n"
        "from examples.llama.run_folder import only_writer\n"
        "with only_writer(pathlib.Path(sys.argv[1])):\n"
        "    print(os.getpid(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    (tmp_path / "config.json.77.partial").write_text("cut")
    with only_writer(tmp_path):
        (line,) = capsys.readouterr().err.splitlines()
    assert f", process {int(killed.stdout)}, since " in line
    assert line.endswith(" is taken over: that run was killed")
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize(
    "trace", ["checkpoints", "records", "damaged", "metrics.jsonl", "config.json"]
)
def test_whatever_a_run_left_is_not_written_over(tmp_path, trace):
    (tmp_path / trace).mkdir()
    with pytest.raises(UsageError, match=f"already holds a run: .*found {trace}"):
        choose_run_dir(TrainConfig(run_dir=str(tmp_path)))
    assert choose_run_dir(TrainConfig(run_dir=str(tmp_path), resume=True)) == tmp_path


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("file", "file is no folder"),
        ("file/below", "file is no folder"),
        ("dangling", "dangling is no folder"),
        ("dangling/below", "dangling is no folder"),
        ("loop", "loop is no folder"),
        ("/proc/self", "(is not writable|cannot be used)"),
        ("/dev/null/run", "/dev/null is no folder"),
        ("x" * 5000, "File name too long"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, folder, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match=message):
        check_writable("--run-dir", tmp_path / folder)
        with only_writer(tmp_path / folder / "run"):
            pass


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        write_whole(tmp_path / "taken", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_what_is_read_may_be_anything(tmp_path):
    path = tmp_path / "a.json"
    for make, message in [
        (lambda: os.mkfifo(path), "is no file"),
        (lambda: path.symlink_to("/dev/zero"), "is no file"),
        (lambda: path.symlink_to("nowhere"), "is no file"),
        (lambda: path.write_bytes(b"\xff"), "invalid start byte"),
        (lambda: path.write_text("12345"), "more than 4 bytes"),
    ]:
        make()
        with pytest.raises(ValueError, match=message):
            read_text(path, 4)
        path.unlink()
    for text in ("", "[]", "7", "[" * 100_000, "{", "9" * 10_000):
        with pytest.raises(ValueError):
            parse_object(text)
