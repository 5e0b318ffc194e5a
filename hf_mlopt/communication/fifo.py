"""One thread that takes tasks in the order they came, for collectives that must meet in the same order everywhere."""

import queue
import threading
from collections.abc import Callable

import torch


class Fifo:
    """
    Runs tasks one after the other beside the backward pass.

    Collectives called from callbacks of other collectives run in an order that differs from rank to rank, and hang on
    gloo as soon as there are two buckets; here the order is that of `submit`.
    """

    def __init__(self, name: str):
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._broken: Exception | None = None
        self._thread.start()

    def submit(self, task: Callable[[], torch.Tensor]) -> torch.futures.Future:
        """
        Args:
            task (`Callable`): Called once; its tensor becomes the future's value, its exception the future's.
        """
        if not self._thread.is_alive():
            raise RuntimeError(f"{self._thread.name} has ended: wrap the model in DDP anew")
        future = torch.futures.Future()
        self._tasks.put((task, future))
        return future.then(lambda done: done.value())  # raises; DDP would take the exception for a gradient

    def close(self) -> None:
        """Ends the thread once all tasks are done."""
        self._tasks.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (item := self._tasks.get()) is not None:
            task, future = item
            try:
                if self._broken is not None:  # the other ranks wait in another collective by now
                    raise RuntimeError(f"an earlier exchange failed: {self._broken}")
                future.set_result(task())
            except Exception as error:
                self._broken = self._broken or error
                future.set_exception(error)
