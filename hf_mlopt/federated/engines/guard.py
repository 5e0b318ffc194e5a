"""
Runs a command that must not outlive whoever has started this: `python -m hf_mlopt.federated.engines.guard [--again]
COMMAND ...`, in a session of its own, until its standard input ends.
"""

import os
import select
import signal
import subprocess
import sys


_PAUSE = 5.0  # seconds before a command that has failed is started again
_PATIENCE = 10.0  # seconds to end by itself


def main() -> int:
    """
    Returns:
        `int`: The command's exit status, if it has ended by itself.
    """
    again = sys.argv[1] == "--again"
    command = sys.argv[1 + again :]
    while True:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        is_over = False
        while process.poll() is None and not is_over:
            is_over = _stdin_ends_within(0.2)
        if is_over or not again or process.returncode == 0 or _stdin_ends_within(_PAUSE):
            break
    status = process.poll()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)  # what the command has started as well
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        pass
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if status is not None:
        return status
    os.killpg(0, signal.SIGKILL)
    return 1


def _stdin_ends_within(seconds: float) -> bool:
    return bool(select.select([0], [], [], seconds)[0]) and not os.read(0, 1024)


if __name__ == "__main__":
    sys.exit(main())
