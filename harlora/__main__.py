"""The program ``harlora``, also ``python -m harlora``; says what to install where the study's libraries are missing."""

import sys


def main() -> None:
    """Run the command line, or end with status 2 if what it needs of the extra ``har`` is not installed."""
    try:
        from harlora.cli import main as run

        run()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "harlora":
            raise
        sys.stderr.write(
            f"harlora: the program requires {error.name}, which is not installed; install harlora with its extra har: "
            "pip install --no-build-isolation '.[har]' in the source folder\n"
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
