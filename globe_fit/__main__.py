"""Entry point of `globe` and of `python -m globe_fit`: an error becomes one sentence and an exit code."""

import os
import sys
from contextlib import suppress

from globe_fit.run.stopping import Interrupted, interrupt_behind, terminating

_USAGE = 2
_INTERRUPTED = 130


def main() -> None:
    """Run the command and exit: 0 done, 1 failed under way, 2 the request cannot be met, 130 Ctrl-C, 143 SIGTERM."""
    _keep_streams_usable()
    with terminating():
        code = _work()
    sys.exit(code)


def _work() -> int:
    """Run the command, say why it ends, and return the exit code."""
    # the imports may take seconds, and Ctrl-C during them must not print a traceback either
    try:
        code, message = _run()
    except (Exception, KeyboardInterrupt) as error:
        stopped = interrupt_behind(error)
        if stopped is None:
            raise
        interrupted = Interrupted(stopped)
        code, message = interrupted.exit_code, str(interrupted)
    if message and "torch" in sys.modules:
        from globe_fit.run import distributed

        distributed.say(message)  # of several ranks one speaks
    elif message:
        from globe_fit.run import display

        display.say(message)
    _let_streams_go()
    return code


def _let_streams_go() -> None:
    """Drop the text that a stream without a reader still holds: Python would end with exit code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError):  # a stream without a descriptor
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _keep_streams_usable() -> None:
    """Let no stream that is closed or is not UTF-8 end the work with an exception."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell
            # until the process ends
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _run() -> tuple[int, str]:
    from globe_fit.cli.app import app
    from globe_kernels.errors import GlobeError, one_line

    try:
        code = app(standalone_mode=False, prog_name="globe") or 0
    except GlobeError as error:
        return error.exit_code, str(error)
    except PermissionError as error:
        return _USAGE, one_line(f"{error.filename or error}: permission denied; give a path that you may use.")
    except Exception as error:
        # usage errors of typer, of whichever click it carries; any other error is a bug and keeps its traceback
        describe = getattr(error, "format_message", None)
        if describe is None:
            raise
        return _USAGE, f"{describe().rstrip('.')}; {_next_step(error)}."
    if code == _INTERRUPTED:  # typer was reading the options, and does not say which signal came
        raise KeyboardInterrupt
    return code, ""


def _next_step(error: Exception) -> str:
    """Say where an option belongs that was written before the command."""
    option, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    commands = getattr(context and context.command, "commands", {})
    if any(option in found.opts for each in commands.values() for found in each.params):
        return f"{option} is an option of a command and goes after it: globe COMMAND ... {option}"
    return f"see {context.command_path if context else 'globe'} --help"


if __name__ == "__main__":
    main()
