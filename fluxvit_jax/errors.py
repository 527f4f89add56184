"""The one kind of error that users are expected to cause and able to mend."""


class UserError(Exception):
    """Bad input: a message of one line that says what is wrong, where, and what to do.

    `main` prints it to stderr without a traceback and exits with status 2.
    """
