"""The command line: ``scfg generate PROMPT`` and ``scfg evaluate``."""

import sys
from collections.abc import Sequence

from scfg.options import build_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Those after the program's name; None: those of the process.

    Returns:
        The exit status: 0; 2 after an error, which is printed; 130 after Ctrl-C.
    """
    options = build_parser().parse_args(arguments)
    from scfg.commands import run_evaluate, run_generate  # torch, which --help does not need

    try:
        run = run_generate if options.command == "generate" else run_evaluate
        written = run(options)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"scfg {options.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        done = f"; wrote {' '.join(map(str, stop.args))}" if stop.args else ""
        print(f"scfg {options.command}: interrupted{done}", file=sys.stderr)
        return 130
    if not options.quiet:
        print("wrote", *written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
