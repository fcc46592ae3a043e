"""What every result says of where it comes from."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers


def write(out: Path, args: argparse.Namespace, model: Any, rows: Any) -> None:
    """Writes rows as JSON, with the command, the versions and the machine that gave them."""
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "command": " ".join(sys.argv),
        "arguments": {k: str(v) for k, v in vars(args).items()},
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "dtype": str(model.dtype),
    }
    out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
