import pytest

from lightning_sft import Conversation, Message, SFTError
from lightning_sft_formats.alpaca import Alpaca


def convert(row, **options):
    (conversation,) = Alpaca(**options).convert(row)
    assert isinstance(conversation, Conversation)
    return conversation.messages


def test_the_instruction_is_the_users_turn_and_the_output_the_assistants():
    row = {"instruction": "Add.", "input": "", "output": "Done. "}
    assert convert(row) == (Message("user", "Add."), Message("assistant", "Done. "))


def test_a_filled_input_follows_after_a_blank_line():
    row = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
    assert convert(row)[0] == Message("user", "Add.\n\n1 + 1")


@pytest.mark.parametrize("blank", [None, "", " \n"])
def test_a_blank_input_adds_nothing(blank):
    assert convert({"instruction": "Add.", "input": blank, "output": "2"})[0].content == "Add."


def test_the_input_column_may_be_absent():
    assert convert({"instruction": "Add.", "output": "2"})[0].content == "Add."


def test_an_input_alone_is_the_users_turn():
    assert convert({"instruction": "", "input": "1 + 1", "output": "2"})[0].content == "1 + 1"


def test_the_system_prompt_comes_first_unless_it_is_blank():
    row = {"instruction": "Hi", "output": "Ho", "system": "Be kind."}
    assert convert(row)[0] == Message("system", "Be kind.")
    assert [m.role for m in convert(row | {"system": ""})] == ["user", "assistant"]


@pytest.mark.parametrize("history", [[["a", "b"], ["c", "d"]], '[["a", "b"], ["c", "d"]]'])
def test_the_history_stands_between_the_system_prompt_and_the_instruction(history):
    messages = convert({"instruction": "e", "output": "f", "system": "s", "history": history})
    assert [m.content for m in messages] == ["s", "a", "b", "c", "d", "e", "f"]
    assert [m.role for m in messages] == ["system", *["user", "assistant"] * 3]


@pytest.mark.parametrize("history", [None, [], ""])
def test_an_empty_history_adds_nothing(history):
    assert len(convert({"instruction": "e", "output": "f", "history": history})) == 2


@pytest.mark.parametrize("history", [[["only one"]], [["a", "b", "c"]], ["a"], {"a": "b"}])
def test_a_history_that_is_not_a_list_of_pairs_is_refused(history):
    with pytest.raises(SFTError, match=r"pair|list") as error:
        convert({"instruction": "e", "output": "f", "history": history})
    assert "key 'history'" in str(error.value)


def test_an_empty_response_in_the_history_is_refused():
    with pytest.raises(SFTError, match="the response is empty") as error:
        convert({"instruction": "e", "output": "f", "history": [["a", ""]]})
    assert error.value.where == "key 'history', turn 1"


@pytest.mark.parametrize("output", [None, "", " \n\t"])
def test_an_empty_response_is_refused_with_its_key(output):
    with pytest.raises(SFTError) as error:
        convert({"instruction": "Add.", "output": output})
    assert error.value.what == "the response is empty"
    assert error.value.where == "key 'output'"
    assert error.value.fix


def test_an_empty_instruction_is_refused():
    with pytest.raises(SFTError, match="the instruction is empty") as error:
        convert({"instruction": " ", "input": "", "output": "2"})
    assert error.value.where == "key 'instruction'"


def test_a_missing_column_is_named_with_the_columns_that_are_there():
    with pytest.raises(SFTError, match="'output' is missing") as error:
        convert({"instruction": "Add.", "response": "2"})
    assert "'instruction', 'response'" in str(error.value)
    assert "`output`" in str(error.value)


def test_a_response_that_is_not_text_is_refused():
    with pytest.raises(SFTError, match="expected text") as error:
        convert({"instruction": "Add.", "output": 2})
    assert error.value.where == "key 'output'"


def test_the_options_name_the_columns():
    row = {"q": "Why?", "context": "C", "a": "So."}
    messages = convert(row, instruction="q", input="context", output="a")
    assert [m.content for m in messages] == ["Why?\n\nC", "So."]


def test_it_matches_files_with_its_two_columns():
    assert Alpaca().matches(frozenset({"instruction", "output", "extra"}))
    assert not Alpaca().matches(frozenset({"instruction", "response"}))
    assert Alpaca(output="response").matches(frozenset({"instruction", "response"}))
