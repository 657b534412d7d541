"""Files are whole or absent: a process is killed at every system call of a write, and a disk is full for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from oprd.files import (
    DiskFullError,
    check_room,
    explaining_full_disk,
    remove_leftovers,
    set_aside,
    verify,
    write_json,
    write_manifest,
    write_text,
    writing,
    writing_folder,
)

KILLED_AT = """
    import os, signal, sys
    from pathlib import Path
    from oprd.files import remove_leftovers, writing_folder, write_text

    left = int(sys.argv[2])

    def killed(call):
        def counted(*args, **kwargs):
            global left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return call(*args, **kwargs)
        return counted

    for name in ("open", "fsync", "replace", "unlink", "rmdir", "mkdir"):
        setattr(os, name, killed(getattr(os, name)))
    {act}
    print("whole")
"""


def killed_at_each_call(act: str, prepare, look):
    """Run `act` in processes of their own, killed before the 1st, 2nd, … call to the system, until one ends whole."""
    seen = []
    for call in range(60):
        folder = prepare()
        program = textwrap.dedent(KILLED_AT).replace("{act}", act)
        process = subprocess.run(
            [sys.executable, "-c", program, str(folder), str(call)], capture_output=True, text=True
        )
        seen.append(look(folder))
        if process.stdout.strip() == "whole":
            return seen
        assert process.returncode == -9, process.stderr
    raise AssertionError("never whole")


@pytest.fixture
def folders(tmp_path):
    count = iter(range(1000))

    def make() -> Path:
        folder = tmp_path / str(next(count))
        folder.mkdir()
        write_text(folder / "config.yaml", "old")
        (folder / "model").mkdir()
        write_text(folder / "model" / "weights", "old")
        return folder

    return make


def test_a_file_is_old_or_new_whenever_the_writer_is_killed(folders):
    act = 'write_text(Path(sys.argv[1]) / "config.yaml", "new" * 10000)'
    seen = killed_at_each_call(act, folders, lambda folder: (folder / "config.yaml").read_text())
    assert set(seen) == {"old", "new" * 10000}
    assert seen[0] == "old"


def test_a_folder_is_old_or_new_whenever_the_writer_is_killed(folders):
    act = 'with writing_folder(Path(sys.argv[1]) / "model") as staged: write_text(staged / "weights", "new")'

    def look(folder):
        remove_leftovers(folder)
        assert {item.name for item in folder.iterdir()} == {"config.yaml", "model"}
        return (folder / "model" / "weights").read_text()

    seen = killed_at_each_call(act, folders, look)
    assert set(seen) == {"old", "new"}
    assert len(seen) > 6


def test_an_error_while_writing_leaves_what_was_there(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})

    def half_a_file():
        with writing(tmp_path / "x.json") as temporary:
            temporary.write_text("half")
            raise KeyError

    def half_a_folder():
        with writing_folder(tmp_path / "model") as staged:
            (staged / "weights").write_text("half")
            raise KeyError

    for write in (half_a_file, half_a_folder):
        with pytest.raises(KeyError):
            write()
    assert [item.name for item in tmp_path.iterdir()] == ["x.json"]
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_a_full_disk_is_one_sentence_with_the_free_bytes():
    def write():
        with explaining_full_disk(Path("x"), 5), open("/dev/full", "w") as full:
            full.write("hello")

    with pytest.raises(DiskFullError, match=r"the disk is full: 5 bytes are needed and [\d,]+ bytes are free"):
        write()


def test_room_is_checked_before_anything_is_written(tmp_path):
    check_room(tmp_path / "deep" / "checkpoint-1", 1)
    with pytest.raises(DiskFullError, match=r"checkpoint-1 cannot be written, because the disk is full"):
        check_room(tmp_path / "deep" / "checkpoint-1", 2**62)


def test_other_errors_pass_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), explaining_full_disk(tmp_path):
        (tmp_path / "none").read_text()


def test_a_file_that_no_manifest_lists_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_text("x")
    write_manifest(tmp_path)
    verify(tmp_path)
    (tmp_path / "README.md").write_text("for people")
    verify(tmp_path)
    (tmp_path / "adapter_model.bin").write_text("x")
    with pytest.raises(ValueError, match=r"adapter_model\.bin is not in the manifest"):
        verify(tmp_path)


def test_a_link_that_no_manifest_lists_is_refused(tmp_path):
    write_manifest(tmp_path)
    os.symlink("/nowhere", tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is not in the manifest"):
        verify(tmp_path)


def test_damaged_files_are_set_aside_without_replacing_each_other(tmp_path):
    for wanted in ("x.json.damaged", "x.json.damaged-2", "x.json.damaged-3"):
        (tmp_path / "x.json").write_text(wanted)
        assert set_aside(tmp_path / "x.json").name == wanted
    assert sorted(item.name for item in tmp_path.iterdir()) == [
        "x.json.damaged",
        "x.json.damaged-2",
        "x.json.damaged-3",
    ]


def test_text_with_lone_surrogates_is_written(tmp_path):
    write_text(tmp_path / "x", "a\ud800b")
    assert (tmp_path / "x").read_text() == "a?b"
