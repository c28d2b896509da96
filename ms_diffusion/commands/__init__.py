"""The programs' commands, a module each with `main(argv) -> exit code`."""

COMMANDS = {
    "train": "train a run, or continue one",
    "runs": "list the runs below a folder, and how to continue them",
    "report": "write what a run has recorded as one HTML page",
    "sample": "draw samples from a run, or edit images with it",
    "app": "serve a page in the browser that draws and edits with runs",
    "evaluate": "score samples against real images",
    "likelihood": "bits per dimension of images under a run",
    "benchmark": "time training and sampling on this machine",
    "doctor": "say whether this machine can train, and what to mend",
    "audit": "list the primitives of a preset's graphs and how each device runs them",
    "completion": "print a script that completes commands and flags in a shell",
    "export": "write a run's networks as ONNX or MindIR, or their weights, for other programs",
}
