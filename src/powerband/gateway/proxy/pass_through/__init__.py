"""Endpoints that replicas of other engines offer and the gateway passes through: OpenAI's Responses API and embeddings,
Anthropic's Messages API, reranking, scoring, pooling and classification.

The gateway checks keys and limits, queues, routes, retries and accounts for these requests as for chats, but reads only
what it needs: the prompt's size, the output limit, the usage and the model's name. A stream that breaks off after its
first event cannot be resumed elsewhere; it ends with an error event of its API.
"""
