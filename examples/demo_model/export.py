"""Make the folder that the package ships: python examples/demo_model/export.py /tmp/demo_model src/powerband/demo

Weights in bfloat16, the tokenizer, its chat template and the ids that end a reply. The model card (README.md) is
written by hand.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen3ForCausalLM

END_OF_TEXT, END_OF_TURN = 0, 2
CHAT_TEMPLATE = """\
{%- if tools -%}
{{- '<|im_start|>system\\n' -}}
{%- if messages[0].role == 'system' -%}
{{- messages[0].content + '\\n\\n' -}}
{%- endif -%}
{{- 'Tools:\\n' -}}
{%- for tool in tools -%}
{%- set function = tool.function if tool.function is defined else tool -%}
{{- function.name + '(' -}}
{%- if function.parameters and function.parameters.properties -%}
{%- for name, schema in function.parameters.properties.items() -%}
{{- name + ': ' + (schema.type if schema.type is string else 'any') + (', ' if not loop.last else '') -}}
{%- endfor -%}
{%- endif -%}
{{- ')' + (' ' + function.description if function.description else '') + '\\n' -}}
{%- endfor -%}
{{- 'To call one:\\n<tool_call>\\n{"name": "...", "arguments": {...}}\\n</tool_call><|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'system' and loop.first and tools -%}
{%- elif message.role == 'tool' -%}
{{- '<|im_start|>user' if loop.first or messages[loop.index0 - 1].role != 'tool' else '' -}}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
{{- '<|im_end|>\\n' if loop.last or messages[loop.index0 + 1].role != 'tool' else '' -}}
{%- elif message.tool_calls -%}
{{- '<|im_start|>assistant' + ('\\n' + message.content if message.content else '') -}}
{%- for call in message.tool_calls -%}
{%- set function = call.function if call.function is defined else call -%}
{{- '\\n<tool_call>\\n{"name": "' + function.name + '", "arguments": ' -}}
{{- function.arguments if function.arguments is string else function.arguments | tojson -}}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- else -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def export(checkpoint: Path, folder: Path) -> None:
    """Write config.json, generation_config.json, model.safetensors, tokenizer.json and tokenizer_config.json."""
    model = Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(
        eos_token_id=[END_OF_TURN, END_OF_TEXT], pad_token_id=END_OF_TEXT, do_sample=False
    )
    model.save_pretrained(folder)
    shutil.copyfile(checkpoint / "tokenizer.json", folder / "tokenizer.json")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": model.config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    """Read the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    export(arguments.checkpoint, arguments.folder)


if __name__ == "__main__":
    main()
