"""Text files of gigabytes as tables."""

import numpy as np
import pytest
from archives import zipped

from harlora.data import archive as archive_module
from harlora.data.tables import frames
from harlora.errors import InputError

HEADER = "id,time,x,who\n"
ROWS = "1,1424696633908,-5.5,a\n2,1.42469663391325E+012,0.25, b \n3,1424696633911,1e-3,c\n"


def read(tmp_path, content, **options):
    archive = zipped(tmp_path / "a.zip", {"t.csv": content})
    given = {
        "columns": ("id", "time", "x", "who"),
        "wanted": ("time", "x", "who"),
        "text": ("who",),
        "delimiters": ",\t",
    }
    return [row for frame in frames(archive, "t.csv", **{**given, **options}) for row in frame.rows()]


EXPECTED = [(1424696633908.0, -5.5, "a"), (1424696633913.25, 0.25, "b"), (1424696633911.0, 1e-3, "c")]


@pytest.mark.parametrize("block", [5, 32 << 20])
@pytest.mark.parametrize(
    "content",
    [
        HEADER + ROWS,
        ROWS,
        (HEADER + ROWS).replace(",", "\t"),
        (HEADER + ROWS).replace("\n", "\r\n"),
        HEADER + ROWS.rstrip() + "\n\n",
        '"id","time","x","who"\n' + ROWS.replace("a", '"a"'),
        "\ufeff" + HEADER + ROWS,
    ],
    ids=["header", "no header", "tabs", "CRLF", "empty last line", "quotes", "byte order mark"],
)
def test_forms_of_one_table(tmp_path, monkeypatch, content, block):
    monkeypatch.setattr(archive_module, "_BLOCK", block)
    assert read(tmp_path, content) == EXPECTED


def test_columns_are_found_by_name(tmp_path):
    assert read(tmp_path, "who,x,more,time\na,1,9,2\n") == [(2.0, 1.0, "a")]


def test_gaps_are_allowed_where_said(tmp_path):
    (one, two) = read(tmp_path, "1,5,NaN,a\n2,6,1.5,\n", gaps=("x", "who"))
    assert np.isnan(one[1])
    assert one[::2] == (5.0, "a")
    assert two == (6.0, 1.5, "")


@pytest.mark.parametrize("block", [5, 32 << 20])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + ROWS + "4,5,inf,d\n", "row 5 has no finite number in the column x"),
        (ROWS + "4,5,nan,d\n", "row 4 has no finite number in the column x"),
        (ROWS + "4,5,,d\n", "row 4 has no finite number in the column x"),
        (ROWS + "4,5\n", "row 4 has 2 columns, required 4"),
        (ROWS + "4,5,6\n", "row 4 has 3 columns, required 4"),
        (ROWS + "4,5,6,\n", "row 4 has no text in the column who"),
        (ROWS + "4,5,6,d,7\n", "row 4 has 5 columns, required 4"),
        (ROWS + "4,now,6,d\n", "row 4 has 'now' in the column time, required a number"),
        (HEADER, "the file has no rows"),
    ],
)
def test_rows_that_are_wrong_are_named(tmp_path, monkeypatch, content, message, block):
    monkeypatch.setattr(archive_module, "_BLOCK", block)
    with pytest.raises(InputError, match=r"a\.zip: t\.csv: " + message):
        read(tmp_path, content)


def test_an_empty_line_between_rows_is_named(tmp_path):
    with pytest.raises(InputError, match="row 4 has 1 columns, required 4"):
        read(tmp_path, ROWS + "\n4,5,6,d\n")


@pytest.mark.parametrize("content", ["1;2;3;a\n", "id,time,x\n1,2,3\n", "some text\n", "1,2,3\n"])
def test_another_table_is_refused(tmp_path, content):
    message = r"t\.csv: required 4 columns \(id, time, x, who, ...\) with a comma or a tab between them, the first line"
    with pytest.raises(InputError, match=message):
        read(tmp_path, content)


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="the file has no rows"):
        read(tmp_path, "")
