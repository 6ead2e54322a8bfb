"""`crfrefine info`, `crfrefine convert`, `crfrefine doctor`."""
