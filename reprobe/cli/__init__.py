"""The command line: parse, call the library, show.

Every verb is one library call with the same names. Nothing heavy is imported before a verb needs it, so that
`reprobe --help` answers at once.
"""

import reprobe.cli.dissect
import reprobe.cli.edit  # noqa: F401 (registers the verbs of `reprobe edit`)
from reprobe.cli.app import main

__all__ = ["main"]
