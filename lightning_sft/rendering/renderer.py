"""The renderer: conversations in, examples out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

from lightning_sft import chat_templates
from lightning_sft.conversation import Conversation, Message, Segments
from lightning_sft.errors import SFTError
from lightning_sft.example import Example, Reason
from lightning_sft.rendering.encode import Encoder, Rendering
from lightning_sft.rendering.layout import Layout, Part, Span, conversation_parts, part_layout
from lightning_sft.rendering.policies import RenderPolicies, checked_weight
from lightning_sft.rendering.template import Template, as_chat_message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Renderer:
    """Renders conversations for one tokenizer and chat template.

    Args:
        tokenizer: A fast tokenizer; a slow one works too, if its texts decode to what they were.
        chat_template: A Jinja file, the name of a shipped template, or None for the tokenizer's own
            (`plain` for a tokenizer without one).
        chat_template_kwargs: What the template is given besides the messages, such as `enable_thinking`.
        policies: The fields of `RenderPolicies`, by name.

    Raises:
        SFTError: The template can't be found or read or doesn't take the
            options, or a policy has a value that doesn't exist.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
        **policies: Any,
    ) -> None:
        self.tokenizer = tokenizer
        self.policies = RenderPolicies(**policies)
        text = chat_templates.resolve(chat_template, tokenizer)
        self.template = Template(tokenizer, text, chat_template_kwargs, chat_template)
        self._encoder = Encoder(tokenizer)

    @property
    def chat_template(self) -> str:
        """The chat template's text, with `chat_template_kwargs` as defaults."""
        return self.template.text_with_options

    def render(self, conversation: Conversation | Segments) -> Example | list[Example]:
        """The example of one conversation: an `Example`; with `split_turns`, a list of them.

        Raises:
            SFTError: It can't be rendered exactly, or no token of it would be trained; says where and why.
        """
        (examples,) = self.render_each([conversation])
        return examples if self.policies.split_turns else examples[0]

    def render_all(self, conversations: Iterable[Conversation | Segments]) -> list[Example]:
        """The examples of many conversations in one list, encoded in one batch; raises as `render` does."""
        return list(chain.from_iterable(self.render_each(conversations)))

    def render_each(self, conversations: Iterable[Conversation | Segments]) -> list[list[Example]]:
        """The examples of each conversation (several with `split_turns`); raises as `render` does."""
        return [[rendering.example for rendering in each] for each in self.explain(conversations)]

    def explain(self, conversations: Iterable[Conversation | Segments]) -> Iterator[list[Rendering]]:
        """The examples of each conversation with the text and spans that they come from; raises as `render`."""
        layouts = [self._layouts(conversation) for conversation in conversations]
        renderings = iter(self._encoder.encode(list(chain.from_iterable(layouts))))
        return ([next(renderings) for _ in each] for each in layouts)

    def explain_part(self, conversation: Conversation, part: Part) -> Rendering:
        """The example of some of a conversation's messages; raises as `render`."""
        (rendering,) = self._encoder.encode(self._layouts(conversation, part))
        return rendering

    def generation_prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, object]] = (),
        options: Mapping[str, object] | None = None,
    ) -> str:
        """The text that inference gives the model before it answers; `options` count before the template's own."""
        return self.template.with_options(options or {}).render(
            [as_chat_message(message) for message in messages], tools, generation_prompt=True
        )

    @property
    def stop_token(self) -> str:
        """The token that ends an assistant turn in this template: the first added token after its content.

        Raises:
            SFTError: The template ends a turn with no token at all, so the model could never learn to stop.
        """
        return self.template.stop_token

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The ids that generation should stop on: the template's ends of turn, where it has any, and EOS."""
        names = [*self.template.known_stops, self.tokenizer.eos_token]
        return tuple(dict.fromkeys(int(self.tokenizer.convert_tokens_to_ids(name)) for name in names))

    def _layouts(self, conversation: Conversation | Segments, part: Part | None = None) -> list[Layout]:
        try:
            if isinstance(conversation, Segments):
                layouts = [self._segments_layout(conversation)]
            else:
                template = self.template.with_options(conversation.chat_template_kwargs)
                parts = conversation_parts(self.policies, conversation) if part is None else [part]
                layouts = [part_layout(template, self.policies, conversation, each) for each in parts]
            for layout in layouts:
                layout.text.encode()
            return layouts
        except SFTError as error:
            raise error.at(str(conversation.meta)) from None
        except UnicodeEncodeError as error:
            raise SFTError(
                f"the text holds half a character: {error}", where=str(conversation.meta)
            ) from None

    def _segments_layout(self, segments: Segments) -> Layout:
        text, weight, spans = "", 0.0, []
        reason = Reason.ZERO_WEIGHT
        for number, (piece, given) in enumerate(segments.segments):
            weight = checked_weight(given, f"segment {number + 1}")
            reason = Reason.TRAINED if weight > 0 else Reason.ZERO_WEIGHT
            spans.append(Span(len(text), len(text) + len(piece), weight, reason, number))
            text += piece
        # The EOS token, as trained as the last segment.
        spans.append(Span(len(text), len(text) + 1, weight, reason, len(segments.segments) - 1))
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token
        adds_bos = self.template.tokenizer_adds_bos and not text.startswith(bos)
        adds_eos = eos is not None and not text.endswith(eos)
        return Layout(
            text=text,
            spans=tuple(spans),
            meta=segments.meta,
            prefix=(self.tokenizer.bos_token_id,) if adds_bos else (),
            suffix=(self.tokenizer.eos_token_id,) if adds_eos else (),
        )
