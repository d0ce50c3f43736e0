"""The one exception that means "the user can mend this"."""


class InputError(ValueError):
    """Bad input: the message is one line that names the file, field and value, and says how to mend it.

    Jobs print it as ``error: ...`` and exit with code 1, without a traceback.
    """
