"""
An audit log whose lines are chained by their hashes: what was asked and answered, never a value of the data.

Each line carries the SHA-256 of the line before it, so that none can be changed or taken out unnoticed. A second file,
`<log>.head`, holds number and hash of the last line, so that none can be cut off at the end. Who may write both files
can forge both: hand [`AuditLog.head`] to the other parties at the end of a run and give it to [`verify`].

A crash of the program leaves at most one half line, which the next start removes and notes. Lines that a power failure
took are not told from lines that someone took.
"""

import datetime
import hashlib
import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from hf_mlopt.errors import ConfigurationError, InputError


FIELDS = {  # what a line may say beside its event; no field takes a float or an array
    "peer": str,
    "purpose": str,
    "rid": str,
    "epoch": int,
    "batch": int,
    "rows": int,
    "bytes": int,
    "w_version": int,
    "budget_used": int,
    "detail": str,
}
_START = "0" * 64
_HEAD_BYTES = 20 + 1 + 64 + 1  # count, blank, hash, newline: one write of fixed size, in place
_MAX_TEXT = 500


@dataclass(frozen=True)
class AuditHead:
    """
    The end of a log.

    Args:
        lines (`int`): How many there are.
        digest (`str`): SHA-256 of the last one, hexadecimal.
    """

    lines: int
    digest: str


class AuditLog:
    """
    Appends to a log; threads may share it.

    Args:
        path (path): JSON lines; made if absent, otherwise continued.
        party (`str`): Whose log it is.

    Raises:
        InputError: If the log that is there does not verify.
    """

    def __init__(self, path: str | os.PathLike, party: str):
        self.path, self.party = Path(path), party
        self._lock = threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        half = _remove_half_line(self.path)
        fresh = not self.path.exists() or self.path.stat().st_size == 0
        if fresh and not _head_path(self.path).exists():
            self.head = AuditHead(0, _START)
        else:
            self.head = verify(self.path)
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._head_file = os.open(_head_path(self.path), os.O_WRONLY | os.O_CREAT, 0o600)
        self.record("continued" if self.head.lines else "started", detail="a half line was removed" if half else "")

    def record(self, event: str, **fields) -> None:
        """
        Args:
            event (`str`): What happened.
            **fields: Of [`FIELDS`]; text is cut at 500 characters.

        Raises:
            ConfigurationError: If a field is unknown or of another type, so that no value of the data slips in.
        """
        for name, value in fields.items():
            kind = FIELDS.get(name)
            if kind is None or type(value) is not kind:
                allowed = f"audit lines take {', '.join(f'{key} ({kind.__name__})' for key, kind in FIELDS.items())}"
                raise ConfigurationError(name, type(value).__name__, allowed)
        fields = {name: value[:_MAX_TEXT] if isinstance(value, str) else value for name, value in fields.items()}
        with self._lock:
            line = {
                "n": self.head.lines,
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
                "party": self.party,
                "event": event,
                **fields,
                "previous": self.head.digest,
            }
            data = json.dumps(line, ensure_ascii=False).encode()
            os.write(self._file, data + b"\n")
            self.head = AuditHead(self.head.lines + 1, hashlib.sha256(data).hexdigest())
            # After the line: a crash in between leaves a head that is one line short, never one line ahead.
            os.pwrite(self._head_file, f"{self.head.lines:020d} {self.head.digest}\n".encode(), 0)

    def close(self) -> None:
        """Writes the log through to the disk."""
        with self._lock:
            for file in (self._file, self._head_file):
                os.fsync(file)
                os.close(file)


def verify(path: str | os.PathLike, head: AuditHead | None = None) -> AuditHead:
    """
    Args:
        path (path): The log.
        head ([`AuditHead`], *optional*): An end that was seen before, which the log must still contain.

    Returns:
        [`AuditHead`]: The end of the log.

    Raises:
        InputError: If a line was changed, moved or taken out, or the log ends too early.
    """
    path = Path(path)
    try:
        data, noted = path.read_bytes(), _head_path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}): an audit log is two files") from error
    if data and not data.endswith(b"\n"):
        raise InputError(f"{path} ends in a half line: continue the log once, which removes it, or suspect a cut")
    known = [head] if head else []
    if len(noted) != _HEAD_BYTES or not noted[:20].isdigit():
        raise InputError(f"{_head_path(path)} is damaged: the end of the log cannot be checked")
    known.append(AuditHead(int(noted[:20]), noted[21:85].decode("ascii", "replace")))
    digests = [_START]
    for number, line in enumerate(data.splitlines()):
        try:
            content = json.loads(line)
            chained = content["previous"] == digests[-1] and content["n"] == number
        except (ValueError, KeyError, TypeError):
            chained = False
        if not chained:
            raise InputError(f"{path}, line {number + 1}: it or the line before was changed, moved or taken out")
        digests.append(hashlib.sha256(line).hexdigest())
    for end in known:
        if end.lines >= len(digests):
            raise InputError(f"{path} has {len(digests) - 1} lines, there were {end.lines}: lines at its end are gone")
        if digests[end.lines] != end.digest:
            raise InputError(f"{path}, line {end.lines}: changed since its hash was noted")
    return AuditHead(len(digests) - 1, digests[-1])


def _head_path(path: Path) -> Path:
    return path.with_name(path.name + ".head")


def _remove_half_line(path: Path) -> bool:
    """What a crash in the middle of a write left; whether there was any."""
    if not path.exists():
        return False
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole == len(data):
        return False
    os.truncate(path, whole)
    return True
