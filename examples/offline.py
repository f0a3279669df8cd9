"""Answer prompts in this process, without a server: the names are vLLM's, so its scripts run unchanged.

python examples/offline.py
"""

from powerband import LLM, SamplingParams


def main() -> None:
    greedy = SamplingParams(temperature=0, max_tokens=24)
    with LLM("demo", max_num_seqs=8) as llm:
        # Prompts are texts or lists of token ids; results come in the order of the prompts.
        for result in llm.generate(["A list is", "The module provides"], greedy, use_tqdm=False):
            print(f"{result.prompt!r} → {result.outputs[0].text!r}")
        # Conversations go through the model's chat template. Same seed, same tokens, whatever else is in the batch.
        question = [{"role": "user", "content": "What is 17 + 25?"}]
        seeded = SamplingParams(temperature=0.7, seed=1, n=2, max_tokens=24)
        for answer in llm.chat(question, seeded, use_tqdm=False)[0].outputs:
            print(f"answer {answer.index}: {answer.text!r} ({answer.finish_reason})")


if __name__ == "__main__":
    main()
