"""Entry point of `globe` and of `python -m globe_fit`: an error becomes one sentence and an exit code."""

import sys
from logging import ERROR, getLogger

_USAGE = 2
_INTERRUPTED = 130


def main() -> None:
    """Run the command and exit: 0 done, 1 failed under way, 2 the request cannot be met, 130 interrupted."""
    try:
        # the imports take seconds, and Ctrl-C during them must not print a traceback either
        from transformers.utils import logging

        from globe_fit.run import distributed
    except KeyboardInterrupt:
        print("globe: interrupted.", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    getLogger("accelerate").setLevel(ERROR)  # accelerate warns of offloading, which the user asked for
    distributed.end_with_the_others()
    code, message = _run()
    if message:
        distributed.say(message)
    sys.exit(code)


def _run() -> tuple[int, str]:
    try:
        from globe_fit.cli.app import app
        from globe_fit.run.distributed import leave, ranks_in_all
        from globe_kernels.errors import GlobeError, RequestError
    except KeyboardInterrupt:
        return _INTERRUPTED, "interrupted."
    try:
        if ranks_in_all() > 1 and sys.argv[1:2] != ["fit"]:
            raise RequestError("Under torchrun only globe fit runs; run the other commands without torchrun.")
        code = app(standalone_mode=False) or 0
        leave()
    except GlobeError as error:
        return error.exit_code, str(error)
    except Exception as error:
        # usage errors of typer, of whichever click it carries; any other error is a bug and keeps its traceback
        describe = getattr(error, "format_message", None)
        if describe is None:
            raise
        return _USAGE, f"{describe().rstrip('.')}; see globe --help."
    # typer turns Ctrl-C into exit code 130
    return code, "interrupted." if code == _INTERRUPTED else ""


if __name__ == "__main__":
    main()
