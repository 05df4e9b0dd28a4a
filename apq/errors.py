"""The one error that is the user's to mend."""


class UserError(ValueError):
    """A mistake in flags, files or specs: scripts print it as one line and exit with code 2."""
