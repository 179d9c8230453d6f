"""Published methods, one paper one file: combinations of the stations before, with no hooks of their own.

Those of control (`iti`, `caa`, `actadd`, `repe`, `refusal`, `cast`) return a `Steering`; `rome`, `memit` and `finetune`
write facts as `WeightEdit`s, `lorra` trains an `Adapter`; `dola` is a way to decode; `tracing` and `dissection` look.
Import the one you need: `from reprobe.methods import iti`.
"""
