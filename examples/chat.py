"""Stream a chat completion from a Powerband server, with the standard library only. OpenAI's client works as well.

powerband serve demo                # in one terminal
python examples/chat.py "What is a list in Python?"
"""

import argparse
import json
import urllib.request
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="What does os.path.join do?")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--max-tokens", type=int, default=64)
    arguments = parser.parse_args()

    with urllib.request.urlopen(f"{arguments.url}/v1/models") as answer:
        model = json.load(answer)["data"][0]["id"]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": arguments.prompt}],
        "max_tokens": arguments.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    print(f"user       {arguments.prompt}\nassistant  ", end="")
    for chunk in events(f"{arguments.url}/v1/chat/completions", body):
        if chunk["choices"]:
            print(chunk["choices"][0]["delta"].get("content") or "", end="", flush=True)
        elif usage := chunk.get("usage"):
            print(f"\n({usage['prompt_tokens']} prompt tokens, {usage['completion_tokens']} output tokens)")


def events(url: str, body: dict[str, Any]) -> Any:
    """The chunks of a stream: JSON in lines that begin with 'data:', until [DONE]."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as stream:
        for line in stream:
            data = line.removeprefix(b"data:").strip()
            if line.startswith(b"data:") and data != b"[DONE]":
                yield json.loads(data)


if __name__ == "__main__":
    main()
