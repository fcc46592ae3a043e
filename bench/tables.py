"""The table of `bench.sdtp` for people, made from its JSON."""

from __future__ import annotations

from typing import Any

HEADER = (
    "row",
    "SQuAD: NLL",
    "recovered (95 %)",
    "HotpotQA: NLL",
    "recovered (95 %)",
    "supporting / other kept",
    "needles 1k / 2k",
    "text: NLL",
)


def sdtp_table(report: dict[str, Any]) -> str:
    """The results of `python -m bench.sdtp` in Markdown; a dash for what was not measured."""
    tasks = report["tasks"]
    names = dict.fromkeys(name for task in tasks.values() for name in task["rows"])
    lines = [HEADER, ("---", *["---:"] * (len(HEADER) - 1))]
    lines += [
        _line(name, {task: t["rows"].get(name, {}) for task, t in tasks.items()}) for name in names
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _line(name: str, of: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    squad, hotpotqa = of.get("squad", {}), of.get("hotpotqa", {})
    needles = [of.get(f"needle-{n}", {}) for n in (1024, 2048)]
    kept = [hotpotqa.get(k) for k in ("supporting_kept", "others_kept")]
    return (
        name,
        _mean(squad),
        _share(squad),
        _mean(hotpotqa),
        _share(hotpotqa),
        " / ".join(_number(k) for k in kept),
        " / ".join(_number(n.get("mean")) for n in needles),
        _number(of.get("text", {}).get("mean")),
    )


def _mean(row: dict[str, Any]) -> str:
    """The mean of a row; a dash for a row of fewer questions, whose mean is not comparable."""
    return "-" if row.get("few") else _number(row.get("mean"))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _share(row: dict[str, Any]) -> str:
    if "recovered" not in row:
        return "-"
    low, high = row["recovered_95"]
    few = f", {row['items']} questions" if row.get("few") else ""
    return f"{row['recovered']:.2f} ({low:.2f} to {high:.2f}{few})"
