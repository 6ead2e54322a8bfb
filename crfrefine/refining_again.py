"""RefiningAgain, for programs that refine one case with ever new parameters: the public place of what `refinement` has."""

from crfrefine.refinement.refining_again import RefiningAgain as RefiningAgain
