"""Files of three parties with shuffled, partly different rows, and the processes that they start."""

import os
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.csv
import yaml

from hf_mlopt.cli import main
from hf_mlopt.vertical import pki
from hf_mlopt.workflows.vertical_processes import fork_context
from tests.processes import free_port


NAMES = ("bank", "insurer", "shop")
ROWS = 240  # of the table; each party lacks ten of its own


def table():
    from sklearn.datasets import load_breast_cancer  # heavy, and none of the processes' business

    X, y = load_breast_cancer(return_X_y=True)
    return X[:ROWS], y[:ROWS]


def common_rows():
    return [row for row in range(ROWS) if row >= 30]


def write_data(folder):
    """A CSV a party, in an order of its own."""
    X, y = table()
    for number, (name, columns) in enumerate(zip(NAMES, np.array_split(np.arange(30), 3), strict=True)):
        rows = [row for row in range(ROWS) if row // 10 != number]
        rows = np.random.default_rng(number).permutation(rows)
        content = {"id": [f"customer {row}" for row in rows]}
        if number == 0:
            content["ill"] = y[rows]
        content |= {f"x{column}": X[rows, column] for column in columns}
        pa.csv.write_csv(pa.table(content), folder / f"{name}.csv")


def make(folder):
    """Certificates and data."""
    pki.create_authority(folder / "pki")
    for name in NAMES:
        pki.issue(folder / "pki", name)
    write_data(folder)


class Parties:
    """`hf-mlopt vertical` as one process a party."""

    def __init__(self, folder, output, names=NAMES, prefixes=None, hosts=None, **options):
        self.folder, self.output, self.names, self.prefixes = folder, output, names, prefixes or {}
        hosts = hosts or dict.fromkeys(names, "127.0.0.1")
        self.addresses = {name: f"{hosts[name]}:{free_port()}" for name in names}
        self.options = {
            "label_owner": "bank",
            "loss": "logistic",
            "batch_size": 70,
            "learning_rate": 0.4,
            "l2": 0.3,
            "timeout": 10.0,
            "connect_timeout": 60.0,
            "query_budget": None,
            "accept_gram_disclosure": True,
        } | options
        self.processes = {}

    def config(self, name, **options):
        given = self.options | {
            "party": name,
            "parties": self.addresses,
            "credentials": str(self.folder / "pki" / name),
            "data": str(self.folder / f"{name}.csv"),
            "output_dir": str(self.output / name),
        }
        given |= {"label_column": "ill"} if name == "bank" else {}
        path = self.output / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump({key: value for key, value in (given | options).items()}, sort_keys=False))
        return path

    def start(self, name, action="party", *words, **options):
        words = ["vertical", action, "-c", str(self.config(name, **options)), *map(str, words)]
        log = self.output / f"{name}.{action}.log"
        if name in self.prefixes:
            with open(log, "w") as file:
                command = [*self.prefixes[name], sys.executable, "-m", "hf_mlopt", *words]
                self.processes[name] = subprocess.Popen(command, stdout=file, stderr=file)
        else:
            context = fork_context()
            self.processes[name] = context.Process(target=command_line, args=(words, log))
            self.processes[name].start()
        return self.processes[name]

    def start_all(self, action="party", *words, **options):
        for name in self.names:
            self.start(name, action, *words, **options)

    def statuses(self, seconds=90):
        end = time.monotonic() + seconds
        return {name: status(one, max(0.1, end - time.monotonic())) for name, one in self.processes.items()}

    def words(self, name, action="party"):
        return (self.output / f"{name}.{action}.log").read_text()

    def close(self):
        for process in self.processes.values():
            process.kill()
            status(process, 30)


def status(process, seconds):
    """Exit status; negative for a signal."""
    if isinstance(process, subprocess.Popen):
        return process.wait(seconds)
    process.join(seconds)
    assert process.exitcode is not None, "the process goes on"
    return process.exitcode


def command_line(words, log):
    """`hf-mlopt` in a process that was just forked."""
    with open(log, "wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    sys.exit(main(words))
