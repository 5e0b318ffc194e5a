"""What `hf-mlopt vertical` is given: the file of a party, and the recipe of a simulation."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from hf_mlopt.configuration import to_dict
from hf_mlopt.vertical.align import DUPLICATES
from hf_mlopt.vertical.arguments import VerticalArguments
from hf_mlopt.vertical.credentials import check_party


EMBEDDED = ("breast_cancer", "diabetes", "wine")  # of scikit-learn; no file and no network


@dataclass
class PartyRecipe(VerticalArguments):
    """
    The file of one party. Fields of [`VerticalArguments`], `run_name`, the names in `parties` and `label_owner` must
    be the same at all parties, which is checked when they connect.

    Args:
        party (`str`, *optional*): Own name.
        parties (`dict`, *optional*): Name to `host:port` of every party, own one included, in one order everywhere.
        label_owner (`str`, *optional*): Party whose labels they are.
        label_recipients (`list[str]`, *optional*): Who else gets the labels with `labels=shared`; by default all.
        run_name (`str`, *optional*, defaults to `"run"`): Name of the training, the same at all parties.
        credentials (`str`, *optional*): Folder with `authority.pem`, `certificate.pem` and `private.key`.
        plaintext (`bool`, *optional*, defaults to `False`): Without TLS, on this machine only.
        listen (`str`, *optional*): `host:port` to listen on, where it is not the own address.
        data (`str`, *optional*): Own columns: `.csv`, `.parquet`, or LIBSVM.
        id_column (`str`, *optional*, defaults to `"id"`): Holds the ids. LIBSVM rows have their numbers.
        label_column (`str`, *optional*): At the label owner. In LIBSVM the labels come first in their line.
        columns (`list[str]`, *optional*): Features; by default all other columns.
        categorical (`list[str]`, *optional*): Columns of numbers that are categories.
        scale (`str`, *optional*, defaults to `"standard"`): `standard` (mean 0, deviation 1 of own rows) or `none`.
        constant (`str`, *optional*, defaults to `"raise"`): `raise`, `drop` or `keep` columns with one value.
        unknown (`str`, *optional*, defaults to `"raise"`): `raise` or `ignore` categories that training rows lack.
        sparse (`bool`, *optional*, defaults to `False`): Keep a table's features as CSR.
        num_features (`int`, *optional*): Columns of a LIBSVM file.
        alignment (`str`, *optional*, defaults to `"ecdh"`): `ecdh` (private set intersection); `hmac`, faster, with
            which the label owner can try ids; `as-is` where all parties have the same rows in one order.
        duplicates (`str`, *optional*, defaults to `"raise"`): Ids that occur twice: `raise`, `first` or `drop`.
        accept_dictionary_attack (`bool`, *optional*, defaults to `False`): What `alignment=hmac` needs.
        eval_share (`float`, *optional*, defaults to 0.0): Part of the common rows that is kept to evaluate on.
        output_dir (`str`, *optional*): For alignment, checkpoints, audit log, results and the own block.
        save_steps (`int`, *optional*): Own steps between two checkpoints. Parties that train without labels write
            theirs when the label owner does.
        resume (`bool`, *optional*, defaults to `False`): Go on from the newest checkpoint in `output_dir`; in sync
            mode, or where parties train without labels, from the newest that all have.
        connect_timeout (`float`, *optional*, defaults to 600.0): Seconds to wait for the others at the start.
        step_seconds (`float`, *optional*, defaults to 0.0): Sleep in each step, in a simulation of slow parties.
        trace_steps (`int`, *optional*): Own steps between two copies of the weights in `trace.npz`, to draw the course
            of a simulation.
    """

    party: str = ""
    parties: dict[str, str] = field(default_factory=dict)
    label_owner: str = ""
    label_recipients: list[str] | None = None
    run_name: str = "run"
    credentials: str | None = None
    plaintext: bool = False
    listen: str | None = None
    data: str = ""
    id_column: str = "id"
    label_column: str | None = None
    columns: list[str] | None = None
    categorical: list[str] = field(default_factory=list)
    scale: Literal["standard", "none"] = "standard"
    constant: Literal["raise", "drop", "keep"] = "raise"
    unknown: Literal["raise", "ignore"] = "raise"
    sparse: bool = False
    num_features: int | None = None
    alignment: Literal["ecdh", "hmac", "as-is"] = "ecdh"
    duplicates: Literal["raise", "first", "drop"] = "raise"
    accept_dictionary_attack: bool = False
    eval_share: float = 0.0
    output_dir: str = ""
    save_steps: int | None = None
    resume: bool = False
    connect_timeout: float = 600.0
    step_seconds: float = 0.0
    trace_steps: int | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("party", "parties", "label_owner", "run_name", "data", "output_dir"):
            self._require(name, bool(getattr(self, name)), "is needed; set it in the file of the party")
        for name in self.parties:
            check_party(name)
        for name in ("party", "label_owner"):
            self._require(name, getattr(self, name) in self.parties, f"must be among the parties {list(self.parties)}")
        for name in self.label_recipients or ():
            is_known = name in self.parties
            self._require("label_recipients", is_known, f"must be among the parties {list(self.parties)}")
        self._require("duplicates", self.duplicates in DUPLICATES, f"must be one of {DUPLICATES}")
        is_allowed = self.alignment != "hmac" or self.accept_dictionary_attack
        text = "lets the label owner try ids on what it is sent; take ecdh, or set accept_dictionary_attack=true"
        self._require("alignment", is_allowed, text)
        self._require("eval_share", 0 <= self.eval_share < 1, "must be at least 0 and below 1")
        for name in ("save_steps", "trace_steps"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "must be at least 1")
        self._require("connect_timeout", 0 < self.connect_timeout < float("inf"), "must be above 0 seconds")
        self._require("step_seconds", 0 <= self.step_seconds < float("inf"), "must be at least 0")
        text = "is of no use with backward=dp: after a restart noise would be drawn anew, and dp_epsilon exceeded; "
        for name in ("save_steps", "resume"):
            self._require(name, not getattr(self, name) or self.backward != "dp", text + "leave it out")
        given = self.plaintext != (self.credentials is not None)
        self._require("credentials", given, "name their folder, or set plaintext=true on one machine, and not both")
        is_owner, is_table = self.party == self.label_owner, self.is_table
        is_needed = is_owner and is_table
        text = "is needed at the label owner; name the column of its table that holds the labels"
        self._require("label_column", self.label_column is not None or not is_needed, text)
        text = "names the labels of a table at the label owner alone; leave it out, and drop the column from the table"
        self._require("label_column", self.label_column is None or is_needed, text)
        self.check_masks(len(self.parties))

    @property
    def is_table(self) -> bool:
        """Whether the own data are a table, and not LIBSVM."""
        return Path(self.data).suffix in (".csv", ".parquet")

    @property
    def arguments(self) -> VerticalArguments:
        """What all parties have alike."""
        return VerticalArguments(**{name: getattr(self, name) for name in to_dict(VerticalArguments())})


@dataclass
class SimulationRecipe(VerticalArguments):
    """
    Parties as processes of this machine, sync against async.

    Args:
        data (`list[str]`, *optional*, defaults to `["breast_cancer"]`): One of scikit-learn's `breast_cancer`,
            `diabetes` and `wine`; or files of parties, of which the first holds the labels.
        id_column (`str`, *optional*, defaults to `"id"`): Ids of the files that are tables; LIBSVM rows are in order.
        label_column (`str`, *optional*): Of the first file, if that is a table.
        num_features (`list[int]`, *optional*): Columns of each LIBSVM file.
        parties (`int`, *optional*, defaults to 4): How many. As many as there are files: each has its file. Otherwise
            all columns are dealt out anew, in their order.
        straggler (`str`, *optional*): Slow parties, such as `1:3`: party 1 (of 0, 1, …; 0 has the labels) takes three
            times as long for a step. Several are separated by commas.
        step_seconds (`float`, *optional*, defaults to 0.05): A step is a sleep of this long beside the true work: the
            processes share the cores of one machine, and would measure each other otherwise.
        eval_share (`float`, *optional*, defaults to 0.2): Part of the rows that is kept to evaluate on.
        gap (`float`, *optional*, defaults to 1e-3): How near the objective must come to the optimum of all columns.
        modes (`list[str]`, *optional*, defaults to `["sync", "async"]`): What is compared; `mode` is set from it.
        plaintext (`bool`, *optional*, defaults to `False`): Without TLS.
        trace_steps (`int`, *optional*, defaults to 2): Steps between two copies of a party's weights.
        output_dir (`str`, *optional*): For results, picture, and the parties' files.
        plot (`bool`, *optional*, defaults to `True`): Whether to draw `course.png`.
    """

    data: list[str] = field(default_factory=lambda: ["breast_cancer"])
    id_column: str = "id"
    label_column: str | None = None
    num_features: list[int] | None = None
    parties: int = 4
    straggler: str | None = None
    step_seconds: float = 0.05
    eval_share: float = 0.2
    gap: float = 1e-3
    modes: list[str] = field(default_factory=lambda: ["sync", "async"])
    plaintext: bool = False
    trace_steps: int = 2
    output_dir: str = ""
    plot: bool = True

    def __post_init__(self):
        super().__post_init__()
        self._require("output_dir", bool(self.output_dir), "name a directory")
        self._require("parties", 1 <= self.parties <= 64, "must be 1 to 64")
        self._require("step_seconds", 0 <= self.step_seconds < float("inf"), "must be at least 0")
        self._require("eval_share", 0 <= self.eval_share < 1, "must be at least 0 and below 1")
        self._require("gap", self.gap > 0, "must be above 0")
        self._require("trace_steps", self.trace_steps >= 1, "must be at least 1")
        self._require("modes", bool(self.modes) and set(self.modes) <= {"sync", "async"}, "must be of sync and async")
        self._require("data", bool(self.data), "name a data set or files")
        is_embedded = [name in EMBEDDED for name in self.data]
        self._require("data", not any(is_embedded) or len(self.data) == 1, "one embedded data set, or files")
        if self.num_features is not None:
            is_whole = len(self.num_features) == len(self.data)
            self._require("num_features", is_whole, f"must be one number a file, {len(self.data)}")
        self.factors()
        self.check_masks(self.parties)

    @property
    def names(self) -> list[str]:
        """The parties, the label owner first."""
        return [f"p{number:02d}" for number in range(self.parties)]

    def factors(self) -> list[float]:
        """How much longer each party's step takes."""
        found = [1.0] * self.parties
        for part in self.straggler.split(",") if self.straggler else ():
            match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+(?:\.\d+)?)\s*", part)
            is_good = match is not None and int(match[1]) < self.parties and float(match[2]) > 0
            text = f"must be PARTY:FACTOR, such as 1:3, of parties 0 to {self.parties - 1}"
            self._require("straggler", is_good, text)
            found[int(match[1])] = float(match[2])
        return found

    def arguments(self, mode: str) -> dict:
        """Fields of [`VerticalArguments`] for one mode; what only async has is left out in sync."""
        given = {name: getattr(self, name) for name in (f.name for f in fields(VerticalArguments))}
        given["mode"] = mode
        if mode == "sync":
            given |= {"inflight": 1, "push_ahead": 0, "max_staleness": None, "finish": "all", "on_dropout": "abort"}
        else:
            given |= {"share_aggregates": False}
        return given
