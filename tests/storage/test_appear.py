"""Files and folders that are whole or absent: after a kill at any moment, among several jobs, and on disk."""

import os
import shutil
import signal
import stat
from pathlib import Path
from unittest import mock

import pytest

from toolkit.storage.appear import give_name, made_once, new_file, new_folder, remove, to_disk, unfinished_name


def write_folder(path, text, durable=False):
    with new_folder(path, durable=durable) as unfinished:
        (unfinished / "inner").mkdir()
        for name in ("one", "inner/two"):
            (unfinished / name).write_text(text)


def write_file(path, text, durable=False):
    with new_file(path, durable=durable) as unfinished:
        unfinished.write_text(text)


def content(path):
    """Of a file, or of the files in a folder; None where there is nothing."""
    if not path.is_dir():
        return path.read_text() if path.exists() else None
    return {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()}


def whole(write, text):
    return text if write is write_file else {"one": text, "inner/two": text}


def killed_before_call(number, work):
    """Runs `work` in a child that kills itself before it renames, deletes or syncs for the `number`-th time. Whether it
    came to that."""
    child = os.fork()
    if child == 0:
        calls = iter(range(number))

        def counted(function):
            def call(*args, **kwargs):
                if next(calls, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        for owner, name in ((os, "rename"), (os, "rmdir"), (os, "unlink"), (os, "fsync"), (os, "mkdir")):
            setattr(owner, name, counted(getattr(owner, name)))
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_a_kill_leaves_the_old_one_nothing_or_the_new_one_and_the_next_job_clears_up(tmp_path, write):
    path, seen, number = tmp_path / "x", [], 0
    write(path, "old")
    while killed_before_call(number, lambda: write(path, "new", durable=True)):
        seen.append(content(path))
        write(path, "old")
        assert content(path) == whole(write, "old") and [found.name for found in tmp_path.iterdir()] == ["x"]
        number += 1
    allowed = [whole(write, "old"), whole(write, "new"), *([None] if write is write_folder else [])]
    assert number > 3 and all(found in allowed for found in seen), seen
    assert seen[0] == whole(write, "old") and seen[-1] == whole(write, "new")


def test_a_kill_while_a_folder_is_deleted_leaves_no_part_of_it_under_its_name(tmp_path):
    path, number = tmp_path / "x", 0
    write_folder(path, "old")
    while killed_before_call(number, lambda: remove(path)):
        assert content(path) in (None, whole(write_folder, "old"))
        write_folder(path, "old")
        number += 1
    assert number > 3 and list(tmp_path.iterdir()) == []
    remove(path)  # there is none


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_a_failure_leaves_the_older_one_and_nothing_beside_it(tmp_path, write):
    write(tmp_path / "x", "old")
    sync = mock.patch.object(os, "fsync", side_effect=OSError("no room"))  # everything is written by then
    with sync, pytest.raises(OSError, match="no room"):
        write(tmp_path / "x", "new", durable=True)
    assert content(tmp_path / "x") == whole(write, "old") and [p.name for p in tmp_path.iterdir()] == ["x"]


def recorded(work):
    """The paths that `work` synchronises, in order, with None where it renames."""
    calls, fsync, rename = [], os.fsync, Path.rename

    def synced(handle):
        calls.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def renamed(self, to):
        rename(self, to)  # raises where there is nothing of that name
        calls.append(None)

    with mock.patch.object(os, "fsync", synced), mock.patch.object(Path, "rename", renamed):
        work()
    return calls


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_what_is_durable_is_on_disk_before_it_has_its_name_and_then_the_name_is(tmp_path, write):
    path = tmp_path / "a" / "b" / "x"
    assert recorded(lambda: write(path, "new")) == [None]
    calls = recorded(lambda: write(path, "new", durable=True))
    last_rename = len(calls) - 1 - calls[::-1].index(None)
    made = unfinished_name(path)
    inner = ["/one", "/inner", "/inner/two"] if write is write_folder else []
    first = calls.index(None)
    assert sorted(calls[:first]) == sorted(str(made) + name for name in ["", *inner])
    assert calls[first - 1] == str(made)  # the folder after what is in it
    assert calls[last_rename + 1 :] == [str(tmp_path / "a" / "b"), str(tmp_path / "a"), str(tmp_path)]


def test_a_folder_that_cannot_be_synchronised_is_passed_over_and_a_file_is_not(tmp_path):
    (tmp_path / "file").write_text("x")
    with mock.patch.object(os, "fsync", side_effect=OSError("not here")):
        to_disk(tmp_path)
        with pytest.raises(OSError, match="not here"):
            to_disk(tmp_path / "file")
    with pytest.raises(FileNotFoundError):
        to_disk(tmp_path / "none")


def test_of_several_jobs_the_first_one_s_folder_stays(tmp_path):
    path = tmp_path / "cache" / "x"

    def make(folder):
        made_once(path, lambda other: (other / "by").write_text("another job, meanwhile"))
        (folder / "by").write_text("this one")

    assert made_once(path, make) == path
    assert content(path) == {"by": "another job, meanwhile"} and [p.name for p in path.parent.iterdir()] == ["x"]
    made_once(path, lambda folder: pytest.fail("made again"))
    with pytest.raises(ZeroDivisionError):
        made_once(tmp_path / "y", lambda folder: 1 // 0)
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_a_folder_with_files_is_not_replaced_where_it_must_not_be(tmp_path):
    write_folder(tmp_path / "x", "old")
    write_folder(tmp_path / "made", "new")
    with pytest.raises(OSError):
        give_name(tmp_path / "made", tmp_path / "x", durable=False, replaces=False)
    assert content(tmp_path / "x") == whole(write_folder, "old")
    shutil.rmtree(tmp_path / "x")
    give_name(tmp_path / "made", tmp_path / "x", durable=False, replaces=False)
    assert content(tmp_path / "x") == whole(write_folder, "new")


def test_a_file_has_the_mode_that_any_new_file_has(tmp_path):
    (tmp_path / "plain").write_text("")
    write_file(tmp_path / "x", "new")
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
