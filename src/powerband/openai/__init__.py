"""The OpenAI API as it goes over the wire: server-sent events, chunks, errors, and fields that any server may send."""
