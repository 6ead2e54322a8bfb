"""`crfrefine info`, `crfrefine convert`, `crfrefine doctor`, and the descriptions that `crfrefine describe` prints."""
