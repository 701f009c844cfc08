"""What this machine has to give: memory and cores, inside a container too."""

from __future__ import annotations

import os
from pathlib import Path

from millicent.engine.config import EngineConfig

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_GIB = 1 << 30
_LEAST_CONTEXT_TOKENS = 2048  # a model that has no room for this is refused rather than loaded


def memory_budget_bytes(config: EngineConfig) -> int:
    """For all models together, weights and KV cache: what is configured, else the machine's or container's memory
    less an eighth, at least 1 GiB, for the system, the gateway and temporary tensors."""
    if config.memory_gb is not None:
        return int(config.memory_gb * 1e9)
    import psutil

    limits: list[int] = [psutil.virtual_memory().total]
    for group in _own_cgroups():
        for name in ("memory.max", "memory.limit_in_bytes"):  # cgroup v2, v1
            limits += _numbers(group / name)[:1]
    memory = min(limits)
    return max(memory - max(memory // 8, _GIB), memory // 4)


def kv_blocks(config: EngineConfig, context_tokens: int, kv_bytes_per_token: int, left_bytes: int) -> tuple[int, int]:
    """How many KV blocks a model gets of so much memory, and the fewest it can work with.

    It gets `max_sequences` whole contexts, or as many blocks as fit half of what is left, so that other models
    find room too; but one whole context if that fits at all, and never more than fits.
    """
    per_context = -(-context_tokens // config.block_tokens)
    wanted = config.max_sequences * per_context
    least = min(per_context, -(-_LEAST_CONTEXT_TOKENS // config.block_tokens))
    block_bytes = config.block_tokens * kv_bytes_per_token
    if block_bytes == 0:
        return wanted, least
    fitting = max(0, left_bytes) // block_bytes
    return min(wanted, fitting, max(fitting // 2, per_context)), least


def usable_cores(config: EngineConfig) -> int:
    """Threads to compute with: what is configured, else the cores this process may run on, within its CPU quota."""
    if config.threads:
        return config.threads
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _own_cgroups():
        quota = _numbers(group / "cpu.max")  # "quota period", or "max period" where there is none
        if len(quota) == 2:
            cores = min(cores, max(1, quota[0] // quota[1]))
    return cores


def _own_cgroups() -> list[Path]:
    """The control groups around our process, its own included. Empty outside Linux."""
    try:
        lines = _OWN_CGROUPS.read_text("utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    groups = {_CGROUPS, _CGROUPS / "memory"}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root = _CGROUPS / "memory" if "memory" in controllers.split(",") else _CGROUPS
        own = root / path.lstrip("/")
        groups.update((own, *(parent for parent in own.parents if root in parent.parents)))
    return sorted(groups)


def _numbers(file: Path) -> list[int]:
    try:
        return [int(word) for word in file.read_text("ascii").split() if word.isdigit()]
    except OSError:
        return []
