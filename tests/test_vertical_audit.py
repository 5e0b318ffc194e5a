"""The audit log: whatever is changed in it is found, and a crash is not taken for a change."""

import json
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.vertical.audit import FIELDS, AuditHead, AuditLog, verify


@pytest.fixture
def log(tmp_path):
    """Ten answers of a responder."""
    log = AuditLog(tmp_path / "audit.jsonl", "bank")
    for batch in range(10):
        log.record("answered", peer="shop", rid=f"{batch:064x}", batch=batch, rows=256, bytes=2048, w_version=batch)
    log.close()
    return log


def copy_of(log, tmp_path, name="copy.jsonl"):
    path = tmp_path / name
    shutil.copy(log.path, path)
    shutil.copy(str(log.path) + ".head", str(path) + ".head")
    return path


def test_an_untouched_log_verifies(log):
    assert verify(log.path) == log.head and log.head.lines == 11
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["started"] + ["answered"] * 10
    assert {line["party"] for line in lines} == {"bank"} and lines[3]["batch"] == 2


def test_every_deleted_line_is_found(log, tmp_path):
    lines = log.path.read_bytes().splitlines(keepends=True)
    for number in range(len(lines)):
        path = copy_of(log, tmp_path)
        path.write_bytes(b"".join(lines[:number] + lines[number + 1 :]))
        with pytest.raises(InputError, match="taken out|are gone"):
            verify(path)


def test_every_cut_is_found(log, tmp_path):
    data = log.path.read_bytes()
    path = copy_of(log, tmp_path)
    for size in range(0, len(data), 13):
        path.write_bytes(data[:size])
        with pytest.raises(InputError, match="are gone|half line"):
            verify(path)


def test_every_changed_byte_is_found(log, tmp_path):
    data = log.path.read_bytes()
    path = copy_of(log, tmp_path)
    for place in range(0, len(data), 11):
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(bytes(changed))
        with pytest.raises(InputError):
            verify(path)


def test_swapped_repeated_and_inserted_lines_are_found(log, tmp_path):
    lines = log.path.read_bytes().splitlines(keepends=True)
    path = copy_of(log, tmp_path)
    for changed in (
        [*lines[:3], lines[4], lines[3], *lines[5:]],
        [*lines[:4], lines[3], *lines[4:]],
        [*lines, lines[-1]],
        [*lines, b"{}\n"],
        [*lines, b"[]\n"],
        [*lines, b"nothing\n"],
    ):
        path.write_bytes(b"".join(changed))
        with pytest.raises(InputError, match="changed, moved or taken out"):
            verify(path)


def test_a_log_forged_from_the_start_is_found_by_an_end_seen_before(log, tmp_path):
    forged = AuditLog(tmp_path / "forged.jsonl", "bank")
    for batch in range(10):
        forged.record("answered", peer="shop", batch=batch, rows=1)
    forged.close()
    assert verify(forged.path) == forged.head  # it is consistent in itself
    with pytest.raises(InputError, match="line 11: changed since its hash was noted"):
        verify(forged.path, log.head)
    with pytest.raises(InputError, match="has 11 lines, there were 12"):
        verify(log.path, AuditHead(12, "0" * 64))
    continued = AuditLog(log.path, "bank")
    continued.close()
    verify(log.path, log.head)  # lines may have come since


def test_a_log_is_two_files(log):
    head = log.path.with_name(log.path.name + ".head")
    content = head.read_bytes()
    head.write_bytes(content[:-5])
    with pytest.raises(InputError, match="is damaged"):
        verify(log.path)
    head.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        verify(log.path)
    with pytest.raises(InputError, match="cannot be read"):
        AuditLog(log.path, "bank")
    head.write_bytes(content)
    log.path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        AuditLog(log.path, "bank")  # deleted with its head kept: no new log under the old name


def test_a_log_goes_on_after_a_crash(log):
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + b'{"n": 11, "time": "2')
    with pytest.raises(InputError, match="half line"):
        verify(log.path)
    continued = AuditLog(log.path, "bank")
    continued.record("answered", peer="shop", batch=10)
    continued.close()
    assert log.path.read_bytes().startswith(whole) and verify(log.path).lines == 13
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert (lines[11]["event"], lines[11]["detail"]) == ("continued", "a half line was removed")


def test_a_crash_between_the_line_and_its_head_is_no_change(log, tmp_path):
    path = copy_of(log, tmp_path)
    more = AuditLog(log.path, "bank")
    more.close()
    path.write_bytes(log.path.read_bytes())  # one line more than its head says
    assert verify(path) == more.head
    AuditLog(path, "bank").close()
    assert verify(path).lines == 13


def test_a_tampered_log_is_not_continued(log):
    data = log.path.read_bytes()
    log.path.write_bytes(data.replace(b'"rows": 256', b'"rows": 255', 1))
    with pytest.raises(InputError, match="changed"):
        AuditLog(log.path, "bank")


WRITER = """
import sys
from hf_mlopt.vertical.audit import AuditLog
log = AuditLog(sys.argv[1], "bank")
while True:
    log.record("answered", peer="shop", detail="x" * 400)
"""


@pytest.mark.distributed
def test_a_killed_process_leaves_a_log_that_goes_on(tmp_path):
    path = tmp_path / "audit.jsonl"
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
        size = path.stat().st_size if path.exists() else 0
        while not path.exists() or path.stat().st_size < size + 50_000:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
        log = AuditLog(path, "bank")
        log.close()
        assert verify(path) == log.head


def test_threads_share_a_log(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl", "bank")
    threads = [threading.Thread(target=lambda: [log.record("x", batch=i) for i in range(100)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert verify(log.path).lines == 401


@pytest.mark.parametrize(
    "fields",
    [
        {"theta": 0.5},
        {"rows": 0.5},
        {"rows": True},
        {"rows": np.float64(3)},
        {"batch": np.int64(3)},
        {"detail": np.arange(3)},
        {"detail": [1.0]},
        {"peer": b"bank"},
        {"weights": 3},
    ],
)
def test_no_value_of_the_data_slips_in(log, fields):
    before = log.path.read_bytes()
    log = AuditLog(log.path, "bank")
    with pytest.raises(ConfigurationError, match="audit lines take peer"):
        log.record("answered", **fields)
    log.close()
    assert len(log.path.read_bytes().splitlines()) == len(before.splitlines()) + 1
    assert set(FIELDS.values()) == {str, int}


def test_text_of_a_peer_stays_one_short_line(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl", "bank")
    log.record("malformed", peer="shop", detail='x\n{"n": 2}\n\u2028\r' + "y" * 10_000)
    log.close()
    assert verify(log.path).lines == 2 and log.path.stat().st_size < 1500
