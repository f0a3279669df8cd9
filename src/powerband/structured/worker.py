"""The process that reads and compiles strangers' grammars: `python -m powerband.structured.worker`.

A grammar can take seconds and gigabytes to compile, and one that is nested deeply enough ends the process that compiles
it. So it is compiled here first, in a process that is limited by the kernel and can be killed. The engine compiles what
was compiled here, and gets only grammars that have passed.
"""

from __future__ import annotations

import resource
import sys
from typing import Any

from llguidance import LLTokenizer

from powerband.core.structured_outputs import StructuredOutputsParams
from powerband.errors import PowerbandError
from powerband.structured.specification import grammar_of
from powerband.structured.tokens import grammar_tokens
from powerband.worker_loop import answer_requests, limit_this_process, read_message, to_message


def _answer(tokens: LLTokenizer, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"grammar": grammar_of(StructuredOutputsParams(**request["outputs"]), tokens, request["places"])}
    except PowerbandError as error:
        return {"error": error.message, "kind": "refused", "hint": error.hint, "param": error.param, "code": error.code}
    except (MemoryError, RecursionError):
        return {"error": "it takes more memory than a grammar may", "kind": "limit"}
    except Exception as error:  # the library raises more than it documents
        return {"error": f"it cannot be read ({type(error).__name__}: {str(error)[:200]})", "kind": "limit"}


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def main() -> None:
    """Take the tokenizer, then answer requests until stdin closes, within the bounds that the arguments give."""
    memory_bytes, limit_s = int(sys.argv[1]), float(sys.argv[2])
    first = read_message(sys.stdin.buffer)
    try:
        tokens = grammar_tokens(first["tokenizer"], first["vocab_size"], first["eos_token_ids"])
    except PowerbandError as error:
        ready: dict[str, Any] = {"error": error.message, "kind": "refused"}
    else:
        ready = {"ready": True}
        limit_this_process(_address_space() + memory_bytes)
    sys.stdout.buffer.write(to_message(ready))
    sys.stdout.buffer.flush()
    if "ready" in ready:
        answer_requests(lambda request: _answer(tokens, request), limit_s)


if __name__ == "__main__":
    main()
