"""`python -m kvprune.evaluation.harness ...`: lm-eval's own command, with the model `kvprune`.

lm-eval (0.4.13) has no entry points for models of other packages: its registry holds its own models
and those that were imported. So this module imports the model `kvprune`, and then does what
`lm_eval` does.
"""

from __future__ import annotations

import sys

from ...errors import KVPruneError


def main() -> None:
    """Runs lm-eval's command line; prints an expected error as one line, without a traceback."""
    try:
        _run()
    except KVPruneError as error:
        print(f"kvprune: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _run() -> None:
    try:
        from lm_eval.__main__ import cli_evaluate

        from . import lm_eval  # noqa: F401
    except ImportError as error:
        raise KVPruneError(
            f"harness: expected lm-evaluation-harness, got {error}: pip install kvprune[lm-eval]"
        ) from error
    cli_evaluate()


if __name__ == "__main__":
    main()
