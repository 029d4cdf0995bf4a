"""The one exception whose text is meant for the user. Any room may raise it; `main` prints it."""


class UserError(Exception):
    """Something the user can put right: one to three lines, no traceback, exit code 2.

    The text names the key, file or episode, the value found and the value wanted.
    """
