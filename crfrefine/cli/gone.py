"""Commands and options that are gone, with what does their job now."""

GONE = {
    "--allow-mismatched-dicom": "`--allow-mismatched-dicom` is gone: `crfrefine convert` reads DICOM, and no other command does",
    "describe": "`describe` is gone: `crfrefine COMMAND --help` lists the options of a command",
    "bids": "`bids` is gone: the script examples/bids.py refines a BIDS dataset with `crfrefine infer --manifest`",
    "doctor": "`doctor` is gone: `crfrefine info` without a file shows what is installed",
    "--continue": "`--continue` is gone from evaluate, which measures all cases again",
    "--resume": "`--resume` is gone from evaluate, which measures all cases again",
    "--max-minutes": "`--max-minutes` is gone: a training takes minutes; stop it with Ctrl-C, and --resume takes the finished folds",
    "--case-timeout": "`--case-timeout` is gone: a batch system, or `timeout`, limits the time of a run, and --continue does the rest",
    "--dask": "`--dask` is gone from this command, which runs on this machine; only infer takes it",
    "--workers": "`--workers` is gone: start a Dask scheduler and workers and give its address with --dask",
    "--summary FILE.jsonl": "a summary of JSON lines is gone: OUTPUT/.crfrefine/record.jsonl gets a line as each case ends",
    "cuda:all": "several GPUs are gone: run one `infer --device cuda:N` per GPU with --num-parts and --part-id",
}
"""Name of the command or option, such as "describe" or "--workers", to the sentence that its user gets."""
