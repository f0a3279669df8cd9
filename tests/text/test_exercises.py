"""Exercises: right by an independent computation, the same for the same seed, never shared with training."""

from __future__ import annotations

import json
import operator
import re
from itertools import islice

import pytest

from powerband.text.eval_tasks import KINDS, EvalTask, eval_tasks

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def some(kind: str, count: int = 300, seed: int = 7, held_out: bool = True) -> list[EvalTask]:
    return list(islice(eval_tasks(kind, seed, held_out), count))


def solve(exercise: EvalTask) -> str:
    """Find the answer from the question alone."""
    if match := re.search(r"(\d+) ([-+*]) (\d+)", exercise.question):
        return str(OPERATORS[match[2]](int(match[1]), int(match[3])))
    if exercise.kind == "copy":
        return exercise.question.split("\n")[1]
    if exercise.kind == "lookup":
        pairs = dict(re.findall(r"(\w+) = (\w+)", exercise.question))
        return pairs[re.search(r"what is (\w+)\?", exercise.question)[1]]  # type: ignore[index]
    fields = re.findall(r'(\w+) = ("\w+"|\w+)', exercise.question)
    return json.dumps({name: json.loads(value) for name, value in fields})


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_right(kind: str) -> None:
    for exercise in some(kind):
        assert solve(exercise) == exercise.answer
        assert exercise.is_right(f" {exercise.answer}\n")
        assert exercise.is_right(exercise.reply)
        assert not exercise.is_right(exercise.answer[:-1])


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_exercises(kind: str) -> None:
    assert some(kind) == some(kind)
    assert some(kind) != some(kind, seed=8)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"multiply"}))
def test_held_out_exercises_are_never_trained_on(kind: str) -> None:
    trained = {exercise.prompt for exercise in some(kind, 3000, held_out=False)}
    assert not trained & {exercise.prompt for exercise in some(kind)}


def test_json_counts_by_value_not_by_spelling() -> None:
    exercise = some("json", 1)[0]
    assert exercise.is_right(json.dumps(json.loads(exercise.answer), indent=2))
    assert exercise.is_right(json.dumps(dict(reversed(json.loads(exercise.answer).items()))))
    assert not exercise.is_right(exercise.answer[:-1] + ", " + exercise.answer[1:])  # every field twice
    assert not exercise.is_right("{" * 100_000)


def test_a_completion_continues_its_prompt() -> None:
    for kind in KINDS:
        exercise = some(kind, 1)[0]
        assert not exercise.prompt.endswith(" ")
        assert exercise.completion.strip() == exercise.reply
