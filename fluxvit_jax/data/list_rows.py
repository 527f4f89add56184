"""Rows of a list of videos: its delimiter, header and columns, found in what people write."""

import csv
import io
import os
import re
from collections.abc import Sequence

from etils import epath

from fluxvit_jax.distributed import storage
from fluxvit_jax.errors import UserError

SEPARATOR = "|"  # of several labels of a video

Row = tuple[int, list[str]]  # of a list: the number of a line, its path and label

# Names of columns are made of these words: path, video_id, ClassIndex.
_COLUMN_NAME = re.compile(
    r"#?\s*((path|video|vid|clip|file|name|image|img|sample|source|url|youtube"
    r"|label|class|category|target|action|id|uid|idx|index)(e?s)?[ _-]?)+",
    re.IGNORECASE,
)


def read_rows(
    path: epath.Path, root: epath.Path, labelled: bool, multi_label: bool
) -> tuple[list[Row], bool]:
    """The lines of a list without its header, and whether their labels are names.

    root: the folder of its paths. Raises UserError: there is no such list or folder, no video in
    it, or a line that is not CSV or has another number of columns.
    """
    lines = text_of(path, errors="surrogateescape").split("\n")
    if not storage.is_folder(root):
        raise UserError(f"{path}: the root of its paths, {root}, is no folder")
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    delimiter = _delimiter([line for _, line in numbered], labelled)
    rows = [
        (number, _columns(path, number, line, delimiter, labelled)) for number, line in numbered
    ]
    named = (
        labelled
        and delimiter is not None
        and not any(
            _is_number(text) for _, row in rows for text in label_texts(row[1], multi_label)
        )
    )
    if rows and _is_header([row for _, row in rows], root, labelled and not named):
        del rows[0]
    if not rows:
        raise UserError(f"{path}: holds no videos; write one a line: path,label")
    return rows, named


def label_texts(cell: str, multi_label: bool) -> list[str]:
    """The labels in a cell of a list."""
    if not multi_label:
        return [cell]
    return [text.strip() for text in cell.split(SEPARATOR)] if cell else []


def _is_number(label: str) -> bool:
    """Whether a label was meant as a number; "nan" stands for a missing one."""
    return (
        re.fullmatch(r"[-+]?[0-9]*\.?[0-9]+(e[-+]?[0-9]+)?|nan", label, re.IGNORECASE) is not None
    )


def _delimiter(lines: Sequence[str], labelled: bool) -> str | None:
    """The column separator of most lines: a tab, comma or semicolon, None for blanks."""
    delimiters = ("\t", ",", ";", None)
    separates = _precedes_label if labelled else _ends_path
    counts = [sum(separates(delimiter, line) for line in lines) for delimiter in delimiters]
    if any(counts):
        return delimiters[counts.index(max(counts))]  # ties go to the first
    if not labelled:
        return None
    # No line has a number for a label, so labels are names.
    counts = [sum(_is_pair(delimiter, line) for line in lines) for delimiter in "\t,;"]
    if any(counts):
        return "\t,;"[counts.index(max(counts))]
    # The columns that were probably meant make the clearest error.
    return next((d for d in "\t,;" if any(d in line for line in lines)), None)


def _is_pair(delimiter: str, line: str) -> bool:
    try:
        return len(_csv_columns(line, delimiter)) == 2
    except csv.Error:
        return False


def _precedes_label(delimiter: str | None, line: str) -> bool:
    label = rf"-?[0-9]+(\{SEPARATOR}-?[0-9]+)*"  # one or several
    return re.search(rf'{delimiter or "[ ]"}\s*"?{label}"?\s*$', line) is not None


def _ends_path(delimiter: str | None, line: str) -> bool:
    """Whether a path ends at a delimiter, in a list whose other columns do not matter."""
    if delimiter is None or delimiter not in line:
        return False
    try:
        columns = _csv_columns(line, delimiter)
    except csv.Error:
        return True
    # A line that looks like one path with a comma in it is one path.
    return _has_suffix(columns[0]) or not _has_suffix(columns[-1])


def _has_suffix(name: str) -> bool:
    return re.search(r"\.\w+$", name) is not None


def text_of(path: str | os.PathLike, errors: str = "strict") -> str:
    """The text of a file with \\n as line end. Raises UserError if it cannot be read.

    errors: "surrogateescape" keeps bytes that are not UTF-8, which file names may contain.
    """
    try:
        content = storage.read_bytes(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file or folder") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        if b"\0" in content:  # no file name has it, but UTF-16 does
            errors = "strict"
        # Universal newlines: all line ends become \n.
        return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", errors=errors).read()
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None


def _columns(
    path: epath.Path, number: int, line: str, delimiter: str | None, labelled: bool
) -> list[str]:
    """Path and label of a line; the label is "" unless `labelled`.

    The delimiter None splits at the last blanks; with any other the line is CSV.
    """
    if delimiter is None and not labelled:  # numbers at the end are labels or frame counts
        return [re.sub(r"(\s+-?\d+)+$", "", line.strip()), ""]
    if delimiter is None:
        columns = line.rsplit(maxsplit=1)
        if len(columns) == 2 and re.search(r"\s-?[0-9]+$", columns[0]):  # frame counts, say
            columns = line.split()
    else:
        try:
            columns = _csv_columns(line, delimiter)
        except csv.Error as error:
            raise UserError(f"{path}, line {number}: is not valid CSV: {error}") from None
    if not labelled:
        return [columns[0], ""]
    if len(columns) != 2:
        raise UserError(f"{path}, line {number}: {len(columns)} columns where path,label are 2")
    return [columns[0].strip(), columns[1]]


def _csv_columns(line: str, delimiter: str) -> list[str]:
    # A line at a time: a quote left open is an error of its line, not of all that follow.
    row = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True, strict=True))
    return [column.strip() for column in row]


def _is_header(rows: Sequence[list[str]], root: epath.Path, numbered: bool) -> bool:
    """Whether the first row names columns; in doubt it is taken for a video.

    numbered: whether labels are numbers. Otherwise a header is told by its words, or is unlike all
    other rows, and there is no such file.
    """
    (first, second), *others = rows
    if numbered:
        return bool(_COLUMN_NAME.fullmatch(first) and _COLUMN_NAME.fullmatch(second))
    stands_out = bool(others) and not _has_suffix(first)
    if stands_out:
        stands_out = all(_has_suffix(path) and label != second for path, label in others)
    if not stands_out and not _COLUMN_NAME.fullmatch(first):
        return False
    with storage.errors(root):
        return not (root / first).exists()
