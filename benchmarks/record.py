"""Keep the ratios of all benchmarks in one file, `docs/results/benchmarks.json`."""

import json
from pathlib import Path

__all__ = ["PATH", "record"]

PATH = Path(__file__).resolve().parent.parent / "docs" / "results" / "benchmarks.json"


def record(  # noqa: PLR0917 - six facts, in the order of the file
    name: str,
    ratio: float,
    goal: float,
    peer: str,
    peer_version: str,
    command: str,
    *,
    path: Path = PATH,
) -> None:
    """Write one benchmark's ratio, in place of an earlier one of the same name.

    Args:
        name: Name of the benchmark, e.g. "text-guided-alignment/throughput".
        ratio: Ours over the peer's; higher is better.
        goal: What the ratio must reach.
        peer: What ours is compared with.
        peer_version: Its version.
        command: The command that measures it again.
        path: The file; for tests.
    """
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    entry = {
        "name": name,
        "ratio": round(ratio, 4),
        "goal": goal,
        "peer": peer,
        "peer_version": peer_version,
        "command": command,
    }
    kept = [other for other in known if other["name"] != name] + [entry]
    kept.sort(key=lambda other: other["name"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
