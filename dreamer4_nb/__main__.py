"""`dreamer4-nb`, `python -m dreamer4_nb` and `torchrun -m dreamer4_nb` begin here.

Importing PyTorch takes seconds in which nothing has begun: Ctrl-C then ends the process without a traceback.
The command itself is in runs/cli.py.
"""
import os
import signal
import sys


def main() -> int:
    "Imports the command, runs it and returns its exit code."
    has_handler = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if has_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .runs.cli import main as run
    if has_handler:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return run()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    if "RANK" in os.environ:
        # While threads of gloo are left, the interpreter's own exit sometimes aborts.
        os._exit(code)
    sys.exit(code)
