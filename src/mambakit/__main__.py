"""The process of the ``mambakit`` command, and of ``python -m mambakit``."""

import sys


def main() -> int:
    """Run the command line in a process of its own and return its exit code.

    What holds for a process and not for a call of ``mambakit.cli.main`` is done here: an
    interruption is answered from the first import on, and the standard streams are there.
    """
    try:
        from mambakit import cli

        _prepare_streams()
        return cli.main()
    except KeyboardInterrupt:
        return 130  # as a shell reports SIGINT


def _prepare_streams() -> None:
    """Open standard streams that the caller has closed (``2>&-``), to nowhere.

    A file that is opened later would get the number of the closed one, and with it whatever
    is written to the standard error: a run's weights must not begin with a warning.
    """
    import io
    import os

    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # in this order each gets the lowest number: its own
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    # a file's name or a model's text may hold what the encoding of the terminal does not
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
