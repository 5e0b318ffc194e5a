"""What a plan asks this machine."""

import psutil
import pytest

from hf_mlopt.planning import machine


def test_memory_within_the_limit_of_a_container(monkeypatch):
    free = psutil.virtual_memory().available
    monkeypatch.setattr(machine, "_container_limit", lambda: None)
    assert machine.available_memory() == pytest.approx(free, rel=0.5)
    used = psutil.Process().memory_info().rss
    monkeypatch.setattr(machine, "_container_limit", lambda: used + (64 << 20))
    assert machine.available_memory() < 128 << 20
    monkeypatch.setattr(machine, "_container_limit", lambda: 1)
    assert machine.available_memory() == 0


@pytest.mark.parametrize("text, limit", [("max\n", None), ("4096\n", 4096), (f"{1 << 62}\n", None)])
def test_the_limit_of_a_container(text, limit, monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text(text)
    monkeypatch.setattr(machine, "_LIMITS", (str(tmp_path / "none"), str(tmp_path / "memory.max")))
    assert machine._container_limit() == limit


def test_free_disk_of_a_directory_that_is_not_there_yet(tmp_path):
    assert machine.free_disk(tmp_path / "a" / "b") == pytest.approx(machine.free_disk(tmp_path), rel=0.1)


def test_free_memory_of_the_gpu_that_a_run_would_use(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.gpu_memory("auto") is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 1000\necho 2000\n")
    tool.chmod(0o755)
    assert machine.gpu_memory("cpu") is None
    assert [machine.gpu_memory(device) for device in ("auto", "cuda", "cuda:1")] == [
        1000 << 20,
        1000 << 20,
        2000 << 20,
    ]
    assert machine.gpu_memory("cuda:2") is None
