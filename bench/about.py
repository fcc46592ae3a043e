"""The facts that every result carries: its command, its versions and its machine."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from kvprune.evaluation.command import command_line, without_places
from kvprune.files import write_text


def about(model: Any) -> dict[str, Any]:
    """The command that gave a result, and the versions and the machine that it ran with."""
    said = {
        "command": command(),
        "kvprune": version("kvprune"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "processor": processor(),
        "dtype": str(model.dtype),
    }
    on_gpu = model.device.type == "cuda"
    return said | ({"device": torch.cuda.get_device_name(model.device)} if on_gpu else {})


def command() -> str:
    """The command that is run, such as `python -m bench.saved --out saved.json`."""
    # Only a module that is run with `python -m` has a spec.
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = Path(sys.argv[0]).name if spec is None else spec.name.removesuffix(".__main__")
    program = [name] if spec is None else ["python", "-m", name]
    return command_line([*program, *sys.argv[1:]])


def processor() -> str:
    """The processor's name, as the system says it; empty where the system does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write(out: Path, args: argparse.Namespace, model: Any, rows: Any) -> None:
    """Writes rows as JSON, with the command, the versions and the machine that gave them."""
    out.parent.mkdir(parents=True, exist_ok=True)
    given = {name: without_places(str(value)) for name, value in vars(args).items()}
    said = about(model) | {"arguments": given}
    write_text(out, json.dumps({"about": said, "rows": rows}, indent=1) + "\n")
