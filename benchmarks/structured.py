"""What structured output costs: time per output token with a schema and without, and the delay of a new schema.

    python benchmarks/structured.py [--layers 24 --hidden 896] [--rounds 5] [--vllm VENV/bin/python]

Steps are measured in one engine with random weights in the shape of a small model, with a vocabulary trained on
Python's standard library: batches with a schema and without take turns. An answer of long keys shows what is gained by
tokens that a schema forces, which take no step of their own. The delay is measured over HTTP at the demo
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
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from powerband import LLM, SamplingParams, StructuredOutputsParams
from powerband.core.loop import StepRecord
from powerband.spec.hardware.device import detect_cpu

PORT = 8765
REPORT: list[dict[str, Any]] = []  # what was measured, for --json
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
_MANY = {"type": "array", "items": RECORD, "minItems": 10_000}
ENDLESS = StructuredOutputsParams(json=_MANY)
_NAMES = ("customer_identifier", "delivery_is_insured", "number_of_parcels", "requires_a_signature", "warehouse_number")
_VALUES = ({"type": "boolean"}, {"enum": ["standard", "express"]})
_FIXED = {f"{name}_{part}": _VALUES[i % 2] for i, name in enumerate(_NAMES) for part in ("of_order", "of_return")}
KEYS = StructuredOutputsParams(
    json={"type": "object", "properties": _FIXED, "required": list(_FIXED), "additionalProperties": False},
    disable_any_whitespace=True,
)
IN_ONE_LINE = StructuredOutputsParams(json=_MANY, disable_any_whitespace=True)


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


SIDES = {"without a schema": None, "with one": ENDLESS, "with one, in one line": IN_ONE_LINE}


@dataclass
class Turn:
    """One batch of one side."""

    steps: list[float] = field(default_factory=list)  # times of those that decode the whole batch, a token each
    seconds: float = 0.0  # from begin to end of an answer, mean over the answers
    cpu_s: float = 0.0  # of the whole process

    @property
    def figures(self) -> list[float]:
        """In ms: a step; an output token, of which several may come at once where a form forces them; its CPU time."""
        return [1e3 * statistics.median(self.steps), 1e3 * self.seconds / TOKENS, 1e3 * self.cpu_s / TOKENS]


def measure(llm: LLM, batch: int, form: StructuredOutputsParams | None, seed: int) -> Turn:
    turn = Turn()

    def observe(record: StepRecord) -> None:
        turn.seconds += record.exclusive_s * len(record.step.works) / batch
        if record.step.num_tokens == len(record.step.works) == batch:
            turn.steps.append(record.exclusive_s)

    llm._engine.core.observer = observe
    params = [
        SamplingParams(temperature=0.8, seed=seed + i, max_tokens=TOKENS, ignore_eos=True, structured_outputs=form)
        for i in range(batch)
    ]
    began_s = time.process_time()
    llm.generate([[5 + i, 6, 7] for i in range(batch)], params, use_tqdm=False)
    turn.cpu_s = time.process_time() - began_s
    turn.steps = turn.steps[2:]
    return turn


def forced(llm: LLM, args: argparse.Namespace) -> None:
    """An answer that is mostly keys: with the tokens that they force in one step, and one by one."""
    times: dict[str, list[float]] = {"forced": [], "one by one": []}
    num_tokens = num_steps = 0

    def observe(_record: StepRecord) -> None:
        nonlocal num_steps
        num_steps += 1

    llm._engine.core.observer = observe
    for turn in range(args.rounds + 1):
        for name, logprobs in (("forced", None), ("one by one", 0)):  # log-probabilities are of each token
            num_steps, began_s = 0, time.perf_counter()
            params = SamplingParams(
                temperature=0.8, seed=turn, max_tokens=200, structured_outputs=KEYS, logprobs=logprobs
            )
            [result] = llm.generate([[5, 6, 7]], params, use_tqdm=False)
            if turn:
                times[name].append(time.perf_counter() - began_s)
            num_tokens = len(result.outputs[0].token_ids)
            counts = f"{num_tokens} tokens in {num_steps} steps"
            if turn == args.rounds:
                seconds = statistics.median(times[name])
                print(f"an object of ten long keys, {name:10}: {counts}, {seconds:.3f} s")
                REPORT.append({"keys": name, "num_tokens": num_tokens, "num_steps": num_steps, "seconds": seconds})


def show(who: str, batch: int, found: dict[str, list[Turn]]) -> None:
    """Medians over the turns; and of each turn's ratio to the one without a schema, with quartiles."""
    plain = found["without a schema"]
    for name, turns in found.items():
        texts = []
        for i, what in enumerate(("ms a step of one token each", "ms an output token", "ms of CPU an output token")):
            values = [turn.figures[i] for turn in turns]
            over = [100 * (value / other.figures[i] - 1) for value, other in zip(values, plain, strict=True)]
            low, middle, high = statistics.quantiles(over, n=4)
            texts.append(f"{statistics.median(values):8.2f} {what} ({middle:+.1f} %, {low:+.1f} to {high:+.1f})")
            REPORT.append(
                {"engine": who, "batch": batch, "side": name, "what": what, "values": values, "over_percent": middle}
            )
        print(f"{who}, batch {batch:3}, {name:22} {', '.join(texts)}", flush=True)


def steps(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name), args)
        settings: dict[str, Any] = {"max_num_seqs": 32, "max_model_len": 256, "kv_cache_memory": "1GiB"}
        with LLM(name, load_format="dummy", device="cpu", dtype=args.dtype, **settings) as llm:
            print(f"shape {args.layers} x {args.hidden}, {llm.get_tokenizer().vocab_size} tokens, {llm.settings.dtype}")
            forced(llm, args)
            for batch in args.batches:
                found: dict[str, list[Turn]] = {side: [] for side in SIDES}
                for turn in range(args.rounds + 1):
                    for side, form in SIDES.items():
                        found[side].append(measure(llm, batch, form, 1000 * turn))
                show("ours", batch, {side: turns[1:] for side, turns in found.items()})  # the first warms up
        if args.vllm is not None:
            peer_steps(name, args)


def peer_steps(folder: str, args: argparse.Namespace) -> None:
    """The same in vLLM, whose backend for grammars is its default."""
    forms = {
        side: None if form is None else {"json": form.json, "disable_any_whitespace": form.disable_any_whitespace}
        for side, form in SIDES.items()
    }
    script = Path(__file__).with_name("structured_vllm.py")
    command = [args.vllm, script, folder, str(args.rounds), str(TOKENS), *map(str, args.batches)]
    done = subprocess.run(
        command, input=json.dumps(forms), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
    )
    for batch, sides in json.loads(done.stdout.splitlines()[-1]).items():
        show("vLLM", int(batch), {side: [Turn(**turn) for turn in turns] for side, turns in sides.items()})


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


def bodies(count: int, name: str, chance: random.Random | None) -> list[bytes]:
    """Of requests, each with a new schema if there is `chance`. They are made before anything is measured."""
    made = []
    for i in range(count):
        form = None if chance is None else {"json": new_schema(chance)}
        body = {"prompt": f"{i} {name}", "max_tokens": 2, "stream": True, "structured_outputs": form}
        made.append(json.dumps(body).encode())
    return made


async def first_token_s(client: httpx.AsyncClient, body: bytes) -> float:
    began_s = time.perf_counter()
    headers = {"content-type": "application/json"}
    async with client.stream("POST", "/v1/completions", content=body, headers=headers) as answer:
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
        for body in bodies(1, "first", chance):  # starts the worker
            await first_token_s(client, body)
        plain, formed = [], []
        for without, with_form in zip(bodies(24, "plain", None), bodies(24, "formed", chance), strict=True):
            plain.append(await first_token_s(client, without))
            formed.append(await first_token_s(client, with_form))
        beside_it = bodies(24, "beside", chance)
        quiet, busy = asyncio.Event(), asyncio.Event()
        asyncio.get_running_loop().call_later(4, quiet.set)
        alone = await gaps_s(client, quiet)
        others = asyncio.create_task(gaps_s(client, busy))
        for body in beside_it:
            await first_token_s(client, body)
        busy.set()
        beside = await others
    plain_ms, formed_ms = (1e3 * statistics.median(values) for values in (plain, formed))
    print(f"first token: {plain_ms:.1f} ms without a schema, {formed_ms:.1f} ms with a new one of 10 kB")
    REPORT.append({"first_token_ms": plain_ms, "first_token_with_new_schema_ms": formed_ms})
    for name, gaps in (("alone", alone), ("beside new schemas", beside)):
        p50, p99 = (1e3 * statistics.quantiles(gaps, n=100)[at] for at in (49, 98))
        REPORT.append({"gaps": name, "p50_ms": p50, "p99_ms": p99})
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
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--vllm", type=Path, help="python of an environment with vLLM, to measure it, too")
    args = parser.parse_args()
    steps(args)
    over_http()
    if args.json is not None:
        versions = {name: version(name) for name in ("torch", "llguidance")}
        args.json.write_text(
            json.dumps({"cpu": detect_cpu().name, "versions": versions, "results": REPORT}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
