"""What structured output costs: time per output token with a schema and without, and the delay of a new schema.

    python benchmarks/structured.py [--layers 24 --hidden 896] [--rounds 5]

Steps are measured in one engine with random weights in the shape of a small model, with a vocabulary trained on
Python's standard library: batches with a schema and without take turns. The delay is measured over HTTP at the demo
model: the first token of requests that each bring a schema of 10 kB which is new, beside requests without, and the gaps
between the tokens of another stream meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from powerband import LLM, SamplingParams, StructuredOutputsParams
from powerband.core.loop import StepRecord

PORT = 8765
TOKENS = 48
RECORD = {
    "type": "object",
    "properties": {
        "id": {"type": "integer"},
        "name": {"type": "string"},
        "kind": {"enum": ["first", "second", "third"]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z-]{2,12}$"}},
        "size": {"type": "object", "properties": {"w": {"type": "number"}, "h": {"type": "number"}}, "required": ["w"]},
    },
    "required": ["id", "name", "kind"],
    "additionalProperties": False,
}
ENDLESS = StructuredOutputsParams(json={"type": "array", "items": RECORD, "minItems": 10_000})


def make_model(folder: Path, args: argparse.Namespace) -> None:
    """A configuration of that shape, and a tokenizer of that many tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:400]
    tokenizer.train([str(path) for path in sources], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden // 64,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 4 * args.hidden,
        "vocab_size": args.vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def step_seconds(llm: LLM, batch: int, form: StructuredOutputsParams | None, seed: int) -> list[float]:
    """Of the steps that decode the whole batch."""
    seconds: list[float] = []

    def observe(record: StepRecord) -> None:
        if record.step.num_tokens == len(record.step.works) == batch:
            seconds.append(record.exclusive_s)

    llm._engine.core.observer = observe
    params = [
        SamplingParams(temperature=0.8, seed=seed + i, max_tokens=TOKENS, ignore_eos=True, structured_outputs=form)
        for i in range(batch)
    ]
    llm.generate([[5 + i, 6, 7] for i in range(batch)], params, use_tqdm=False)
    return seconds[4:]


def steps(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name), args)
        settings: dict[str, Any] = {"max_num_seqs": 32, "max_model_len": 256, "kv_cache_memory": "1GiB"}
        with LLM(name, load_format="dummy", device="cpu", dtype=args.dtype, **settings) as llm:
            print(f"shape {args.layers} x {args.hidden}, {llm.get_tokenizer().vocab_size} tokens, {llm.settings.dtype}")
            for batch in args.batches:
                with_form: list[float] = []
                without: list[float] = []
                for turn in range(args.rounds + 1):
                    for form, into in ((None, without), (ENDLESS, with_form)):
                        found = step_seconds(llm, batch, form, 1000 * turn)
                        into += found if turn else []  # the first turn warms up
                ms, plain = 1e3 * statistics.median(with_form), 1e3 * statistics.median(without)
                print(
                    f"batch {batch:3}: {plain:8.2f} ms a token without a schema, {ms:8.2f} ms with one "
                    f"({100 * (ms / plain - 1):+.1f} %)",
                    flush=True,
                )


def new_schema(chance: random.Random) -> dict[str, Any]:
    """A schema of 10 kB that no one has sent before."""
    fields: dict[str, Any] = {}
    while len(json.dumps(fields)) < 10_000:
        fields[f"field_{chance.randrange(10**9)}"] = chance.choice(
            [
                {"type": "string", "maxLength": chance.randrange(5, 50)},
                {"type": "integer", "minimum": 0, "maximum": chance.randrange(10, 10**6)},
                {"enum": [f"value {chance.random()}" for _ in range(5)]},
                {"type": "array", "items": {"type": "number"}, "maxItems": 5},
                {"type": "string", "format": "date-time"},
                RECORD,
            ]
        )
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


async def first_token_s(client: httpx.AsyncClient, prompt: str, form: Any) -> float:
    body = {"prompt": prompt, "max_tokens": 2, "stream": True, "structured_outputs": form}
    began_s = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                return time.perf_counter() - began_s
    raise RuntimeError("no token came")


async def gaps_s(client: httpx.AsyncClient, done: asyncio.Event) -> list[float]:
    """Between the tokens of a stream that runs until `done`."""
    found = []
    while not done.is_set():
        body = {"prompt": "The", "max_tokens": 400, "ignore_eos": True, "stream": True}
        last_s = None
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    now_s = time.perf_counter()
                    found += [now_s - last_s] if last_s is not None else []
                    last_s = now_s
    return found


async def delays(url: str) -> None:
    chance = random.Random(os.getpid())
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        await first_token_s(client, "x", {"json": new_schema(chance)})  # starts the worker
        plain, formed = [], []
        for i in range(24):
            plain.append(await first_token_s(client, f"{i} plain", None))
            formed.append(await first_token_s(client, f"{i} formed", {"json": new_schema(chance)}))
        quiet, busy = asyncio.Event(), asyncio.Event()
        asyncio.get_running_loop().call_later(4, quiet.set)
        alone = await gaps_s(client, quiet)
        others = asyncio.create_task(gaps_s(client, busy))
        for i in range(24):
            await first_token_s(client, f"{i} beside", {"json": new_schema(chance)})
        busy.set()
        beside = await others
    plain_ms, formed_ms = (1e3 * statistics.median(values) for values in (plain, formed))
    print(f"first token: {plain_ms:.1f} ms without a schema, {formed_ms:.1f} ms with a new one of 10 kB")
    for name, gaps in (("alone", alone), ("beside new schemas", beside)):
        p50, p99 = (1e3 * statistics.quantiles(gaps, n=100)[at] for at in (49, 98))
        print(f"gaps between another stream's tokens, {name}: p50 {p50:.2f} ms, p99 {p99:.2f} ms")


def over_http() -> None:
    command = [sys.executable, "-m", "powerband", "serve", "demo", "--port", str(PORT), "--max-model-len", "1024"]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{PORT}"
    try:
        for _ in range(600):
            try:
                if httpx.get(f"{url}/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        asyncio.run(delays(url))
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocab", type=int, default=65_536)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    args = parser.parse_args()
    steps(args)
    over_http()


if __name__ == "__main__":
    main()
