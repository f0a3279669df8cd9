"""Texts embedded per second, beside sentence-transformers, in turns: python benchmarks/embeddings.py MODEL"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dogs",
    "while",
    "readers",
    "enjoy",
    "short",
    "sentences",
]


def texts(count: int) -> list[str]:
    """Random sentences of 6 to 19 words."""
    random = np.random.default_rng(0)
    return [" ".join(random.choice(WORDS, random.integers(6, 20))) for _ in range(count)]


def per_second(run: Callable[[], Any], count: int) -> float:
    start_s = time.perf_counter()
    run()
    return count / (time.perf_counter() - start_s)


def main() -> None:
    import torch
    from sentence_transformers import SentenceTransformer

    from powerband import LLM

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of a sentence-transformers checkpoint")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    asked = texts(args.texts)
    torch.set_num_threads(args.threads)
    theirs = SentenceTransformer(args.model, device="cpu", model_kwargs={"dtype": getattr(torch, args.dtype)})
    with LLM(args.model, device="cpu", threads=args.threads, dtype=args.dtype, enable_prefix_caching=False) as ours:

        def encode() -> Any:
            return theirs.encode(asked, batch_size=32, show_progress_bar=False)

        def embed() -> Any:
            return np.array([result.outputs.embedding for result in ours.embed(asked, use_tqdm=False)])

        print(f"largest difference  {np.abs(encode() - embed()).max():.1e}")
        rates = [(per_second(encode, args.texts), per_second(embed, args.texts)) for _ in range(args.rounds)]
    for other, own in rates:
        print(f"sentence-transformers {other:7.0f}/s   powerband {own:7.0f}/s   {own / other:.2f}x")
    print(f"median ratio {statistics.median(own / other for other, own in rates):.2f}x")


if __name__ == "__main__":
    main()
