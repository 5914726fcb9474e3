"""The program: `tinygpt2`, and `python -m tinygpt2` for torchrun and accelerate launch."""

import sys


def main() -> None:
    """Run the command line. An interruption while it is imported ends quietly, too."""
    try:
        from tinygpt2.cli.app import main as run
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
