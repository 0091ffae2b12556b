"""The memory of a device is what this process may use of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lp_plugin.measure.device import container_limits, detect_device

GB = 10**9


@pytest.mark.parametrize(
    ("groups", "files", "limits"),
    [
        ("0::/\n", {"memory.max": "8000000000\n"}, [8 * GB]),  # version 2, in a container
        ("0::/\n", {"memory.max": "max\n"}, []),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "5000000000\n"}, [5 * GB]),  # of the group around it
        ("3:cpu,memory:/docker/x\n0::/\n", {"memory/memory.limit_in_bytes": "7000000000\n"}, [7 * GB]),
        ("3:memory:/x\n2:cpu:/\n", {"memory/x/memory.limit_in_bytes": f"{GB}\n", "memory.max": "5\n"}, [GB]),
        ("", {}, []),
    ],
)
def test_control_groups_of_both_versions(groups: str, files: dict[str, str], limits: list[int], tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert container_limits(tmp_path) == limits


def test_a_system_without_control_groups(tmp_path: Path) -> None:
    assert container_limits(tmp_path) == []


def test_processes_share_what_this_host_may_use() -> None:
    whole, third = (detect_device(0, count).memory.capacity_bytes for count in (1, 3))
    assert third == whole // 3
    assert all(whole <= limit for limit in container_limits())
