"""`crfrefine infer`: the folder run, its outputs, its records."""
