"""The error that the command line turns into one sentence and exit code 2."""


class UserError(ValueError):
    """What the user gave cannot be used; the message says what was expected and what came."""
