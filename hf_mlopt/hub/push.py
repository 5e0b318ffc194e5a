"""What of a directory goes to the Hub, and sending it so that the same command goes on where a push ended."""

import fnmatch
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_mlopt.errors import ConfigurationError, InputError


if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

# Not sent: metadata of tools, states of a Trainer, and pickles, which nobody should have to load. A second copy of the
# weights in a pickle may not even be pruned.
LEFT_OUT = (
    *(".git", ".gitignore", ".cache", "__pycache__", ".ipynb_checkpoints", ".DS_Store", "checkpoint-*", "*tfevents*"),
    *("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.pyc"),
)
# Whoever wrote these did not finish.
_UNFINISHED = ("*.incomplete", "*.incomplete-*", "*.unfinished", "*.tmp", "*.part", "*.lock")
_WEIGHTS = (
    "model*.safetensors",
    "model*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
)
_LARGE = (".safetensors", ".model", ".gz", ".zip", ".npz", ".npy", ".parquet", ".h5", ".gguf", ".onnx")
_LARGE_BYTES = 10_000_000
_ATTEMPTS = 5
_WAIT = 1.0  # seconds before the second attempt; doubles


@dataclass(frozen=True)
class PlannedFile:
    """
    One file that goes.

    Args:
        path (`str`): Its path in the repository.
        source (`Path`): Where it lies here.
        content (`bytes`, *optional*): What goes in its place, where that must not go as it is.
    """

    path: str
    source: Path
    content: bytes | None = None

    @property
    def size(self) -> int:
        return self.source.stat().st_size if self.content is None else len(self.content)

    @property
    def is_large(self) -> bool:
        """Whether the Hub will keep it as a large file. It decides itself; this is what it does by default."""
        if self.source.suffix in _LARGE or self.size > _LARGE_BYTES:
            return True
        with open(self.source, "rb") as stream:
            return b"\0" in stream.read(512)


def plan_files(directory: Path, weights: list[Path]) -> tuple[list[PlannedFile], list[str]]:
    """
    The files of a checkpoint that go to the Hub.

    Args:
        directory (`Path`): The checkpoint.
        weights (`list[Path]`): Its weight files.

    Returns:
        `tuple[list[PlannedFile], list[str]]`: What goes, and what is left out.

    Raises:
        InputError: If something there was not finished, or weights are no part of the checkpoint.
    """
    files, left_out, seen = [], set(), {file.name for file in weights}
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory)
        for part in relative.parts:
            if any(fnmatch.fnmatch(part, pattern) for pattern in _UNFINISHED):
                raise InputError(f"{path}: is the rest of a run that did not finish; finish it, or remove the file")
        hidden = next((n for n, part in enumerate(relative.parts) if _is_left_out(part)), None)
        if hidden is not None:
            left_out.add("/".join(relative.parts[: hidden + 1]))
        elif path.is_file():
            if len(relative.parts) == 1 and path.suffix == ".safetensors" and path.name not in seen:
                raise InputError(f"{path}: is no part of the checkpoint, its index does not name it; remove it")
            files.append(PlannedFile(relative.as_posix(), path))
    return files, sorted(left_out)


def _is_left_out(part: str) -> bool:
    return any(fnmatch.fnmatch(part, pattern) for pattern in LEFT_OUT)


def check_repository(repo: str, revision: str | None) -> None:
    """
    Refuses names that no repository and no branch can have.

    Raises:
        ConfigurationError: Names the field.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise ConfigurationError("repo", repo, "must have the form user/name") from None
    if "/" not in repo:
        raise ConfigurationError("repo", repo, f"must have the form user/name, such as your-name/{repo}")
    is_commit = revision is not None and len(revision) == 40 and set(revision) <= set("0123456789abcdef")
    if is_commit or revision == "":
        raise ConfigurationError("revision", revision, "must name a branch; a commit cannot be pushed to")


def require_token(api: "HfApi") -> None:
    """
    Makes sure that a push can begin, without a request.

    Raises:
        InputError: If the Hub is switched off, or there is no token in any of the usual places.
    """
    from huggingface_hub import get_token, is_offline_mode

    if is_offline_mode():
        raise InputError("HF_HUB_OFFLINE=1 keeps from the Hub: unset it to push, or look at what would go: --dry-run")
    if not (api.token or get_token()):
        raise InputError("no token for the Hub: log in with `hf auth login`, or set HF_TOKEN")


def upload(
    api: "HfApi", files: list[PlannedFile], repo: str, *, private: bool, revision: str | None, message: str
) -> tuple[str, list[str]]:
    """
    Sends files in one commit, so that the repository never holds half a model.

    Large files go first, each once: what has arrived is not sent again, by this call after a dropped connection or by
    the next one after an interruption. Nothing is kept on this machine for that. Weight files of an earlier push that
    this one does not have are removed in the same commit, for Transformers would prefer some of them.

    Args:
        api ([`~huggingface_hub.HfApi`]): The Hub.
        files (`list[PlannedFile]`): What goes.
        repo (`str`): `user/name`; created if it is absent.
        private (`bool`): Whether it must be private.
        revision (`str`, *optional*): Branch; created from `main` if it is absent.
        message (`str`): Of the commit.

    Returns:
        `tuple[str, list[str]]`: Where it can be looked at, and what was removed there.

    Raises:
        InputError: In place of whatever the Hub or the network objects.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    url = str(_persistently(lambda: api.create_repo(repo, private=private or None, exist_ok=True), repo))
    info = _persistently(lambda: api.repo_info(repo), repo)
    if private and info.private is False:
        raise InputError(
            f"repo={repo!r}: exists and is public, which --private does not change; change it in its settings on the "
            "Hub, or name another one"
        )
    if revision not in (None, "main") and not revision.startswith("refs/"):
        _persistently(lambda: api.create_branch(repo, branch=revision, exist_ok=True), repo)
    there = _persistently(lambda: api.list_repo_files(repo, revision=revision), repo)
    paths = {file.path for file in files}
    stale = [path for path in there if path not in paths and any(fnmatch.fnmatch(path, each) for each in _WEIGHTS)]

    def commit():
        # New ones for every attempt: they remember what the Hub had before, and the last attempt may have succeeded
        # with only its answer lost.
        changes = [
            CommitOperationAdd(file.path, str(file.source) if file.content is None else file.content) for file in files
        ]
        changes += [CommitOperationDelete(path) for path in stale]
        return api.create_commit(repo, changes, commit_message=message, revision=revision)

    _persistently(commit, repo)
    return (url if revision in (None, "main") else f"{url}/tree/{revision}"), stale


def _persistently(call: Callable[[], Any], repo: str):
    """Calls again after what passes by itself; `InputError` for the rest, and when it does not pass."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    wait = _WAIT
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return call()
        except (HTTPError, OSError, RuntimeError, ValueError) as error:
            found = _cause(error, HfHubHTTPError)
            if found is not None and found.response.status_code not in (408, 429) and found.response.status_code < 500:
                raise InputError(_refusal(found, repo)) from None
            dropped = found or _cause(error, HTTPError) or _cause(error, OSError)
            of_this_machine = isinstance(error, FileNotFoundError | PermissionError)
            if of_this_machine or (dropped is None and not isinstance(error, RuntimeError)):  # as hf_xet raises
                raise InputError(f"repo={repo!r}: {_first_line(error)}") from None
            if attempt == _ATTEMPTS:
                raise InputError(
                    f"repo={repo!r}: the connection failed {_ATTEMPTS} times ({_first_line(dropped or error)}); run "
                    "the same command again, what has arrived is not sent twice"
                ) from None
            logger.warning(f"{_first_line(dropped or error)}; attempt {attempt + 1} of {_ATTEMPTS} in {wait:g} s")
            time.sleep(wait)
            wait *= 2


def _cause(error: BaseException | None, kind: type) -> Any:
    """The first error of a kind in a chain of causes."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error


def _refusal(error, repo: str) -> str:
    status, said = error.response.status_code, error.server_message or _first_line(error)
    if status == 401:
        return "the Hub refuses the token; log in again with `hf auth login`, or set HF_TOKEN to one that is valid"
    if status == 403:
        return f"repo={repo!r}: the token may not write there ({said}); use one with write access, or another name"
    if status == 404:
        return f"repo={repo!r}: not found on the Hub, or the token may not see it ({said})"
    return f"repo={repo!r}: the Hub refuses ({status}: {said})"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
