"""Train the demo model: python examples/demo_model/train.py --minutes 105 --out /tmp/demo_model

Needs `pip install powerband[dev]` and two CPU cores. The schedule follows the clock, not a number of steps:
the learning rate reaches zero when the minutes are over, however busy the machine was. Started again with
the same --out, it goes on from the last checkpoint; with --start FOLDER, it trains a finished model further, at lower
learning rates. `export.py` then makes the folder that the package ships, whose README.md says what came out.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from data import Batches, right_answers, right_tool_turns, train_tokenizer
from muon import Muon
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from powerband.text import eval_tasks
from powerband.text.corpus import documents, held_out_documents, is_held_out

CONFIG = Qwen3Config(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=2048,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=2,
    pad_token_id=0,
    attn_implementation="sdpa",
)
ROWS, LENGTH = 6, 384
LONG_EVERY, LONG_ROWS, LONG_LENGTH = 20, 2, 2048  # so that long contexts work
MUON_LR, ADAM_LR = 0.015, 2e-3
WARM_UP, DECAY = 0.02, 0.6  # shares of the time
START_PACE = 0.3  # of the learning rates, for a model that is trained already
CHECK_EVERY_S = 300.0


@dataclass
class Progress:
    """How far the training is; saved beside the weights."""

    elapsed_s: float = 0.0
    steps: int = 0
    tokens: int = 0
    text_loss: float = 0.0
    accuracy: dict[str, float] | None = None


class Trainer:
    """The model, its two optimizers and its data; `run` trains until the time is over."""

    def __init__(self, out: Path, duration_s: float, start: Path | None = None) -> None:
        self._out, self._duration_s = out, duration_s
        self._pace = 1.0 if start is None else START_PACE
        self._progress = Progress()
        torch.manual_seed(0)
        seen = [document for document in documents() if not is_held_out(document.name)]
        if (out / "progress.json").exists():
            self._progress = Progress(**json.loads((out / "progress.json").read_text()))
            self._tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
            self._model = Qwen3ForCausalLM.from_pretrained(out, dtype=torch.float32)
        elif start is not None:
            out.mkdir(parents=True, exist_ok=True)
            self._tokenizer = Tokenizer.from_file(str(start / "tokenizer.json"))
            self._tokenizer.save(str(out / "tokenizer.json"))
            self._model = Qwen3ForCausalLM.from_pretrained(start, dtype=torch.float32)
        else:
            out.mkdir(parents=True, exist_ok=True)
            self._tokenizer = train_tokenizer(seen)
            self._tokenizer.save(str(out / "tokenizer.json"))
            self._model = Qwen3ForCausalLM(CONFIG)
        self._batches = Batches(self._tokenizer, seen, seed=self._progress.steps)
        held_out = "<|endoftext|>".join(document.text for document in held_out_documents())
        self._held_out = torch.tensor(self._tokenizer.encode(held_out).ids[: 32 * 257]).view(32, 257)
        matrices = [p for p in self._model.model.layers.parameters() if p.ndim == 2]
        others = [p for p in self._model.parameters() if not any(p is matrix for matrix in matrices)]
        self._muon = Muon(matrices, MUON_LR)
        self._adam = torch.optim.AdamW(others, ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0)
        print(f"{self._model.num_parameters():,} parameters, {self._batches.text_tokens:,} tokens of text", flush=True)

    def run(self) -> None:
        """Train, checking and saving every few minutes and at the end."""
        began = time.monotonic() - self._progress.elapsed_s
        next_check_s = self._progress.elapsed_s + CHECK_EVERY_S / 5
        smooth = 0.0
        while (elapsed_s := time.monotonic() - began) < self._duration_s:
            share = elapsed_s / self._duration_s
            loss = self._step(self._pace * min(1.0, share / WARM_UP, (1 - share) / DECAY))
            smooth = loss if smooth == 0.0 else 0.98 * smooth + 0.02 * loss
            self._progress.elapsed_s = elapsed_s
            if self._progress.steps % 20 == 0:
                rate = self._progress.tokens / elapsed_s
                print(
                    f"{elapsed_s:6.0f} s  step {self._progress.steps}  loss {smooth:.3f}  {rate:.0f} tokens/s",
                    flush=True,
                )
            if elapsed_s > next_check_s:
                self._check()
                next_check_s += CHECK_EVERY_S
        self._check()

    def _step(self, pace: float) -> float:
        long = self._progress.steps % LONG_EVERY == LONG_EVERY - 1
        rows, length = (LONG_ROWS, LONG_LENGTH) if long else (ROWS, LENGTH)
        tokens, weights = self._batches.next(rows, length)
        losses = F.cross_entropy(self._logits(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        loss.backward()
        self._muon.lr = MUON_LR * pace
        self._muon.step()
        for group in self._adam.param_groups:
            group["lr"] = ADAM_LR * pace
        self._adam.step()
        self._adam.zero_grad()
        self._progress.steps += 1
        self._progress.tokens += rows * length
        return loss.item()

    def _logits(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self._model(input_ids=tokens, use_cache=False).logits.float()

    @torch.no_grad()
    def _check(self) -> None:
        def predict(tokens: torch.Tensor) -> torch.Tensor:
            return self._logits(tokens).argmax(-1)

        logits = self._logits(self._held_out[:, :-1]).flatten(0, 1)
        self._progress.text_loss = F.cross_entropy(logits, self._held_out[:, 1:].flatten()).item()
        self._progress.accuracy = {kind: right_answers(self._tokenizer, kind, 64, predict) for kind in eval_tasks.KINDS}
        self._progress.accuracy["tools"] = right_tool_turns(self._tokenizer, 64, predict)
        self._model.save_pretrained(self._out)
        (self._out / "progress.json").write_text(json.dumps(asdict(self._progress), indent=1))
        print(f"check: {asdict(self._progress)}", flush=True)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="a folder with a model to train further")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    Trainer(arguments.out, arguments.minutes * 60, arguments.start).run()


if __name__ == "__main__":
    main()
