"""The one error type of the library."""


class KVPruneError(ValueError):
    """Something was asked for that kvprune cannot do, or will not do wrongly.

    The message names the policy or the argument, what was expected, what came instead
    and how to mend it.
    """
