"""Self-Instruct: tasks with an instruction and several instances."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_sft import Conversation, DataFormat, Meta, Row, SFTError
from lightning_sft_formats.fields import read_column, read_list, read_name, read_object, read_turns


class SelfInstruct(DataFormat):
    """Seed tasks: an instruction and a list of instances, each with an input that may be empty and an output.

    Every instance is a conversation: the instruction, then a blank line and the input if there is one.

    Args:
        instruction: The column that holds the instruction.
        instances: The column that holds the list of objects with `input` and `output`.
        name: The column that holds the task's name; may be absent.
    """

    def __init__(
        self, instruction: str = "instruction", instances: str = "instances", name: str = "name"
    ) -> None:
        self.instruction = instruction
        self.instances = instances
        self.name = name

    def matches(self, columns: frozenset[str]) -> bool:
        """Whether the instruction and the instances are there."""
        return {self.instruction, self.instances} <= columns

    def convert(self, row: Row) -> Iterable[Conversation]:
        """One conversation for each instance."""
        instruction = read_column(row, self.instruction, "instruction")
        where = f"key {self.instances!r}"
        instances = read_list(read_column(row, self.instances, "instances"), where)
        if not instances:
            raise SFTError("the task has no instances", where=where, fix="remove the row or add one")
        meta = Meta(task=read_name(row, self.name))
        return [
            self._conversation(instruction, instance, f"{where}, instance {number}", meta)
            for number, instance in enumerate(instances, 1)
        ]

    def _conversation(self, instruction: object, value: object, where: str, meta: Meta) -> Conversation:
        instance = read_object(value, where)
        try:
            prompt = [(self.instruction, instruction), ("input", instance.get("input"))]
            return Conversation(read_turns(prompt, "output", instance.get("output")), meta=meta)
        except SFTError as error:
            raise error.at(where) from error
