"""Several processes that speak gloo with one another: forks of this one, so that nothing is imported twice."""

import json
import os
import signal
import socket
import traceback

import torch.distributed as dist


SECONDS = 120  # a test that hangs


def environment(rank, port, world=2):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return dict(zip(names, map(str, (rank, rank, world, world, "127.0.0.1", port)), strict=True))


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def together(function, world=2, group=True):
    """Calls `function(rank)` in several processes; what each returned, None for one that was killed."""
    port, children = free_port(), []
    for rank in range(world):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest's handler would wait for what hangs
            signal.alarm(SECONDS)
            try:
                os.environ.update(environment(rank, port, world))
                if group:
                    dist.init_process_group("gloo")
                answer = function(rank)
            except BaseException:
                answer = traceback.format_exc()
            os.write(writing, json.dumps(answer).encode())
            os._exit(0)
        os.close(writing)
        children.append((child, reading))
    answers = []
    for child, reading in children:
        with open(reading, "rb") as pipe:
            text = pipe.read()
        _, status = os.waitpid(child, 0)
        assert not os.WIFSIGNALED(status) or os.WTERMSIG(status) == signal.SIGKILL, "a process hangs"
        answers.append(json.loads(text) if text else None)
    return answers


def in_processes(function, world=2):
    """As [`together`], where each process must return: a failure in one of them fails here, with its traceback."""

    def run(rank):
        answer = [dist.get_world_size(), function(rank)]
        dist.barrier()  # the first holds the store through which the others may still find one another
        return answer

    answers = together(run, world)
    for answer in answers:
        assert isinstance(answer, list), answer
        assert answer[0] == world
    return [answer[1] for answer in answers]
