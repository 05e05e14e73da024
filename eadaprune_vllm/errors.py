"""The errors this package raises.

EAdaPruneError(Exception)
├── StartupError            the server must not start: unsupported model, flag, version or option
├── InvalidOptionsError     a client asked for pruning options that do not exist or are out of range
├── NonFiniteFeaturesError  the vision tower produced NaN or infinity for an image
└── ServerError             a server that a command calls cannot be reached, denies access, or does not prune
"""


class EAdaPruneError(Exception):
    """Root of this package's errors; the message is one sentence for the person who can act on it."""


class StartupError(SystemExit, EAdaPruneError):
    """This configuration cannot be served with pruning.

    Also a ``SystemExit``, so that a server, a worker process or a script ends with the sentence and status 1
    instead of a traceback, while ``except Exception`` still catches it.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"eadaprune: {reason}")


class InvalidOptionsError(EAdaPruneError):
    """Pruning options that do not validate; ``field`` is the dotted path of the first offending field."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


class NonFiniteFeaturesError(EAdaPruneError):
    """The features of one image contain NaN or infinity, so that no budget can be computed from them."""


class ServerError(EAdaPruneError):
    """A server that a command calls cannot be reached, denies access, or does not prune: no image is to blame."""
