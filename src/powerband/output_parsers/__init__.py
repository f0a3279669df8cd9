"""What an output means: text, reasoning and tool calls, found while it grows; and grammars for tool calls."""
