"""Files are written whole or not at all, and only where a file may stand."""

import os
import signal
import stat
import subprocess
import sys
import threading

import pytest

from laminar import _files
from laminar._errors import InputError
from laminar._files import atomic_write, check_writable
from laminar.io import load, save


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file"


def test_pipes_devices_and_protected_files_are_refused(path):
    os.mkfifo(path)
    for target in (path, "/dev/null"):
        with pytest.raises(InputError, match="not a regular file"):
            atomic_write(target, b"x")
    path.unlink()
    path.write_bytes(b"old")
    path.chmod(0o400)
    with pytest.raises(InputError, match="write-protected"):
        check_writable(path)
    assert path.read_bytes() == b"old"


def test_names_longer_than_names_can_be(tmp_path):
    longest = tmp_path / ("é" * 127)
    atomic_write(longest, b"x")
    assert os.listdir(tmp_path) == [longest.name]
    with pytest.raises(InputError, match="too long") as caught:
        check_writable(tmp_path / ("n" * 5000))
    assert len(str(caught.value)) < 300
    with pytest.raises(InputError, match="cannot be read"):
        _files.unpack(tmp_path / ("n" * 300), kind="model", version=1)


def test_what_a_killed_writer_left_is_taken_over(path):
    code = (
        "import os, signal, sys\n"
        "from laminar import _files\n"
        "_files.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "_files.atomic_write(sys.argv[1], b'killed')\n"
    )
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
        assert done.returncode == -signal.SIGKILL
        assert os.listdir(path.parent) == [".file.tmp"]
    atomic_write(path, b"new")
    assert os.listdir(path.parent) == ["file"]
    assert path.read_bytes() == b"new"


def test_the_mask_decides_without_being_changed(path, monkeypatch):
    monkeypatch.setattr(os, "umask", None)
    atomic_write(path, b"x")
    monkeypatch.undo()
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_writers_of_one_name_do_not_mix(path):
    contents = [bytes([i]) * 100_000 for i in range(6)]

    def write(content):
        for _ in range(5):
            atomic_write(path, content)
            assert path.read_bytes() in contents

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert os.listdir(path.parent) == ["file"]


def test_a_failed_save_leaves_the_old_file(path, monkeypatch):
    save(path, 1)
    before = path.read_bytes()
    with pytest.raises(InputError):
        save(path, lambda x: x)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="cannot be written: No space left"):
        save(path, 2)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_unwritable_destinations(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        save(tmp_path, 1)
    with pytest.raises(InputError, match="does not exist"):
        save(tmp_path / "no" / "model.lam", 1)


def test_permissions_and_links(path):
    mask = os.umask(0o027)
    try:
        save(path, 1)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o600)
    link = path.with_name("link.lam")
    link.symlink_to(path)
    save(link, 2)
    assert link.is_symlink()
    assert load(path) == 2
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
