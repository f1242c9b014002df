"""Text files of gigabytes as tables, read in pieces by polars."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from harlora.data.archive import Archive
from harlora.errors import InputError

if TYPE_CHECKING:
    import polars

_NAMES = {",": "a comma", "\t": "a tab", " ": "a space"}


def frames(
    archive: Archive,
    name: str,
    *,
    columns: Sequence[str],
    wanted: Sequence[str],
    text: Sequence[str] = (),
    gaps: Sequence[str] = (),
    delimiters: str,
) -> "Iterator[polars.DataFrame]":
    """The wanted columns of a text file, a piece of it at a time: numbers as float64, text without blanks around it.

    columns: all the file's columns in the authors' order. A first line with their names may be missing.
    text: those of the wanted columns that hold text, the others hold numbers.
    gaps: those that may be empty or NaN; empty text is then "".
    delimiters: the characters that may stand between columns; the first line shows which it is.
    Raises: InputError if the file is empty or not such a table, names the row that is not.
    """
    import polars as pl  # takes longer to import than most commands run, and only the large datasets need it

    where = f"{archive.path}: {name}"
    names: list[str] = []
    delimiter, header = "", False
    row = 1
    for chunk in archive.chunks(name):
        if not names:
            delimiter, names, header = _form(where, chunk.split(b"\n", 1)[0], columns, wanted, delimiters)
            if header:
                chunk = chunk.partition(b"\n")[2]
                row += 1
        content = chunk.rstrip()
        if not content:
            continue
        schema = {column: pl.String if column in text else pl.Float64 for column in names}
        try:
            table = pl.scan_csv(content, has_header=False, separator=delimiter, schema=schema).select(wanted).collect()
        except pl.exceptions.PolarsError as error:
            numbers = [names.index(column) for column in wanted if column not in text]
            raise InputError(f"{where}: {_problem(content, row, delimiter, len(names), numbers, error)}") from error
        table = table.with_columns(pl.col(column).str.strip_chars().fill_null("") for column in text)
        for column in wanted:
            if column in gaps:
                continue
            bad = (table[column] == "") if column in text else ~table[column].is_finite().fill_null(value=False)
            if bad.any():
                raise InputError(
                    f"{where}: row {row + (bad.arg_max() or 0)} has no {'text' if column in text else 'finite number'} "
                    f"in the column {column}; repair the file or download it again"
                )
        yield table
        row += len(table)
    if row == 1 + header:
        raise InputError(f"{where}: the file has no rows; download it again")


def _form(
    where: str, first: bytes, columns: Sequence[str], wanted: Sequence[str], delimiters: str
) -> tuple[str, list[str], bool]:
    """What stands between columns, the columns' names, and whether the first line has them."""
    line = first.decode("utf-8-sig", "replace").strip()
    for delimiter in delimiters:
        fields = [field.strip().strip('"') for field in line.split(delimiter)]
        if set(wanted) <= set(fields):
            return delimiter, fields, True
        if len(fields) == len(columns) and _is_number(fields[0]):
            return delimiter, list(columns), False
    between = " or ".join(_NAMES[delimiter] for delimiter in delimiters)
    raise InputError(
        f"{where}: required {len(columns)} columns ({', '.join(columns[:5])}, ...) with {between} between them, "
        f"the first line reads {line[:80]!r}; is it the right file?"
    )


def _problem(content: bytes, row: int, delimiter: str, count: int, numbers: Sequence[int], error: Exception) -> str:
    for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), start=row):
        fields = [field.strip().strip('"') for field in line.split(delimiter)]
        if len(fields) > count:
            return f"row {number} has {len(fields)} columns, required {count}; repair the file or download it again"
        for index in numbers:
            if index < len(fields) and fields[index] and not _is_number(fields[index]):
                return f"row {number} has {fields[index]!r} where a number is required; repair the file or remove it"
    return f"not a table from row {row} on ({str(error).splitlines()[0]}); download it again"


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True
