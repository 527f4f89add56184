"""The one kind of error that users are expected to cause and able to mend."""

import argparse


class UserError(Exception):
    """Bad input: a message of one line that says what is wrong, where, and what to do.

    `main` prints it to stderr without a traceback and exits with status 2.
    """


class ArgumentParser(argparse.ArgumentParser):
    """Raises UserError for a wrong command line, where argparse itself would print and exit."""

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see --help)")
