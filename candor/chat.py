"""How a chat template is rendered, the same in training and in sampling.

Some templates read more than the messages. Qwen 3's opens a block of thoughts unless told otherwise,
and Llama 3.2's writes today's date above every conversation: a model trained on Monday would be
sampled on Tuesday with another prompt. So whoever renders a template, here or through a server
(``chat_template_kwargs``), passes these values; templates that know nothing of them are unchanged.
"""

from collections.abc import Mapping

TEMPLATE_OPTIONS: Mapping[str, object] = {
    "enable_thinking": False,  # the studies reproduced here score answers, not thoughts
    "date_string": "26 Jul 2024",  # the day Llama 3.1's template names where none is given
}
