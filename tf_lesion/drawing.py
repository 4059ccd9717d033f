"""How every picture is drawn: by matplotlib as it comes, as a `Figure` of its own.

So pictures look alike everywhere, and a notebook's figures, screen and settings stay as they are.
"""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """matplotlib's own settings in place of a user's, who may want LaTeX; "$" in a name is a "$".

    Around whatever makes texts or saves a figure: both read the settings.
    """
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams["text.parse_math"] = False
        yield
