"""A tokenizer of single bytes and of the tags of all formats, and outputs that a grammar lets it write by chance."""

from __future__ import annotations

import random

from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from powerband.output_parsers.formats import REASONING_FORMATS, TOOL_FORMATS, OutputFormat
from powerband.text.pieces import _BYTE_OF

TAGS = sorted(
    {tag for name in TOOL_FORMATS for tag in OutputFormat(name).tags}
    | {tag for name in REASONING_FORMATS for tag in OutputFormat("", name).tags if tag.count("|") < 3}
)
END = "<|endoftext|>"


def byte_tokenizer() -> Tokenizer:
    alphabet = {byte: char for char, byte in _BYTE_OF.items()}
    made = Tokenizer(models.BPE({alphabet[byte]: byte for byte in range(256)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_tokens([AddedToken(END, special=True)])
    made.add_tokens([AddedToken(tag, special="think" not in tag and "tool_call>" not in tag) for tag in TAGS])
    return made


TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.token_to_id(END)
GRAMMAR_TOKENS = LLTokenizer(TOKENIZER.to_str(), eos_token=EOS)


def written(grammar: str, seed: int, max_tokens: int = 600) -> str | None:
    """An output that the grammar allows, token by token by chance; None: it is not complete after so many tokens."""
    draw = random.Random(seed)
    matcher = LLMatcher(GRAMMAR_TOKENS, grammar)
    assert not matcher.is_error(), matcher.get_error()
    ids: list[int] = []
    for _ in range(max_tokens):
        mask = matcher.compute_bitmask()
        allowed = [id for id in range(TOKENIZER.get_vocab_size()) if mask[id // 8] >> (id % 8) & 1]
        assert allowed, TOKENIZER.decode(ids)
        if EOS in allowed and (len(allowed) == 1 or draw.random() < 0.3):
            return TOKENIZER.decode(ids, skip_special_tokens=False)
        # Closing brackets and quotes, or a tag: or most outputs would never end, nor hold a call.
        closing = [id for id in allowed if id != EOS and (id >= 256 or chr(id) in '"}])')]
        id = draw.choice(closing if closing and draw.random() < 0.3 else [i for i in allowed if i != EOS])
        assert matcher.consume_token(id)
        ids.append(id)
    return None
