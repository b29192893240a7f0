"""The errors that are the user's to repair: the command line prints them in one line and exits with code 2."""

__all__ = ["RewardError", "Stopped", "UserError"]


class UserError(ValueError):
    """Something that came from outside is wrong; the message says what came, what was expected and what to do."""


class RewardError(UserError):
    """A reward returned something that is not one finite number per image."""


class Stopped(SystemExit):
    """The run ends before its time, by a signal or a failure elsewhere; the same command continues it."""
