"""Programs around `infer`, `train-crf` and `evaluate`; only `cli` imports them.

`demo`, the page of `tune`, and `tools`: `info`, `convert`.
"""
