"""The jobs of single processes, and the keys of their results, by which a stopped run goes on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .rows import NO_BUDGET


@dataclass(frozen=True)
class Job:
    """One process's work on one side.

    Attributes:
        side: the library.
        task: "speed" or "field" (one turn of all rows), "memory" (one row's peak) or "quality"
            (questions).
        rows: the rows to measure.
        threads: the threads of the process.
        length: tokens of the prompt, for all but quality.
        budget: tokens that a row keeps of them, likewise.
        turn: the number of the turn, for speed and field.
        asked: where the question is, for quality; see `answer_loss`.
        shares: the shares that each layer keeps, for quality.
        numbers: the numbers of the questions, for quality.
    """

    side: str
    task: str
    rows: tuple[str, ...]
    threads: int
    length: int = 0
    budget: int = 0
    turn: int = 0
    asked: str = ""
    shares: tuple[float, ...] = ()
    numbers: tuple[int, ...] = ()

    @property
    def timed(self) -> bool:
        """Whether it is a turn of all rows."""
        return self.task in ("speed", "field")

    @classmethod
    def of(cls, text: str) -> Job:
        """The job that `Job.text` wrote as `text`."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in json.loads(text).items()
        }
        return cls(**fields)

    def text(self) -> str:
        """The job as JSON."""
        return json.dumps(asdict(self))

    def keys(self, prompts: dict[str, Any]) -> list[dict[str, Any]]:
        """The keys of the job's results, in the order of measuring."""
        said: dict[str, Any] = {"side": self.side, "task": self.task}
        if self.task == "quality":
            return [said | key for n in self.numbers for key in self._asked(n, prompts)]
        said |= {"length": self.length, "budget": self.budget, "threads": self.threads}
        said |= {"digest": digest(prompts["text"][: self.length])}
        said |= {"turn": self.turn} if self.timed else {}
        return [said | {"row": row} for row in self.rows]

    def _asked(self, number: int, prompts: dict[str, Any]) -> list[dict[str, Any]]:
        said = {"asked": self.asked, "number": number}
        said["digest"] = digest(prompts["questions"][number])
        given: tuple[float | None, ...] = (None, *self.shares)
        return [
            {**said, "row": row, "share": share}
            for share in given
            for row in self.rows
            # A row without a budget is measured once, with no share.
            if (share is None) == (row in NO_BUDGET)
        ]


def digest(given: Any) -> str:
    """The digest of what is read, as part of a key: other tokens give another result."""
    return hashlib.sha256(json.dumps(given).encode()).hexdigest()[:16]


def name(key: dict[str, Any]) -> str:
    """A key as text."""
    return json.dumps(key, sort_keys=True)


def append(path: Path, results: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Appends results with their keys in one write.

    So a turn is there with all of its rows, or not at all.
    """
    lines = [json.dumps({"key": key, "found": found}) + "\n" for key, found in results]
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(lines))


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The last result of each key; a last line that a kill cut off is removed from the file."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        path.write_text("".join(lines[:-1]), encoding="utf-8")
    results = [json.loads(line) for line in lines if line.endswith("\n")]
    return {name(result["key"]): result["found"] for result in results}
