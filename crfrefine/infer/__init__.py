"""The command `infer`: its cases, their outputs, and the work on each of them."""
