"""`crfrefine demo`: a phantom, refined, with a picture."""
