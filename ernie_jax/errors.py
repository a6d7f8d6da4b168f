"""The one exception that means "the user can fix this"."""


class UserError(ValueError):
    """Report bad input in one sentence that names the file, tensor, flag or field and what to do.

    The command line prints the sentence without a traceback and exits with 1.
    """
