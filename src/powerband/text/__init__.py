"""Tokens and text: the tokenizer, incremental detokenization, and the chat template in a bounded sandbox."""
