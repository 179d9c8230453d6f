"""Published methods, one paper one file: combinations of the stations before, with no hooks of their own.

Those of control (`iti`, `caa`, `actadd`, `repe`, `refusal`, `cast`) return a `Steering`; `dola` is a way to decode,
`lorra` trains an `Adapter`.
Import the one you need: `from reprobe.methods import iti`.
"""
