"""`python -m kvprune.evaluation.harness ...`: lm-eval's own command, with the model `kvprune`.

lm-eval (0.4.13) has no entry points for models of other packages: its registry holds what was
imported. This imports ours and goes on as `lm_eval` does.
"""

from __future__ import annotations

from kvprune.errors import KVPruneError


def main() -> None:
    """Runs lm-eval's command line.

    Raises:
        KVPruneError: lm-eval is not installed.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise KVPruneError(
            f"harness: expected lm-evaluation-harness, came {error}: pip install kvprune[lm-eval]"
        ) from error
    from . import lm_eval  # noqa: F401

    cli_evaluate()


if __name__ == "__main__":
    main()
