"""Entry point of `globe` and of `python -m globe_fit`: errors become one sentence and an exit code."""

import sys

INTERRUPTED = 130


def main() -> None:
    """Exit code 0: done; 1: failed under way; 2: cannot be done as asked; 130: interrupted."""
    # the import is inside: it takes seconds, and Ctrl-C during it must not print a traceback
    try:
        from transformers.utils import logging

        from globe_fit.cli import app
        from globe_kernels.errors import GlobeError

        logging.disable_progress_bar()
        logging.set_verbosity_error()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    try:
        code = app(standalone_mode=False)
    except GlobeError as error:
        print(f"globe: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("globe: interrupted; nothing was written.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        # typer's own usage errors, from whichever click it carries; anything else is a bug and keeps its traceback
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        print(f"globe: {message()} See globe --help.", file=sys.stderr)
        sys.exit(2)
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
