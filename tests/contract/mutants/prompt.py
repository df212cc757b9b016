"""ChatML with one thing wrong."""

from __future__ import annotations

from dataclasses import replace

from zoo.text.prompt_styles import CHATML
from zoo.text.prompts import PromptStyle

assert CHATML.template is not None
TEMPLATE = CHATML.template
SAID = "{%- generation %}{{- m.content ~ '<|im_end|>' }}{%- endgeneration %}"


def _with(old: str, new: str) -> PromptStyle:
    assert TEMPLATE.count(old) == 1, old
    return replace(CHATML, name="mutant", template=TEMPLATE.replace(old, new))


DOUBLE_BOS = replace(CHATML, name="mutant", template="{{- (bos_token or '') ~ (bos_token or '') }}" + TEMPLATE)
MASK_EARLY = _with(SAID, "{%- generation %}{{- m.content }}{%- endgeneration %}{{- '<|im_end|>' }}")
MASK_LATE = _with(SAID, "{{- m.content[0] }}{%- generation %}{{- m.content[1:] ~ '<|im_end|>' }}{%- endgeneration %}")
QUESTION_LEARNT = replace(
    CHATML, name="mutant", template="{%- generation %}" + TEMPLATE.replace("{%- generation %}", "").replace(
        "{%- endgeneration %}", "") + "{%- endgeneration %}")  # fmt: skip
NO_END = _with(SAID, "{%- generation %}{{- m.content }}{%- endgeneration %}")
OTHER_END = replace(CHATML, name="mutant", stop=("STOP",))
ASKS_OTHERWISE = _with("'<|im_start|>assistant\\n' }}{%- endif %}", "'<|im_start|>assistant: ' }}{%- endif %}")
CUTS = _with(
    "{{- m.content ~ '<|im_end|>' }}\n    {%- endif %}",
    "{{- m.content | trim | replace('{', '') ~ '<|im_end|>' }}\n    {%- endif %}",
)
FORGETS = replace(CHATML, name="mutant", template="{%- set messages = messages[-2:] %}" + TEMPLATE)
OTHER_NAME = CHATML
