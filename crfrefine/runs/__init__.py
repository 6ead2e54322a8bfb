"""Runs over many cases: folders and options come in, label maps and a record of each case go out.

Read `run.run_inference`.
"""
