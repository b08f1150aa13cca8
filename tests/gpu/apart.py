"Work in child processes, one at a time: what breaks or hangs there leaves this one whole."
import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator

Note = Callable[..., None]
Work = Callable[[Note], None]       # it notes named values, which the parent gets at once


def last_lines(error: BaseException) -> str:
    "The end of a traceback."
    return "".join(traceback.format_exception(error))[-1500:]


def child(work: Work, sender) -> None:
    os.setpgrp()        # so that its own children end with it
    try:
        work(lambda **values: sender.send(values))
    except BaseException as error:
        sender.send({"error": last_lines(error)})
    sender.send(None)


def noted(work: Work, seconds: float) -> Iterator[dict]:
    "What `work(note)` notes, as it comes, in a child that is killed after so many seconds."
    fork = multiprocessing.get_context("fork")      # what is imported here is there
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=child, args=(work, sender))
    process.start()
    sender.close()
    end = time.monotonic() + seconds
    try:
        while receiver.poll(max(0.0, end - time.monotonic())):
            if (values := receiver.recv()) is None:
                return
            yield values
        yield {"error": f"stopped after {seconds:.0f} seconds"}
    except EOFError:
        process.join()
        yield {"error": f"the process died with exit code {process.exitcode}"}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
