"""UserError, the error for wrong input that users can correct themselves."""

import argparse
from typing import NoReturn


class UserError(Exception):
    """Bad input: a message, mostly of one line, that says what is wrong, where, and what to do.

    `main` prints it to stderr without a traceback and exits with status 2.
    """


class ArgumentParser(argparse.ArgumentParser):
    """Raises UserError for a wrong command line, where argparse itself would print and exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")
