"""Makes the virtual environment that kvpress runs in: build/peers-venv.

python -m bench.peers.environment
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

from kvprune.errors import KVPruneError

ROOT = Path(__file__).parents[2]
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
PLACE = ROOT / "build" / "peers-venv"


def peers_python(place: Path = PLACE, requirements: Path = REQUIREMENTS) -> Path:
    """The Python of the environment with `requirements`; makes the environment if it is missing.

    The file `.ready` in it holds the requirements that the environment was made for, and is there
    only once the environment is whole: an environment that was interrupted, or that is for other
    requirements, is made anew.

    Raises:
        KVPruneError: pip cannot reach the registry, cannot find these versions, or fails.
    """
    python, stamp = place / "bin" / "python", place / ".ready"
    wanted = requirements.read_text()
    if not (stamp.exists() and stamp.read_text() == wanted):
        print(f"making {place}: a minute or more", flush=True)
        try:
            venv.create(place, clear=True, with_pip=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise KVPruneError(f"peers: expected to make {place}, and could not: {error}") from None
        _install(python, requirements)
        stamp.write_text(wanted)
    return python


def _install(python: Path, requirements: Path) -> None:
    # One retry: pip's five, each with its time-out, would keep a machine without a network for
    # minutes. All packages in one call: in a second call an open range would pull another torch.
    options = ["-q", "--disable-pip-version-check", "--retries", "1", "--timeout", "60"]
    pip = [str(python), "-m", "pip", "install", *options, "-r", str(requirements)]
    done = subprocess.run(pip, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        why = said[-1].removeprefix("ERROR: ") if said else f"exit code {done.returncode}"
        raise KVPruneError(
            f"peers: expected pip to install {requirements.name}, and it could not: {why}. Nothing "
            f"else of kvprune needs it; try again where the registry can be reached"
        )


if __name__ == "__main__":
    try:
        print(peers_python())
    except KVPruneError as failure:
        sys.exit(str(failure))
