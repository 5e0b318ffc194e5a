"""A switch with a rank at each port, of network namespaces; every link has a bandwidth both ways."""

import os
import socket
import subprocess


class NoNamespaces(Exception):
    """They cannot be made here: no root, no `ip` or `tc`, or a kernel that refuses."""


class Network:
    """
    Takes itself down when it is left.

    Args:
        world (`int`): Number of ranks.
    """

    def __init__(self, world: int):
        self.world, name = world, f"mlopt{os.getpid()}"
        self.switch, self.ranks = f"{name}s", [f"{name}r{rank}" for rank in range(world)]

    def __enter__(self) -> "Network":
        try:
            for namespace in (self.switch, *self.ranks):
                _call("ip", "netns", "add", namespace)
            _call("ip", "-n", self.switch, "link", "add", "br0", "type", "bridge")
            _call("ip", "-n", self.switch, "link", "set", "br0", "up")
            for number, rank in enumerate(self.ranks):
                port = f"p{number}"
                ends = ("eth0", "netns", rank, "type", "veth", "peer", "name", port, "netns", self.switch)
                _call("ip", "link", "add", *ends)
                _call("ip", "-n", self.switch, "link", "set", port, "master", "br0", "up")
                _call("ip", "-n", rank, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
                for device in ("eth0", "lo"):
                    _call("ip", "-n", rank, "link", "set", device, "up")
            self.limit(1e9)
        except NoNamespaces:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for namespace in (self.switch, *self.ranks):
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)

    def limit(self, bandwidth: float) -> None:
        """
        Args:
            bandwidth (`float`): Bits per second of every link, each way.
        """
        burst = max(128_000, int(bandwidth / 8 * 0.002))  # bytes; the kernel cannot wait for much less than that takes
        how = ("root", "tbf", "rate", f"{int(bandwidth)}bit", "burst", f"{burst}", "latency", "200ms")
        for number, rank in enumerate(self.ranks):
            _call("tc", "-n", rank, "qdisc", "replace", "dev", "eth0", *how)
            _call("tc", "-n", self.switch, "qdisc", "replace", "dev", f"p{number}", *how)

    def environment(self) -> dict[str, str]:
        """What ranks need to find one another."""
        return {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "eth0"}

    def prefix(self, rank: int) -> list[str]:
        """What runs a command at a port."""
        return ["ip", "netns", "exec", self.ranks[rank]]


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def _call(*words: str) -> None:
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise NoNamespaces(f"{words[0]} is not installed") from error
    if done.returncode:
        raise NoNamespaces(f"{' '.join(words)}: {done.stderr.strip()}")
