"""The built-in prompt styles. Only what the assistant says, and what ends it, is between the generation marks."""

from __future__ import annotations

from zoo.text.prompts import MODEL, PromptStyle

OWN = PromptStyle(MODEL, None)

PLAIN = PromptStyle(
    "plain",
    """
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- generation %}{{- m.content ~ eos_token }}{%- endgeneration %}
    {%- else %}
        {{- m.content }}
    {%- endif %}
{%- endfor %}""",
    bare=True,
)

CHATML = PromptStyle(
    "chatml",
    """
{%- for m in messages %}
    {{- '<|im_start|>' ~ m.role ~ '\\n' }}
    {%- if m.role == 'assistant' %}
        {%- generation %}{{- m.content ~ '<|im_end|>' }}{%- endgeneration %}
    {%- else %}
        {{- m.content ~ '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}""",
    stop=("<|im_end|>",),
)

ALPACA = PromptStyle(
    "alpaca",
    """
{%- set ns = namespace(task='Below is an instruction that describes a task') %}
{%- for m in messages if m.input %}
    {%- set ns.task = 'Below is an instruction that describes a task, paired with an input that provides further '
        ~ 'context' %}
{%- endfor %}
{%- set ns.task = ns.task ~ '. Write a response that appropriately completes the request.' %}
{%- if messages[0].role == 'system' %}{%- set ns.task = messages[0].content %}{%- endif %}
{{- ns.task ~ '\\n\\n' }}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '### Instruction:\\n' ~ m.content ~ '\\n\\n' }}
        {%- if m.input %}{{- '### Input:\\n' ~ m.input ~ '\\n\\n' }}{%- endif %}
    {%- elif m.role == 'assistant' %}
        {{- '### Response:\\n' }}
        {%- generation %}{{- m.content ~ eos_token }}{%- endgeneration %}
        {{- '' if loop.last else '\\n\\n' }}
    {%- elif m.role != 'system' or not loop.first %}
        {{- raise_exception('the style alpaca has no place for the role ' ~ m.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '### Response:\\n' }}{%- endif %}""",
    splits_input=True,
)

VICUNA = PromptStyle(
    "vicuna",
    """
{%- if messages[0].role == 'system' %}
    {{- messages[0].content ~ ' ' }}
{%- else %}
    {{- 'A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, '
        ~ 'detailed, and polite answers to the user\\'s questions. ' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- 'USER: ' ~ m.content ~ ' ' }}
    {%- elif m.role == 'assistant' %}
        {{- 'ASSISTANT:' }}
        {%- generation %}{{- ' ' ~ m.content ~ eos_token }}{%- endgeneration %}
    {%- elif m.role != 'system' or not loop.first %}
        {{- raise_exception('the style vicuna has no place for the role ' ~ m.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{%- endif %}""",
)

LLAMA2 = PromptStyle(
    "llama2",
    """
{%- set ns = namespace(system='') %}
{%- for m in messages %}
    {%- if m.role == 'system' and loop.first %}
        {%- set ns.system = '<<SYS>>\\n' ~ m.content ~ '\\n<</SYS>>\\n\\n' %}
    {%- elif m.role == 'user' %}
        {{- (bos_token or '') ~ '[INST] ' ~ (ns.system ~ m.content).strip() ~ ' [/INST]' }}
        {%- set ns.system = '' %}
    {%- elif m.role == 'assistant' %}
        {%- generation %}{{- ' ' ~ m.content.strip() ~ ' ' ~ eos_token }}{%- endgeneration %}
    {%- else %}
        {{- raise_exception('the style llama2 has no place for the role ' ~ m.role) }}
    {%- endif %}
{%- endfor %}""",
)

ZEPHYR = PromptStyle(
    "zephyr",
    """
{%- for m in messages %}
    {{- '<|' ~ m.role ~ '|>\\n' }}
    {%- if m.role == 'assistant' %}
        {%- generation %}{{- m.content ~ eos_token }}{%- endgeneration %}
    {%- else %}
        {{- m.content ~ eos_token }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}""",
)
