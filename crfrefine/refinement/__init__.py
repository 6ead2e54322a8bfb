"""Refine one case, given as arrays; `case.py` has the public function."""
