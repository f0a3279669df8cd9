"""Anthropic's Messages API: requests become chats, and the pieces of an answer become content blocks and events."""
