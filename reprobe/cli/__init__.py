"""The command line: parse, call the library, show.

Every verb is one library call with the same names. Nothing heavy is imported before a verb needs it, so that
`reprobe --help` answers at once.
"""

import reprobe.cli.edit  # (registers the verbs of `reprobe edit`)
import reprobe.cli.trace  # noqa: F401 (registers `reprobe trace`)
from reprobe.cli.app import main

__all__ = ["main"]
