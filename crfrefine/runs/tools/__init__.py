"""`crfrefine info` and `crfrefine convert`."""
