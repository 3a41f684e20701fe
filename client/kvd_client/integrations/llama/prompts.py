"""Prompts in files, and their tokens as a server of the same model would make them.

NAME.json   a list of token ids, or an object with "messages" (and perhaps "tools"), as a chat
            completion has them: the model's own chat template is applied, without the opening
            of an answer
any other   text; special tokens are recognised, and a begin token is added if the model wants
            one
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from kvd_client.integrations.llama.runtime.model import LlamaModel

Tokens = npt.NDArray[np.int32]


class BadPrompt(ValueError):
    """A file that is no prompt. The message names it and says why."""


def read_prompt(path: Path, model: LlamaModel) -> Tokens:
    """int32 [n], n >= 1. Raises BadPrompt, which also covers a file that cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
        tokens = _of_json(json.loads(text), model) if path.suffix == ".json" else None
        if tokens is None:
            tokens = model.tokenize(text)
    except BadPrompt as error:
        raise BadPrompt(f"{path}: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadPrompt(f"{path}: {error}") from error
    if not tokens.size:
        raise BadPrompt(f"{path}: there is nothing in it")
    return tokens


def _of_json(found: Any, model: LlamaModel) -> Tokens:
    if isinstance(found, dict):
        text, add_special = _render(found, model)
        return model.tokenize(text, add_special=add_special)
    if not isinstance(found, list) or not all(type(each) is int for each in found):
        raise BadPrompt('it is neither a list of token ids nor an object with "messages"')
    wrong = next((each for each in found if not 0 <= each < model.n_vocab), None)
    if wrong is not None:
        raise BadPrompt(f"token id {wrong} is not one of this model: 0 to {model.n_vocab - 1}")
    return np.array(found, np.int32)


def _render(chat: dict[str, Any], model: LlamaModel) -> tuple[str, bool]:
    """The conversation as text, and whether a begin token is to be added to it."""
    messages = chat.get("messages")
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise BadPrompt('"messages" is not a list of objects')
    if model.chat_template is None:
        raise BadPrompt("the model has no chat template: give a text, or token ids")
    formatter = Jinja2ChatFormatter(
        model.chat_template,
        eos_token=model.token_text(model.eos),
        bos_token=model.token_text(model.bos),
        add_generation_prompt=False,
    )
    try:
        rendered = formatter(messages=messages, tools=chat.get("tools"))
    except Exception as error:  # a template is a program, and raises what it likes
        raise BadPrompt(f"the model's chat template refuses it: {error}") from error
    return rendered.prompt, not rendered.added_special
