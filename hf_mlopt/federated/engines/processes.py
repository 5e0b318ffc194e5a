"""Sites in a few processes of this machine: side by side, and left behind where they die or are too slow."""

import gc
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait

import torch

from hf_mlopt.federated.algorithms import Message
from hf_mlopt.federated.engines.base import Answer, Exchanged, answered


class ProcessEngine:
    """
    Any worker answers for any site; what sites keep is in files.

    Args:
        names (`Sequence[str]`): The sites.
        answer (`Callable[[str, Message], Message]`): What stands at each of them; every worker gets a copy.
        num_workers (`int`): Processes.
        timeout (`float`, *optional*): Seconds of an exchange; whoever has not answered by then has failed. The first
            one includes the start of the workers and the making of their models.
        retries (`int`, *optional*, defaults to 1): How often a site is asked again whose process died.
    """

    def __init__(
        self, names: Sequence[str], answer: Answer, num_workers: int, timeout: float | None = None, retries: int = 1
    ):
        self.names, self.timeout, self.retries = list(names), timeout, retries
        import dill  # it comes with datasets, which only some machines have; for functions of a notebook

        self._answer = dill.dumps(answer, recurse=True)
        self._workers: list[_Worker | None] = [None] * min(num_workers, len(self.names))

    def sites(self) -> list[str]:
        """See [`Engine`]."""
        return self.names

    def exchange(self, messages: Mapping[str, Message], exchanged: Exchanged, on_reply: Callable[[str], None]) -> None:
        """See [`Engine`]."""
        ends = None if self.timeout is None else time.monotonic() + self.timeout
        waiting, busy = deque((site, 0) for site in messages), {}

        def failed(site: str, reason: str) -> None:
            exchanged.failures[site] = reason
            on_reply(site)

        while waiting or busy:
            for number in range(len(self._workers)):
                if waiting and number not in busy:
                    busy[number] = waiting.popleft()
                    self._started(number).send(busy[number][0], messages[busy[number][0]])
            left = None if ends is None else max(0.0, ends - time.monotonic())
            ready = wait([self._workers[number].connection for number in busy], left)
            if not ready:
                for number, (site, _) in busy.items():
                    self._stop(number)
                    failed(site, f"no answer within {self.timeout:g} s")
                for site, _ in waiting:
                    failed(site, f"not reached within {self.timeout:g} s; more num_workers would help")
                return
            for number in [n for n in busy if self._workers[n].connection in ready]:
                (site, tries), reply = busy.pop(number), self._workers[number].receive()
                if reply is not None:
                    exchanged.take(site, reply)
                    on_reply(site)
                    continue
                code = self._stop(number)
                if tries < self.retries:
                    waiting.append((site, tries + 1))
                else:
                    failed(site, f"its process died (exit code {code})")

    def close(self) -> None:
        """See [`Engine`]."""
        for number in range(len(self._workers)):
            self._stop(number)

    def _started(self, number: int) -> "_Worker":
        if self._workers[number] is None:
            num_threads = max(1, torch.get_num_threads() // len(self._workers))
            self._workers[number] = _Worker(self._answer, num_threads)
        return self._workers[number]

    def _stop(self, number: int) -> int | None:
        worker, self._workers[number] = self._workers[number], None
        return worker.stop() if worker is not None else None


class _Worker:
    def __init__(self, answer: bytes, num_threads: int):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, answer, num_threads), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self._sending: threading.Thread | None = None

    def send(self, site: str, message: Message) -> None:
        """Returns at once: a pipe takes no more than its buffer from a worker that does not read."""
        self._sending = threading.Thread(target=self._send, args=(site, message), daemon=True)
        self._sending.start()

    def _send(self, site: str, message: Message) -> None:
        try:
            self.connection.send((site, *message.to_flat()))
        except OSError:
            pass  # it has died, which `receive` finds

    def receive(self) -> Message | None:
        try:
            return Message.from_flat(*self.connection.recv())
        except (EOFError, OSError):
            return None

    def stop(self) -> int | None:
        if self._sending is not None and self._sending.is_alive():
            self.process.kill()  # it does not read, and a pipe is not to be closed under a thread that writes to it
            self._sending.join()
        self.connection.close()
        self.process.join(timeout=0.1 if self.process.is_alive() else None)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        return self.process.exitcode


def _serve(connection: Connection, pickled: bytes, num_threads: int) -> None:
    import dill

    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    torch.set_num_threads(num_threads)
    answer = dill.loads(pickled)
    gc.freeze()  # see `spared_modules` of the trainer
    while True:
        try:
            site, header, arrays = connection.recv()
        except EOFError:  # the server has gone
            return
        reply = answered(answer, site, Message.from_flat(header, arrays))
        connection.send(reply.to_flat())
