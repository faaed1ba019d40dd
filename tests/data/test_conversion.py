import pytest

from lightning_sft import Conversation, DataFormat, Message, Meta, Segments, SFTError, Source
from lightning_sft.data.conversion import convert_rows, detect_format, format_of


class OneColumn(DataFormat):
    """A format that knows its rows by one column."""

    def __init__(self, column):
        self.column = column

    def matches(self, columns):
        return self.column in columns

    def convert(self, row):
        return [
            Segments(((str(row[self.column]), 1.0),), Meta(source="own", row=-1, task="t", language="de"))
        ]


FORMATS = {"First": OneColumn("a"), "Second": OneColumn("b")}


class TestDetection:
    def test_the_one_format_that_matches_is_taken(self):
        assert detect_format(dict.fromkeys("bx"), FORMATS, "file") is FORMATS["Second"]

    def test_no_match_lists_columns_and_formats(self):
        with pytest.raises(SFTError, match="no format fits the columns 'x', 'y'") as error:
            detect_format(dict.fromkeys("yx"), FORMATS, "file")
        assert error.value.where == "file"
        assert "First, Second" in error.value.fix

    def test_several_matches_are_ambiguous(self):
        with pytest.raises(SFTError, match=r"ambiguous.*First and Second") as error:
            detect_format(dict.fromkeys("ab"), FORMATS, "file")
        assert error.value.where == "file"
        assert "`format: First`" in error.value.fix


PLACED_ROWS = [(Meta("file", 7), {"a": "x"}), (Meta("file", 9), {"a": "y"})]


class TestConversion:
    def convert(self, convert):
        format = OneColumn("a")
        format.convert = convert
        return list(convert_rows(PLACED_ROWS, format, "format OneColumn (some-dist 1.2)"))

    def test_conversations_get_the_place_and_keep_task_and_language(self):
        items = list(convert_rows(PLACED_ROWS, OneColumn("a"), "format OneColumn"))
        assert [item.meta for item in items] == [Meta("file", 7, "t", "de"), Meta("file", 9, "t", "de")]
        assert items[0].segments == (("x", 1.0),)

    def test_a_row_may_give_several_conversations_or_none(self):
        several = [Conversation((Message("user", "u"),))] * 2
        items = self.convert(lambda row: several if row["a"] == "y" else [])
        assert [item.meta.row for item in items] == [9, 9]

    def test_a_refused_row_is_placed(self):
        def refuse(row):
            raise SFTError("the response is empty", where="key 'a'", fix="fill it in")

        with pytest.raises(SFTError) as error:
            self.convert(refuse)
        assert str(error.value) == "file, row 7, key 'a': the response is empty\n  → fill it in"

    def test_a_format_that_crashes_is_named_with_the_row(self):
        with pytest.raises(SFTError) as error:
            self.convert(lambda row: [row["missing"]])
        assert error.value.where == "file, row 7"
        assert error.value.what == "format OneColumn (some-dist 1.2) failed: KeyError: 'missing'"
        assert isinstance(error.value.__cause__, KeyError)

    def test_a_crash_while_iterating_is_caught_as_well(self):
        def convert(row):
            yield Segments((("fine", 1.0),))
            raise ZeroDivisionError("oh")

        with pytest.raises(SFTError, match="ZeroDivisionError: oh"):
            self.convert(convert)

    @pytest.mark.parametrize("result", [None, [{"role": "user"}]])
    def test_a_format_that_gives_something_else_is_named(self, result):
        with pytest.raises(SFTError, match=r"some-dist 1\.2") as error:
            self.convert(lambda row: result)
        assert error.value.where == "file, row 7"


class Pairs(OneColumn):
    """A format whose conversations are over two rows each."""

    def gather(self, rows):
        rows = list(rows)
        for (meta, first), (_, second) in zip(rows[::2], rows[1::2], strict=True):
            yield meta, {"a": first["a"] + second["a"]}


LETTERS = [(Meta("file", n), {"a": letter}) for n, letter in enumerate("wxyz", 1)]


class TestFormatOf:
    def test_a_format_may_gather_rows_and_each_has_the_place_of_its_first(self):
        format, rows = format_of(Source("file", Pairs("a")), iter(LETTERS))
        items = list(convert_rows(rows, format, "format Pairs"))
        assert [(item.meta.row, item.segments[0][0]) for item in items] == [(1, "wx"), (3, "yz")]

    def test_a_format_that_fails_to_gather_is_named(self):
        _, rows = format_of(Source("file", Pairs("a")), iter(LETTERS[:3]))
        with pytest.raises(SFTError, match=r"test_conversion\.Pairs failed: ValueError") as error:
            list(rows)
        assert error.value.where == "file"

    def test_rows_that_a_format_refuses_to_gather_are_its_own_error(self):
        class Refusing(Pairs):
            def gather(self, rows):
                raise SFTError("no pair", where="file, row 3")
                yield

        _, rows = format_of(Source("file", Refusing("a")), iter(LETTERS))
        with pytest.raises(SFTError, match="no pair"):
            list(rows)

    def test_without_gathering_rows_are_streamed_as_they_are(self):
        rows = iter(LETTERS)
        assert format_of(Source("file", OneColumn("a")), rows)[1] is rows

    def test_auto_keeps_the_first_row(self):
        placed = [(Meta("file", n), {"text": str(n)}) for n in range(3)]
        format, rows = format_of(Source("file"), iter(placed))
        assert type(format).__name__ == "RawText"
        assert list(rows) == placed


def test_formats_of_the_same_columns_are_told_apart_by_the_row():
    class Short(OneColumn):
        def fits(self, row):
            return super().fits(row) and len(row["a"]) < 3

    class Long(OneColumn):
        def fits(self, row):
            return super().fits(row) and len(row["a"]) >= 3

    formats = {"Short": Short("a"), "Long": Long("a")}
    assert detect_format({"a": "xx"}, formats, "file") is formats["Short"]
    assert detect_format({"a": "xxx"}, formats, "file") is formats["Long"]
    with pytest.raises(SFTError, match="Short failed to look at the columns: TypeError"):
        detect_format({"a": 1}, formats, "file")


def test_a_format_that_does_not_say_how_can_not_be_written():
    with pytest.raises(SFTError, match="can't be written in the format OneColumn"):
        OneColumn("a").to_row(Segments((("x", 1.0),)))
