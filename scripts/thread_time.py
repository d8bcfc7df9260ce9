"""Processor time of another process's threads, as Linux counts it: in nanoseconds."""

from pathlib import Path


def thread_seconds(pid: int) -> dict[int, float]:
    """Seconds of each thread of a process by its id; the first thread's is the process's."""
    return {
        int(task.name): int((task / "schedstat").read_text(encoding="ascii").split()[0]) / 1e9
        for task in Path(f"/proc/{pid}/task").iterdir()
    }
