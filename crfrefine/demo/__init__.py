"""The phantom of `crfrefine demo`."""
