"""What pixseq raises when something is wrong, and the exit code each kind of fault gets."""

from collections.abc import Iterable

INPUT = 1  # an input or artifact is at fault
USAGE = 2  # the command line or configuration is at fault
DIVERGED = 3  # training met a non-finite loss
BUG = 70
INTERRUPTED = 130
CLOSED_PIPE = 141


MOST_SHOWN = 2000  # characters of a message: a foreign value in it may have millions


def shortened(text: str) -> str:
    """The beginning and the end of a long text."""
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN // 2]} ... {text[-MOST_SHOWN // 4 :]}"


def guess(word: str, known: Iterable[str]) -> str:
    """The beginning of a hint: the nearest of the known words, if one is near."""
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]}? " if close else ""


class PixseqError(Exception):
    """A fault the user can mend: `message` says what is wrong with both sides, `hint` the way out."""

    code = INPUT

    def __init__(self, message: str, hint: str | None = None):
        self.message = shortened(message)
        super().__init__(self.message)
        self.hint = hint


class UsageError(PixseqError):
    """Options or configuration that cannot be used as given."""

    code = USAGE


class Diverged(PixseqError):
    """The loss or its gradient stopped being finite."""

    code = DIVERGED


class Interrupted(PixseqError):
    """A clean stop before the end: a signal or a time limit. What was done is kept for --resume."""

    code = INTERRUPTED


class Stop(BaseException):
    """A signal to end. Not an Exception: code that turns any failure of a library into a fault of its input must not
    take the user's Ctrl-C for damage.
    """
