"""The one exception type that means: the user gave us something wrong."""


class InputError(ValueError):
    """Wrong input: a file, key, tensor or option.

    The message names what was found, what was expected and what to do; the
    command line shows it as one line and exits with code 2.
    """
