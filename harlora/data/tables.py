"""Text files of gigabytes as tables, read in pieces by polars."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from harlora.data.archive import Archive
from harlora.errors import InputError

if TYPE_CHECKING:
    import polars

_REMEDY = "repair the file or download it again"
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
    gaps: those whose numbers may be NaN, or whose text may be missing and is then "".
    delimiters: the characters that may stand between columns; the first line shows which it is.
    Raises: InputError if the file is empty or not such a table, names the row that is not.
    """
    import polars as pl  # takes longer to import than most commands run, and only the large datasets need it

    where = f"{archive.path}: {name}"
    numbers = [column for column in wanted if column not in text]
    names: list[str] = []
    delimiter = ""
    row, empty = 1, True
    for chunk in archive.chunks(name):
        if not names:
            delimiter, names, header = _form(where, chunk.split(b"\n", 1)[0], columns, wanted, delimiters)
            if header:
                chunk = chunk.partition(b"\n")[2]
                row += 1
        after = row + chunk.count(b"\n")
        content = chunk.rstrip()
        if not content:
            row = after
            continue
        schema = {column: pl.Float64 if column in numbers else pl.String for column in names}
        try:
            table = pl.read_csv(content, has_header=False, separator=delimiter, schema=schema).select(wanted)
        except pl.exceptions.PolarsError as error:
            lines = content.decode("utf-8", "replace").splitlines()
            found = (_problem(line, delimiter, names, numbers) for line in lines)
            number, problem = next(((i, text) for i, text in enumerate(found) if text), (0, str(error).split("\n")[0]))
            raise InputError(f"{where}: row {row + number} {problem}; {_REMEDY}") from error
        table = table.with_columns(pl.col(column).str.strip_chars().fill_null("") for column in text)
        for column in wanted:
            if column in text:
                bad = (table[column] == "") & (column not in gaps)
            else:
                bad = table[column].is_null() if column in gaps else ~table[column].is_finite().fill_null(value=False)
            if bad.any():
                number = bad.arg_max() or 0
                problem = _problem(content.decode().splitlines()[number], delimiter, names, numbers)
                kind = "text" if column in text else "finite number"
                problem = problem or f"has no {kind} in the column {column}"
                raise InputError(f"{where}: row {row + number} {problem}; {_REMEDY}")
        yield table
        row, empty = after, False
    if empty:
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


def _problem(line: str, delimiter: str, names: Sequence[str], numbers: Sequence[str]) -> str:
    """What is wrong with the form of a row, or nothing."""
    fields = [field.strip().strip('"') for field in line.split(delimiter)]
    if len(fields) != len(names):
        return f"has {len(fields)} columns, required {len(names)}"
    for name, field in zip(names, fields, strict=True):
        if name in numbers and field and not _is_number(field):
            return f"has {field!r} in the column {name}, required a number"
    return ""


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True
