"""The one error type of the library, and which errors are no errors."""


class KVPruneError(ValueError):
    """Something was asked for that kvprune cannot do, or will not do wrongly.

    The message names the policy or the argument, what was expected, what came instead
    and how to mend it.
    """


def from_ctrl_c(error: BaseException) -> bool:
    """Whether a Ctrl-C stands behind an error.

    A library may have made another error of it, as transformers does where an import was stopped.
    """
    behind, seen = [error], set[int]()
    while behind:
        one = behind.pop()
        if isinstance(one, KeyboardInterrupt):
            return True
        if id(one) not in seen:
            seen.add(id(one))
            behind += [other for other in (one.__cause__, one.__context__) if other is not None]
    return False
