"""The OpenAI API's wire format: server-sent events, chunks, errors, and fields, as any server may send them."""
