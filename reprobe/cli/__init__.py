"""The command line: parse, call the library, show.

Every verb is one library call with the same names. Nothing heavy is imported before a verb needs it, so that
`reprobe --help` answers at once.
"""

from reprobe.cli.app import main

__all__ = ["main"]
