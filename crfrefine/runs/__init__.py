"""Many cases: `infer` is the run of the command, `execution` does the cases side by side, `status` counts done and missing cases.

Folders and options come in; label maps and a record of each case go out. Read `infer.run`, `infer.case_work`, `infer.outputs` and
`infer.records`, then `execution`, which has its own README.
"""
