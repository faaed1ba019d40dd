"""OASST: trees of messages, as OpenAssistant exports them; each path from the root is a conversation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from lightning_sft import Conversation, DataFormat, Message, Meta, Row, SFTError
from lightning_sft_formats.fields import (
    is_blank,
    read_filled,
    read_list,
    read_name,
    read_object,
    read_role,
    read_text,
)

Node = Mapping[str, object]
"""A message with its `replies`."""

ROLES = {"prompter": "user", "assistant": "assistant"}

FLAT = frozenset({"message_id", "parent_id", "text", "role"})
"""Columns of files that have a message per row."""

KEPT = ("message_id", "text", "role", "lang", "rank", "deleted", "synthetic", "review_result")
"""The keys of a message that are looked at."""


class OASST(DataFormat):
    """Trees of messages and replies, a tree or a message per row; the paths from a root are conversations.

    A path ends at the last answer on it. Paths of a tree share their beginnings: there an answer is trained in the
    first path alone, the one through the best ranked replies, and has weight 0 in the others. Messages that
    were deleted, failed the review or (unless asked for) were written by a model are left out, with all replies to
    them.

    Args:
        languages: Only messages in these languages (`lang`, such as en); None is all.
        top_k: Only the answers of rank 0 to `top_k` − 1 among those to the same message; an answer without a rank
            only if it is the only one. None is all.
        min_depth: Fewest messages of a path.
        max_depth: Most messages of a path, longer ones are cut; None is no limit.
        synthetic: Keep messages that were written by a model.
    """

    def __init__(
        self,
        languages: list[str] | None = None,
        top_k: int | None = None,
        min_depth: int = 2,
        max_depth: int | None = None,
        synthetic: bool = False,
    ) -> None:
        for name, value, least in (
            ("top_k", top_k, 1),
            ("min_depth", min_depth, 1),
            ("max_depth", max_depth, 2),
        ):
            if value is not None and value < least:
                raise SFTError(f"{name} is {value}", where=name, fix=f"give {least} or more")
        self.languages = languages
        self.top_k = top_k
        self.min_depth = min_depth
        self.max_depth = max_depth
        self.synthetic = synthetic

    def matches(self, columns: frozenset[str]) -> bool:
        """Whether these are the columns of messages or of trees."""
        return columns >= FLAT or {"message_tree_id", "prompt"} <= columns

    def gather(self, rows: Iterable[tuple[Meta, Row]]) -> Iterator[tuple[Meta, Row]]:
        """The trees: as they stand, or put together of rows that are a message each, in the roots' order.

        Raises:
            SFTError: A message has no id, the id of another one, or a parent that isn't in the source.
        """
        messages: dict[str, tuple[Meta, object, dict[str, object]]] = {}
        for meta, row in rows:
            if "prompt" in row or "message_id" not in row:
                yield meta, row
                continue
            name = read_filled(row["message_id"], f"{meta}, key 'message_id'", "message's id")
            if name in messages:
                raise SFTError(
                    f"the message {name!r} is there twice", where=f"{messages[name][0]} and {meta}"
                )
            node: dict[str, object] = {key: row[key] for key in KEPT if key in row}
            messages[name] = meta, row.get("parent_id"), node | {"replies": []}
        yield from _trees(messages)

    def convert(self, row: Row) -> Iterable[Conversation]:
        """A conversation for each path, from the best ranked to the worst; none if no answer is kept."""
        if "prompt" not in row:
            raise SFTError(
                "the row is neither a message, with a message_id, nor a tree, with a prompt",
                fix=f"its columns are {', '.join(map(repr, row))}; name the format that has them",
            )
        root = read_object(row["prompt"], "key 'prompt'")
        if _role(root) != "user":
            raise SFTError("the tree doesn't begin with a prompter's message", where=_place(root))
        trained: set[int] = set()
        for path in self._paths(root):
            yield Conversation(
                tuple(_message(node, repeated=id(node) in trained) for node in path),
                meta=Meta(language=read_name(path[-1], "lang")),
            )
            trained.update(map(id, path))

    def _paths(self, root: Node) -> Iterator[tuple[Node, ...]]:
        """The paths from the root to a last answer, depth first, through the best ranked replies first."""
        stack: list[tuple[Node, ...]] = [(root,)] if self._keeps(root) else []
        while stack:
            path = stack.pop()
            if followers := self._followers(path):
                stack.extend((*path, reply) for reply in reversed(followers))
            elif len(path) >= self.min_depth and _role(path[-1]) == "assistant":
                yield path

    def _followers(self, path: tuple[Node, ...]) -> list[Node]:
        """The replies with which the path goes on: answers, or messages that have an answer in their turn."""
        if self.max_depth is not None and len(path) >= self.max_depth:
            return []
        node, asked = path[-1], _role(path[-1]) == "user"
        replies = [reply for reply in _replies(node) if self._keeps(reply)]
        if not asked:
            return [reply for reply in replies if self._followers((*path, reply))]
        if self.top_k is not None:
            alone = len(_replies(node)) == 1
            replies = [reply for reply in replies if self._is_top(_rank(reply), self.top_k, alone)]
        return replies

    @staticmethod
    def _is_top(rank: float | None, top_k: int, alone: bool) -> bool:
        return alone if rank is None else rank < top_k

    def _keeps(self, node: Node) -> bool:
        refused = node.get("deleted") is True or node.get("review_result") is False
        written = self.synthetic or node.get("synthetic") is not True
        spoken = self.languages is None or node.get("lang") in self.languages
        return written and spoken and not refused


def _trees(messages: Mapping[str, tuple[Meta, object, dict[str, object]]]) -> Iterator[tuple[Meta, Row]]:
    """The trees of messages, which are given by id with their place and their parent's id."""
    roots: list[tuple[Meta, Node]] = []
    for meta, parent, node in messages.values():
        if is_blank(parent):
            roots.append((meta, node))
            continue
        if not isinstance(parent, str) or parent not in messages:
            raise SFTError(
                f"the parent {parent!r} of the message is not in the source",
                where=f"{meta}, key 'parent_id'",
                fix="give whole trees: the format's options choose languages, ranks and depths",
            )
        replies = messages[parent][2]["replies"]
        assert isinstance(replies, list)
        replies.append(node)
    reached, todo = 0, [node for _, node in roots]
    while todo:
        reached += 1
        todo.extend(_replies(todo.pop()))
    if reached < len(messages):
        raise SFTError(f"{len(messages) - reached} messages are replies to one another in a circle")
    for meta, root in roots:
        yield meta, {"prompt": root}


def _message(node: Node, *, repeated: bool) -> Message:
    role, where = _role(node), f"{_place(node)}, key 'text'"
    if role == "user":
        return Message(role, read_text(node.get("text"), where))
    return Message(role, read_filled(node.get("text"), where), weight=0.0 if repeated else None)


def _replies(node: Node) -> list[Node]:
    """The node's replies: those with a rank first, the best before the others."""
    values = read_list(node.get("replies") or [], f"{_place(node)}, key 'replies'")
    replies = [read_object(value, f"{_place(node)}, reply {n}") for n, value in enumerate(values, 1)]
    for reply in replies:
        if _role(reply) == _role(node):
            raise SFTError(
                f"a reply is of the same role as what it replies to: {_role(node)}", where=_place(reply)
            )
    return sorted(replies, key=_order)


def _order(node: Node) -> float:
    rank = _rank(node)
    return float("inf") if rank is None else rank


def _rank(node: Node) -> float | None:
    rank = node.get("rank")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int | float)):
        raise SFTError(f"the rank is {rank!r}, not a number", where=_place(node))
    return rank


def _role(node: Node) -> str:
    return read_role(node.get("role"), ROLES, f"{_place(node)}, key 'role'")


def _place(node: Node) -> str:
    return f"message {node.get('message_id')!r}"
