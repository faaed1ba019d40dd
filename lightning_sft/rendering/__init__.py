"""Where the loss mask is made: a conversation becomes token ids with a weight and a reason for each.

The law: what is trained in a turn is what the model has to produce at inference, from the end of the
generation prompt through the end-of-turn token, and nothing else.

1. `template`: the conversation is rendered once, as inference would see it.
2. `locate`: a second rendering, in which every piece of the messages' text is wrapped in sentinels, tells where
   each piece lies. It counts only if it equals the first rendering once the sentinels are taken out again.
3. `layout`: a trained turn begins where the generation prompt ends (the history rendered with
   `add_generation_prompt=True`) and ends after its end-of-turn token; the policies say which turns are
   trained, and how much.
4. `encode`: the text is encoded once, and the fast tokenizer's offsets map characters to tokens (`slow_offsets` for
   a tokenizer that has none).

A conversation for which one of these proofs fails is refused with the row's place; nothing is guessed.
"""

from lightning_sft.rendering.policies import RenderPolicies
from lightning_sft.rendering.renderer import Renderer

__all__ = ["RenderPolicies", "Renderer"]
