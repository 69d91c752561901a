"""What a user can put right. It is told in one message; any other exception is a bug of ours and keeps its traceback.

Each class is also the built-in that fits, for those who call smalto as a library.
"""


class UserError(Exception):
    """Something given or found that cannot be used: the message says what, the rule, and what helps."""


class InputError(UserError, ValueError):
    """A setting, or the content of a file, that breaks a rule."""


class MissingFile(UserError, FileNotFoundError):
    """A file or folder that is not there."""


class PathInUse(UserError, FileExistsError):
    """A file or folder that holds something else, or belongs to somebody else at the moment."""


class StorageError(UserError, OSError):
    """A disk or file system that refuses."""
