"""A fixture that shuts the network off."""

import socket

import pytest


@pytest.fixture
def no_network(monkeypatch):
    """Every connection but one inside this machine's kernel is refused."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"the network was touched: {args}")

    connect = socket.socket.connect

    def local_only(self, address):
        return connect(self, address) if self.family == socket.AF_UNIX else refuse(address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
    monkeypatch.setattr(socket.socket, "connect_ex", local_only)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
