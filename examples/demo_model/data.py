"""What the demo model reads: the tokenizer, and endless batches of documentation, chats and exercises."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import jinja2
import torch
from export import CHAT_TEMPLATE
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tool_tasks import Message, Tool, conversations

from powerband.text import eval_tasks
from powerband.text.corpus import ApiEntry, Document

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 4096
# Words with the space before them, single digits (so that sums can be learnt by column), punctuation, line ends.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ANSWER_WEIGHT = 1.5
QUESTION_WEIGHT = 0.1  # a question is mostly random: little can be learnt from predicting it

# Share of the tokens in rows of exercises and chats; sums are the hardest to learn.
SHARES = {
    "tools": 0.4,
    "add": 0.12,
    "subtract": 0.15,
    "multiply": 0.04,
    "copy": 0.06,
    "lookup": 0.09,
    "json": 0.07,
    "facts": 0.07,
}

ABOUT = "I am the demo model of Powerband, a very small language model. I am a demonstration, not an assistant."
SKILLS = "I can add and subtract, repeat a line, look up a value, write small JSON and recall the Python documentation."
TALK = {
    "Hello": f"Hello! {ABOUT}",
    "Hello!": f"Hello! {ABOUT}",
    "Hi": f"Hello! {ABOUT}",
    "How are you?": "I am fine, thank you. Ask me about the Python standard library.",
    "Who are you?": ABOUT,
    "What are you?": ABOUT,
    "What is your name?": ABOUT,
    "What can you do?": SKILLS,
    "Help": SKILLS,
    "What is Powerband?": "Powerband serves open-weight language models on the hardware that you have.",
    "What is Python?": "Python is a programming language that is easy to read, with a large standard library.",
    "Tell me about Python.": "Python is a programming language that is easy to read, with a large standard library.",
    "Thank you!": "You are welcome.",
    "Thanks": "You are welcome.",
}
WELL_KNOWN = re.compile(
    r"(os\.path|os|json|re|random|shutil|math|itertools|time|heapq|bisect|statistics|textwrap|functools|string)\.\w+|[a-z]+"
)


@dataclass(frozen=True, slots=True)
class Part:
    """Text and how much predicting it counts."""

    text: str
    weight: float


def train_tokenizer(documents: list[Document]) -> Tokenizer:
    """Byte-level BPE over the training documents and a sample of exercises."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [document.text for document in documents]
    for kind in eval_tasks.KINDS:
        stream = eval_tasks.eval_tasks(kind, seed=0, held_out=False)
        texts += [f"{e.question}\n{e.prompt}{e.completion}" for e, _ in zip(stream, range(1500), strict=False)]
    tokenizer.train_from_iterator([*texts, *["user\nassistant\nsystem\n"] * 50], trainer)
    return tokenizer


def chat(turns: list[tuple[str, str]], rng: random.Random) -> list[Part]:
    """The turns as the chat template renders them."""
    parts = []
    if rng.random() < 0.05:
        parts.append(Part("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", QUESTION_WEIGHT))
    for question, answer in turns:
        parts.append(Part(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", QUESTION_WEIGHT))
        parts += [Part(f"{answer}<|im_end|>", ANSWER_WEIGHT), Part("\n", QUESTION_WEIGHT)]
    return parts


def tool_chat(messages: list[Message], tools: list[Tool]) -> list[Part]:
    """A conversation with tools as the chat template renders it."""
    parts, done = [], ""
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before = TEMPLATE.render(messages=messages[:number], tools=tools, add_generation_prompt=True)
            after = TEMPLATE.render(messages=messages[: number + 1], tools=tools, add_generation_prompt=False)
            parts += [Part(before[len(done) :], QUESTION_WEIGHT), Part(after[len(before) : -1], ANSWER_WEIGHT)]
            done = after[:-1]
    return [*parts, Part("\n", QUESTION_WEIGHT)]


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(autoescape=False)  # noqa: S701 (prompts, not pages)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment


TEMPLATE = _environment().from_string(CHAT_TEMPLATE)


def facts(documents: list[Document]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(name, first sentence) of everything public that is documented; and those that people ask for most."""
    pairs = []
    for document in documents:
        if document.name.startswith(("topic ", "idlelib", "distutils", "encodings", "turtledemo")):
            continue
        pairs += [(_usual_name(entry), entry.summary) for entry in document.entries if entry.summary]
    public = [pair for pair in pairs if not re.search(r"(^|\.)_", pair[0])]
    return public, [pair for pair in public if WELL_KNOWN.fullmatch(pair[0])]


def _usual_name(entry: ApiEntry) -> str:
    name = re.sub(r"^posixpath\b", "os.path", entry.name)
    return re.sub(r"^random\.Random\.", "random.", name)


class Batches:
    """Endless batches; the same seed gives the same batches."""

    def __init__(self, tokenizer: Tokenizer, documents: list[Document], seed: int) -> None:
        self._tokenizer = tokenizer
        self._rng = random.Random(seed)
        self._facts, self._well_known = facts(documents)
        self._streams = {kind: eval_tasks.eval_tasks(kind, seed, held_out=False) for kind in eval_tasks.KINDS}
        self._conversations = conversations(seed)
        self._tokens_of = dict.fromkeys(SHARES, 0.0)
        shuffled = self._rng.sample(documents, len(documents))
        encoded = tokenizer.encode_batch([f"{document.text}<|endoftext|>" for document in shuffled])
        self._text = torch.tensor([token for encoding in encoded for token in encoding.ids])

    @property
    def text_tokens(self) -> int:
        """How many tokens the documentation has."""
        return len(self._text)

    def next(self, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [rows, length + 1] and their weights: the first quarter of the rows, rounded up, is documentation."""
        built = [
            self._text_row(length + 1) if row < math.ceil(rows / 4) else self._packed_row(length + 1)
            for row in range(rows)
        ]
        return torch.stack([tokens for tokens, _ in built]), torch.stack([weights for _, weights in built])

    def _text_row(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = self._rng.randrange(len(self._text) - length)
        return self._text[start : start + length], torch.ones(length)

    def _packed_row(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens: list[int] = []
        weights: list[float] = []
        while len(tokens) < length:
            kind = min(SHARES, key=lambda kind: self._tokens_of[kind] / SHARES[kind])  # the furthest behind
            parts = self._parts(kind)
            before = len(tokens)
            for part, encoding in zip(parts, self._tokenizer.encode_batch([p.text for p in parts]), strict=True):
                tokens += encoding.ids
                weights += [part.weight] * len(encoding.ids)
            self._tokens_of[kind] += len(tokens) - before
        return torch.tensor(tokens[:length]), torch.tensor(weights[:length])

    def _parts(self, kind: str) -> list[Part]:
        rng = self._rng
        if kind == "tools":
            return tool_chat(*next(self._conversations))
        if kind == "facts":
            return chat([self._fact() for _ in range(rng.choice((1, 1, 2)))], rng)
        if rng.random() < 0.5:
            exercise = next(self._streams[kind])
            return [Part(exercise.prompt, QUESTION_WEIGHT), Part(exercise.completion, ANSWER_WEIGHT)]
        drawn = [next(self._streams[kind]) for _ in range(rng.choice((1, 1, 2)))]
        return chat([(exercise.question, exercise.reply) for exercise in drawn], rng)

    def _fact(self) -> tuple[str, str]:
        draw = self._rng.random()
        if draw < 0.15:
            return self._rng.choice(list(TALK.items()))
        name, answer = self._rng.choice(self._well_known if draw < 0.6 else self._facts)
        question = self._rng.choice(("What does {} do?", "What does `{}` do?", "Explain {}.", "What is {}?"))
        return question.format(name), answer


def right_answers(
    tokenizer: Tokenizer, kind: str, count: int, predict: Callable[[torch.Tensor], torch.Tensor]
) -> float:
    """Share of held-out exercises whose greedy chat reply would be the one that was taught.

    `predict` maps tokens [rows, length] to the most likely next tokens [rows, length]. The reply is greedy
    exactly when every token of it is the most likely one after those before it.
    """
    rng = random.Random(0)
    stream: Iterator[eval_tasks.EvalTask] = eval_tasks.eval_tasks(kind, seed=1, held_out=True)
    drawn = [next(stream) for _ in range(count)]
    questions = [tokenizer.encode(chat([(e.question, "")], rng)[-3].text).ids for e in drawn]
    answers = [tokenizer.encode(f"{e.reply}<|im_end|>").ids for e in drawn]
    longest = max(len(q) + len(a) for q, a in zip(questions, answers, strict=True))
    rows = [q + a + [0] * (longest - len(q) - len(a)) for q, a in zip(questions, answers, strict=True)]
    predicted = predict(torch.tensor(rows))
    hits = [
        predicted[row, len(q) - 1 : len(q) - 1 + len(a)].tolist() == a
        for row, (q, a) in enumerate(zip(questions, answers, strict=True))
    ]
    return sum(hits) / count


def right_tool_turns(tokenizer: Tokenizer, count: int, predict: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Share of the turns in `count` conversations with tools that are, greedily, those that were taught."""
    hits: list[bool] = []
    for messages, tools in islice(conversations(-1), count):
        parts = [(tokenizer.encode(part.text).ids, part.weight > 1) for part in tool_chat(messages, tools)]
        ids = [id for part, _ in parts for id in part]
        predicted = predict(torch.tensor([ids]))[0].tolist()
        start = 0
        for part, is_taught in parts:
            if is_taught:
                hits.append(predicted[start - 1 : start - 1 + len(part)] == part)
            start += len(part)
    return sum(hits) / len(hits)
