"""What a user can cause. Each ends the run with one line and its exit code; the traceback comes with --debug only."""


class TrainError(Exception):
    """A run that cannot start or go on; the message says what was found, what is allowed and what to do."""

    exit_code = 1


class ConfigError(TrainError):
    """A setting that is unknown, of the wrong type, out of range, or at odds with another."""

    exit_code = 2
