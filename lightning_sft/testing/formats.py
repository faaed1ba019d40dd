"""What a format has to do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import ClassVar

from lightning_sft.bases import DataFormat
from lightning_sft.conversation import ROLES, Conversation, Meta, Row, Segments
from lightning_sft.errors import SFTError
from lightning_sft.testing.plugin import MissingSample, PluginTests

_ODD_VALUES: tuple[object, ...] = (
    None,
    "",
    " ",
    7,
    1.5,
    True,
    [],
    {},
    [None],
    [7],
    ["a"],
    [[]],
    [{}],
    {"a": 1},
)
_ODD_ROWS: tuple[Row, ...] = ({}, {"": ""}, {"text": None}, {"messages": 7}, {"no such column": "x"})


class FormatTests(PluginTests):
    """The tests of a format.

    Attributes:
        rows: Rows of the format, all of one source.
        bad_rows: Rows that it has to refuse, each by itself.
    """

    kind = "formats"
    rows: ClassVar[Sequence[Row]] = ()
    bad_rows: ClassVar[Sequence[Row]] = ()

    def given(self, name: str) -> Sequence[Row]:
        """`rows` or `bad_rows`.

        Raises:
            MissingSample: There are none.
        """
        rows: Sequence[Row] = getattr(self, name)
        if not rows:
            raise MissingSample(f"set `{name}` in the test class of {self.plugin.__name__}")
        return rows

    def test_it_makes_conversations(self) -> None:
        """Its rows become conversations or segments, in known roles."""
        check_items(self.make(), self.given("rows"))

    def test_it_is_pure(self) -> None:
        """The same rows give the same result each time, and stay as they are."""
        check_purity(self.make(), self.make(), self.given("rows"))

    def test_it_answers_whether_columns_are_its_own(self) -> None:
        """`matches` and `fits` give true or false, whatever the columns."""
        check_detection(self.make(), self.rows)

    def test_it_refuses_bad_rows(self) -> None:
        """Bad rows raise SFTError with the key."""
        check_bad_rows(self.make(), self.given("bad_rows"))

    def test_no_row_makes_it_fail(self) -> None:
        """A row with a column missing or a value of another type is converted or refused with SFTError."""
        check_odd_rows(self.make(), self.rows)

    def test_what_it_writes_reads_back(self) -> None:
        """A conversation that it writes as a row is read as the same one."""
        format = self.make()
        if type(format).to_row is not DataFormat.to_row:
            check_writing(format, self.given("rows"))


def convert(format: DataFormat, rows: Sequence[Row]) -> list[Conversation | Segments]:
    """What the format makes of the rows of a source."""
    placed = [(Meta("sample", number), row) for number, row in enumerate(rows, 1)]
    return [item for _, row in format.gather(placed) for item in format.convert(row)]


def check_items(format: DataFormat, rows: Sequence[Row]) -> None:
    """The rows become conversations or segments, at least one, in known roles."""
    items = convert(format, rows)
    assert items, f"{_name(format)} makes nothing of its rows"
    for item in items:
        assert isinstance(item, Conversation | Segments), (
            f"{_name(format)} gives a {type(item).__name__}, not a Conversation or Segments"
        )
        if isinstance(item, Conversation):
            roles = sorted({message.role for message in item.messages} - {*ROLES})
            assert not roles, (
                f"{_name(format)} gives the role {roles[0]!r}, which is none of {', '.join(ROLES)}"
            )
            texts: list[object] = [message.content for message in item.messages]
            tuples = isinstance(item.messages, tuple)
        else:
            texts = [text for text, _ in item.segments]
            tuples = isinstance(item.segments, tuple)
        assert tuples, f"{_name(format)} gives messages or segments that are no tuple"
        wrong = [text for text in texts if not isinstance(text, str)]
        assert not wrong, f"{_name(format)} gives {wrong[0]!r} as a text"


def check_purity(format: DataFormat, other: DataFormat, rows: Sequence[Row]) -> None:
    """The same rows give the same result: twice, and from another instance; the rows stay as they are."""
    before = deepcopy(list(rows))
    first = convert(format, rows)
    assert list(rows) == before, f"{_name(format)} changes the rows that it converts"
    assert convert(format, rows) == first, (
        f"{_name(format)} makes something else of the same rows the second time"
    )
    assert convert(other, rows) == first, f"another {_name(format)} makes something else of the same rows"
    if type(format).gather is DataFormat.gather:
        alone = [item for row in reversed(rows) for item in reversed(convert(format, [row]))]
        assert alone[::-1] == first, f"what {_name(format)} makes of a row depends on the rows before it"


def check_detection(format: DataFormat, rows: Sequence[Row]) -> None:
    """`matches` and `fits` give a bool for any columns and any row."""
    for row in (*rows, *_ODD_ROWS):
        for asked, answer in (
            ("matches", format.matches(frozenset(row))),
            ("fits", format.fits(row)),
        ):
            assert isinstance(answer, bool), (
                f"{_name(format)}.{asked} answers {answer!r} for the columns {sorted(row)}, not True or False"
            )


def check_bad_rows(format: DataFormat, rows: Sequence[Row]) -> None:
    """Each row is refused with an SFTError that says where in the row, or names a column in quotes."""
    for row in rows:
        error = _refusal(format, row)
        assert error is not None, f"{_name(format)} accepts the bad row {_short(row)}"
        assert error.where or re.search("[\"'`]", error.what), (
            f"{_name(format)} refuses the row {_short(row)} and names no key: raise SFTError(…, where=\"key '…'\")"
        )


def check_odd_rows(format: DataFormat, rows: Sequence[Row]) -> None:
    """Rows with a column missing or of another type are converted, or refused with SFTError, and nothing else."""
    for row in (*_ODD_ROWS, *_spoilt(rows)):
        _refusal(format, row)


def check_writing(format: DataFormat, rows: Sequence[Row]) -> None:
    """What `to_row` writes is JSON, and `convert` reads it as what it was."""
    for item in convert(format, rows):
        try:
            row = format.to_row(item)
        except SFTError:
            continue  # the format has no place for something in it, and says so
        read = convert(format, [json.loads(json.dumps(row))])
        assert len(read) == 1, (
            f"{_name(format)} reads {len(read)} conversations of one that it wrote: {_short(row)}"
        )
        back = read[0]
        assert replace(back, meta=item.meta) == item, (
            f"{_name(format)} writes {_short(row)}, and reads something else than what it wrote: {back}"
        )


def _refusal(format: DataFormat, row: Row) -> SFTError | None:
    try:
        convert(format, [row])
    except SFTError as error:
        return error
    except Exception as error:
        raise AssertionError(
            f"{_name(format)} fails with {type(error).__name__}: {error} on the row {_short(row)}; "
            "a row that it can't convert has to raise SFTError"
        ) from error
    return None


def _spoilt(rows: Sequence[Row]) -> Iterator[Row]:
    """The rows with each column left out, and with an odd value in its place."""
    for row in rows:
        for column in row:
            rest: Mapping[str, object] = {key: value for key, value in row.items() if key != column}
            yield rest
            yield from ({**row, column: value} for value in _ODD_VALUES)


def _name(format: DataFormat) -> str:
    return type(format).__name__


def _short(row: Mapping[str, object]) -> str:
    text = repr(dict(row))
    return text if len(text) <= 300 else f"{text[:300]}…"
