"""The one exception of this package."""


class CupError(Exception):
    """What a caller can cause: the message says what was found, what is allowed and what to do.

    The model, the optimizer and the EMA are left as they were.
    """
