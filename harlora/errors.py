"""The one exception that means: the input was wrong, here is what to do about it."""


class InputError(ValueError):
    """A user's file, argument or setting cannot be used as it is.

    The message names it, says what is required, what came, and the remedy. The command line prints the message
    alone and exits with status 2; every other exception is a defect and keeps its traceback.
    """
