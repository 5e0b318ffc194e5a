"""
A process that stands at a site and answers its messages, so that what carries them need neither import torch nor load
a model each time. It hears on a socket of this machine's file system; who may open that may ask it.
"""

import argparse
import gc
import json
import os
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import numpy as np

from hf_mlopt.errors import InputError
from hf_mlopt.federated.engines.application import Blobs, Values, load_application


def ask(
    address: str, run_config: Values, node_config: Values, header: str | None = None, blobs: Blobs | None = None
) -> tuple[str, str | None, Blobs]:
    """
    Asks the resident of a site: for its name, or with a message for the answer.

    Args:
        address (`str`): Path of its socket.
        run_config (`dict`), node_config (`dict`): For the application's factory.
        header (`str`, *optional*), blobs (`dict[str, numpy.ndarray]`, *optional*): A message, see [`site.pack`].

    Returns:
        `tuple[str, str | None, dict[str, numpy.ndarray]]`: The site's name, and the answer packed.

    Raises:
        InputError: If none listens there, or the application refuses.
    """
    try:
        with Client(address, family="AF_UNIX") as connection:
            _send(connection, {"run_config": run_config, "node_config": node_config, "header": header}, blobs or {})
            said, answer = _receive(connection)
    except (OSError, EOFError) as error:
        raise InputError(
            f"resident={address!r}: no answer ({error!r}); start "
            f"`python -m hf_mlopt.federated.engines.resident {address}` at this site, or leave `resident` out"
        ) from error
    if "error" in said:
        raise InputError(said["error"])
    return said["site"], said["header"], answer


def listen(address: str, application: Callable[[Values], Any]) -> None:
    """
    Answers one request after the other, for ever. What it has loaded it keeps as long as requests are of one run.

    Args:
        address (`str`): Path of the socket, at most 107 bytes; a left-over one is replaced.
        application (`Callable[[dict], Application]`): Run configuration to application.
    """
    key, site = None, None
    with _listener(address) as listener:
        from hf_mlopt.federated.engines.site import Site  # with torch: whoever asks meanwhile waits

        while True:
            try:
                with listener.accept() as connection:
                    request, blobs = _receive(connection)
                    configs = request["run_config"], request["node_config"]
                    header, answer = None, {}
                    try:
                        if key != (key := json.dumps(configs, sort_keys=True)):
                            site = None  # before the next one, for both may not fit
                            gc.unfreeze()
                            site = Site(application(configs[0]), *configs)
                            gc.freeze()  # see `spared_modules` of the trainer
                        if request["header"] is not None:
                            header, answer = site.answered(request["header"], blobs)
                        said = {"site": site.name, "header": header}
                    except InputError as error:
                        key, said = None, {"error": str(error)}
                    except Exception as error:  # it concerns this request only
                        key, said = None, {"error": f"{type(error).__name__}: {error}"}
                    _send(connection, said, answer)
            except Exception:  # whoever asked has gone, or it was no request
                continue


def _listener(address: str) -> Listener:
    Path(address).unlink(missing_ok=True)
    umask = os.umask(0o177)  # for this user alone
    try:
        return Listener(address, family="AF_UNIX", backlog=16)
    except OSError as error:
        raise InputError(f"socket={address!r}: {error}; take a path in a folder of yours, short enough") from error
    finally:
        os.umask(umask)


def _send(connection: Connection, said: dict, blobs: Blobs) -> None:
    connection.send_bytes(json.dumps({**said, "groups": list(blobs)}).encode())
    for blob in blobs.values():
        connection.send_bytes(memoryview(np.ascontiguousarray(blob)))


def _receive(connection: Connection) -> tuple[dict, Blobs]:
    said = json.loads(connection.recv_bytes())
    return said, {group: np.frombuffer(connection.recv_bytes(), dtype=np.uint8) for group in said.pop("groups")}


def main() -> None:
    """Command line of the module."""
    parser = argparse.ArgumentParser(description="Answers the messages of a federation at this site.")
    parser.add_argument("socket", help="path of the socket, as in the SuperNode's --node-config resident=...")
    listen(parser.parse_args().socket, load_application)


if __name__ == "__main__":
    main()
