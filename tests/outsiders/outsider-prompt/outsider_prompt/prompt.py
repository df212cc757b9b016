"""Q and A."""

from zoo.text.prompts import PromptStyle

OUTSIDER = PromptStyle(
    "outsider",
    """
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- 'A:' }}
        {%- generation %}{{- ' ' ~ m.content ~ eos_token }}{%- endgeneration %}
    {%- else %}
        {{- 'Q: ' ~ m.content ~ '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'A:' }}{%- endif %}""",
)
