"""llama.cpp's own converter, for a checkpoint whose tokenizer it cannot know.

    python gguf_script.py LLAMA_CPP_SOURCES CHECKPOINT OUT

The converter recognises a tokenizer by the hash of what it makes of a text, and refuses all others. Here prompts are
token ids, so any byte-level BPE does.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path


def main() -> None:
    sources, checkpoint, out = sys.argv[1:]
    sys.path[:0] = [sources, str(Path(sources, "gguf-py"))]
    from conversion import get_model_class  # type: ignore[import-not-found]  # from llama.cpp's sources
    from conversion.base import TextModel  # type: ignore[import-not-found]  # likewise

    architecture = json.loads(Path(checkpoint, "config.json").read_text())["architectures"][0]
    TextModel.get_vocab_base_pre = lambda _self, _tokenizer: "qwen2"
    get_model_class(architecture).set_vocab = TextModel._set_vocab_gpt2
    script = str(Path(sources, "convert_hf_to_gguf.py"))
    sys.argv = [script, checkpoint, "--outtype", "bf16", "--outfile", out]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
