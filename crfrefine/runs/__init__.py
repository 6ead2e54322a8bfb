"""Many cases: `infer` is the run of the command, `execution` does cases side by side.

Folders and options come in; label maps and a record of each case go out. Read `infer.run`,
`infer.case_work` and `infer.store`.
"""
