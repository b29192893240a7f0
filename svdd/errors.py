"""The errors that are the user's to repair, printed in one line with exit code 2, and the other ends of a command."""

__all__ = ["Incomplete", "RewardError", "Stopped", "UserError"]


class UserError(ValueError):
    """Something that came from outside is wrong; the message says what came, what was expected and what to do."""


class RewardError(UserError):
    """A reward failed, or returned something that is not one finite number per image."""


class Stopped(SystemExit):
    """The run ends before its time, by a signal or a failure elsewhere; the same command continues it."""


class Incomplete(SystemExit):
    """The run is through but for prompts that failed; the same command tries them again."""
