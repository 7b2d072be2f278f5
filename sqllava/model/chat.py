"""The chat templates (Jinja) that are saved with a model, one for each conversation template.

Servers tokenise a rendered chat as one text. Where the published ids have sentencepiece's dummy
prefix after an image or an end token, the rendered chat has one more space, which gives the same
piece: so these texts get the ids of training from the bare tokenizer.
What training has as targets is marked as generation (`return_assistant_tokens_mask`).
"""

import json

from transformers import PreTrainedTokenizerBase

from sqllava.conversation import IMAGE, Template
from sqllava.encoding import has_dummy_prefix

# A message's images are counted and put in front; its text is then stripped, as in training.
_READ_MESSAGE = """\
{%- set ns = namespace(images=0, text='') -%}
{%- if message['content'] is string -%}
{%- set ns.images = message['content'].split(IMAGE) | length - 1 -%}
{%- set ns.text = message['content'].replace(IMAGE, '') -%}
{%- else -%}
{%- for block in message['content'] -%}
{%- if block['type'] == 'text' -%}{%- set ns.text = ns.text + block['text'] -%}
{%- elif 'image' in block['type'] -%}{%- set ns.images = ns.images + 1 -%}
{%- else -%}{{- raise_exception('a message holds text and images, and not: ' + block['type']) -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if ns.images -%}{%- set ns.text = ns.text | trim -%}{%- endif -%}
"""

_CHAT = """\
{%- set IMAGE = '<image>' -%}
{%- set tags = TAGS -%}
{%- set system = SYSTEM -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set message = messages[0] -%}
READ_MESSAGE
{%- set system = ns.text -%}
{%- set messages = messages[1:] -%}
{%- endif -%}
{{- bos_token + 'SPACE' + system + ' ' -}}
{%- for message in messages -%}
{%- if message['role'] not in tags -%}
{{- raise_exception('no role ' + message['role'] + ' in this template') -}}
{%- endif -%}
READ_MESSAGE
{%- if ns.images and message['role'] != 'user' -%}
{{- raise_exception('an image may stand only in a user message') -}}
{%- endif -%}
{{- tags[message['role']] + ':' -}}
{%- if message['role'] == 'user' -%}
{%- if ns.images -%}
{{- ' ' + ([IMAGE + 'SPACE'] * ns.images) | join('\\n') -}}
{%- if ns.text -%}{{- '\\n' + ns.text -}}{%- endif -%}
{%- elif ns.text -%}
{{- ' ' + ns.text -}}
{%- endif -%}
{{- ' ' -}}
{%- else -%}
{%- generation -%}
{%- if ns.text -%}{{- ' ' + ns.text -}}{%- endif -%}
{{- eos_token -}}
{%- endgeneration -%}
{%- if message['role'] == 'vuser' -%}{{- 'SPACE' + ' ' -}}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- tags['vuser' if ask is defined and ask else 'assistant'] + ':' -}}
{%- endif -%}
"""

_CAPTION = """\
{%- set IMAGE = '<image>' -%}
{{- bos_token -}}
{%- for message in messages -%}
READ_MESSAGE
{%- if message['role'] == 'user' -%}{{- (IMAGE + 'SPACE') * ns.images -}}
{%- else -%}{%- generation -%}{{- ns.text + '\\n' -}}{%- endgeneration -%}{%- endif -%}
{%- endfor -%}
"""


def chat_template(template: Template, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja form of a conversation template, for a tokenizer.

    Messages have the roles of the template ("user", "assistant", "vuser"), and a system message in
    front replaces the template's own. `add_generation_prompt` opens the assistant's turn, or, with
    the template variable `ask` set, the virtual user's.
    """
    source = _CAPTION if template.caption_only else _CHAT
    values = {
        "READ_MESSAGE\n": _READ_MESSAGE,
        "TAGS": json.dumps(dict(template.tags or {})),
        "SYSTEM": json.dumps(template.system),
        "'<image>'": f"'{IMAGE}'",
        "SPACE": " " if has_dummy_prefix(tokenizer) else "",
    }
    for mark, value in values.items():
        source = source.replace(mark, value)
    return source
