"""OpenAI's Responses API: requests become chats, and the pieces of a chat's answer become output items and events."""
