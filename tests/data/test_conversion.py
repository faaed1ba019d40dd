import pytest

from lightning_sft import Conversation, DataFormat, Message, Meta, Segments, SFTError
from lightning_sft.data.conversion import convert_rows, detect_format


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
