"""A training process among others: it ends with its launcher, stops when asked to, and leaves its
last word where the launching script finds it.

Imports nothing heavy: `cli.py` calls `end_with_launcher` before all else.
"""

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

# How long a process that lost its launcher has for its last checkpoint: as much as DeepSpeed's and
# torch's launchers give theirs.
_GRACE = 30.0
# Set by scripts/launch.sh: its process, and a folder for what its training processes have to say.
_SCRIPT = "SQLLAVA_SCRIPT"
_LAST_WORDS = "SQLLAVA_LAST_WORDS"


class Stopped(SystemExit):
    """The run was asked to stop, and did so before its end; the exit code is the shell's custom."""

    def __init__(self, by: int) -> None:
        super().__init__(128 + by)


# --- being asked to stop --------------------------------------------------------------------------


class StopRequest:
    """Set by SIGTERM and Ctrl-C while it listens; the trainer looks at it after each step.

    Attributes:
        by: the signal, or 0.
    """

    def __init__(self) -> None:
        self.by = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Takes both signals over. A second Ctrl-C ends the process at once; a second SIGTERM does
        not, as launchers send it to their processes again."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in before:
            signal.signal(number, self._hear)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if not self.by:
            self.by = number
            logger.warning("%s: stopping after this step", signal.Signals(number).name)


def leave_signals_to_parent() -> None:
    """For a loader's worker: a signal to the whole group must not take the workers from a training
    process that is about to write its checkpoint; when to end is for that process to say."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(int(_GRACE) + 10))


# --- the launcher ---------------------------------------------------------------------------------


def end_with_launcher() -> None:
    """Makes a process that a launcher started stop when the launcher is gone.

    Else it would train on beside the run that is started in its place.
    """
    # A launcher that was told to ignore signals hands that on.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if "LOCAL_RANK" in os.environ:
        chain = _launchers()
        threading.Thread(target=_watch, args=(chain,), daemon=True).start()


def _launchers() -> list[int]:
    """This process, its launcher, what started that, as far as it belongs to the run."""
    chain = [os.getpid(), os.getppid()]
    script = os.environ.get(_SCRIPT)
    if script:
        above = chain.copy()
        while above[-1] > 1 and above[-1] != int(script):
            above.append(_parent(above[-1]))
        if above[-1] == int(script):
            return above
    # DeepSpeed's launcher is started by its runner, which dies alone.
    runner = _parent(chain[-1])
    if b"deepspeed.launcher.launch" in _command(chain[-1]) and b"deepspeed" in _command(runner):
        chain.append(runner)
    return chain


def _watch(chain: list[int]) -> None:
    while all(_parent(child) == parent for child, parent in zip(chain, chain[1:], strict=False)):
        time.sleep(1)
    logger.warning("the launcher is gone: stopping")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    os._exit(128 + signal.SIGTERM)


def _parent(pid: int) -> int:
    """A process's parent; 0 where it is not known."""
    if pid == os.getpid():
        return os.getppid()
    try:
        # "pid (name) state parent ...", and the name may hold anything
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


# --- the end --------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_process() -> Iterator[None]:
    """Ends a process of several that has done its work without finalizing Python.

    DeepSpeed's hooks keep the process group for good, and its gloo threads may still hold tensors:
    what they let go of while Python ends aborts the process, and the launcher reports a failure.
    """
    code: Any = None

    def leave() -> None:
        if code is not None:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    if "LOCAL_RANK" in os.environ:
        atexit.register(leave)  # the first to register is the last to run: after wandb's, say
    rank = os.environ.get("RANK", "0")
    # DeepSpeed's runner reports success when its launcher was killed: the script counts these.
    _note(f"{rank}.begun")
    try:
        yield
        code = 0
        _note(f"{rank}.done")
    except Stopped as stopped:
        code = stopped.code
        raise
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except SystemExit as error:
        if isinstance(error.code, str):
            _note(f"{time.time_ns()}-{rank}.word", error.code)
        raise
    except Exception as error:
        _note(f"{time.time_ns()}-{rank}.word", f"{type(error).__name__}: {own_words(error)}")
        raise


def own_words(error: Exception) -> str:
    """What an error says; one of a loader's worker brings a traceback, and ends with it."""
    text = str(error).strip()
    if "Traceback (most recent call last)" not in text:
        return text
    kind = type(error)
    name = f"{kind.__module__.removeprefix('builtins')}.{kind.__qualname__}: ".lstrip(".")
    return text.rpartition(f"\n{name}")[2] if f"\n{name}" in text else text.splitlines()[-1]


def _note(name: str, text: str = "") -> None:
    """Leaves a file for the script, which shows what the first process died of after all noise."""
    folder = os.environ.get(_LAST_WORDS)
    if folder:
        with contextlib.suppress(OSError):
            Path(folder, name).write_text(text + "\n")
