"""Text to token ids and back, from the tokenizer files of a model's folder.

Owns the reading of tokenizer.json, tokenizer_config.json, special_tokens_map.json and the chat
templates. Uses the `tokenizers` library alone: transformers would cost a second and 60 MB at start.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from ..errors import ModelError, RequestError
from .chat_template import ChatTemplate, compile_chat_template

_NAMED_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class Tokenizer:
    """The tokenizer of one model. Ids and texts are those of transformers 5 for the same
    tokenizer.json.

    Which special tokens `encode` adds is the post-processor's decision; `add_bos_token` and
    `add_eos_token` of tokenizer_config.json have no effect, as in transformers 5.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        """special_tokens: texts by name (bos_token). chat_templates: sources by name (default)."""
        self.backend = backend
        backend.no_truncation()  # settings of training that a tokenizer.json may carry
        backend.no_padding()
        self.special_tokens = dict(special_tokens or {})
        self._chat_templates = dict(chat_templates or {})
        self._num_prefix_ids = len(self.encode(""))
        self._text_by_id: dict[int, str] = {}
        self.anchor_ids = self._find_anchor()

    @classmethod
    def from_folder(cls, path: Path, *, chat_template: str | None = None) -> Tokenizer:
        """chat_template: a template to use in place of the folder's own (its text, not a path)."""
        config = _read_json(path / "tokenizer_config.json")
        backend = _read_backend(path)
        if "added_tokens_decoder" in config:
            named = {**_read_json(path / "special_tokens_map.json"), **config}
        else:
            named = {**config, **_read_json(path / "special_tokens_map.json")}
        _add_tokens(backend, config, named)
        special_tokens = {
            name: _content(value)
            for name, value in named.items()
            if name.endswith("_token") and isinstance(value, (str, dict)) and _content(value)
        }
        templates = _read_chat_templates(path, config)
        if chat_template is not None:
            templates = {"default": chat_template}
        return cls(backend, special_tokens=special_tokens, chat_templates=templates)

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, added ones included; a model's logits may be wider."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def most_characters(self) -> int:
        """Of a text that one token stands for; more only where a tokenizer collapses spaces or
        joins what it does not know.
        """
        return max(map(len, self.backend.get_vocab(with_added_tokens=True)), default=1)

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        return self.token_id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        return self.token_id(self.eos_token)

    @property
    def adds_special_tokens(self) -> bool:
        """Whether encode("") is not empty."""
        return self._num_prefix_ids > 0

    @property
    def has_chat_template(self) -> bool:
        return bool(self._chat_templates)

    def token_id(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(self.encode_batch([text], add_special_tokens)[0])

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Special tokens written out in a text become their ids, as everywhere."""
        encodings = self.backend.encode_batch_fast(
            list(texts), add_special_tokens=add_special_tokens
        )
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Ids that are in the logits but not in the vocabulary give no text."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """One token's text inside a text: with its leading space, special tokens written out."""
        text = self._text_by_id.get(token_id)
        if text is None:  # logprobs ask for the same ones again and again; the ids bound the dict
            text = self._text_by_id[token_id] = self._text_of(token_id)
        return text

    def _text_of(self, token_id: int) -> str:
        before = self.decode(self.anchor_ids, skip_special_tokens=False)
        text = self.decode([*self.anchor_ids, token_id], skip_special_tokens=False)
        if text.startswith(before):
            return text[len(before) :]
        return self.decode([token_id], skip_special_tokens=False)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """The conversation as one text, special tokens included: encode it with
        add_special_tokens=False.

        chat_template: the name of one of the model's templates, or a template. kwargs go to the
        template.
        """
        template = self._choose_template(chat_template, with_tools=bool(tools))
        if tools and not template.reads_tools:
            raise RequestError(
                "tools are not honoured: this model's chat template does not write them; leave "
                "them out, or describe them in a message",
                field="tools",
            )
        return template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables={**self.special_tokens, **kwargs},
        )

    def _choose_template(self, chosen: str | None, *, with_tools: bool) -> ChatTemplate:
        known = self._chat_templates
        if chosen is not None and chosen not in known and "{" not in chosen:
            raise RequestError(
                f"chat_template {chosen[:80]!r} is neither a template nor the name of one of this "
                f"model's ({', '.join(known) or 'it has none'}); pass the text of a Jinja template",
                field="chat_template",
            )
        if chosen is not None:
            return compile_chat_template(known.get(chosen, chosen))
        if with_tools and "tool_use" in known:
            return compile_chat_template(known["tool_use"])
        if "default" in known:
            return compile_chat_template(known["default"])
        if known:
            raise RequestError(
                "this model has several chat templates and none is the default; pass "
                f"chat_template= one of {', '.join(known)}",
                field="chat_template",
            )
        raise RequestError(
            "this model has no chat template, so it is probably not made for conversations; pass "
            "chat_template= with the text of a Jinja template, or send a plain prompt",
            field="chat_template",
        )

    def _find_anchor(self) -> list[int]:
        """Ids of a short text that may stand before any token, so that its leading space shows."""
        for text in ("a", "0", "."):
            ids = self.encode(text, add_special_tokens=False)
            if ids and self.decode(ids) == text:
                return ids
        return []


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    file = path / "tokenizer.json"
    if file.is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # what the Rust library raises has no class of its own
            raise ModelError(
                f"{file} cannot be read as a tokenizer: {error}; download it again, or remake it "
                f"with the tokenizers library {tokenizers.__version__} or older"
            ) from error
    others = ("tokenizer.model", "tekken.json", "vocab.json", "spiece.model")
    found = next((name for name in others if (path / name).is_file()), None)
    if found is None:
        raise ModelError(
            f"{path} has no tokenizer.json; add the one that was published with the model, or "
            "start with another tokenizer folder"
        )
    command = (
        'python -c "from transformers import AutoTokenizer as T; '
        f"T.from_pretrained('{path}').save_pretrained('{path}')\""
    )
    raise ModelError(
        f"{path} has {found} but no tokenizer.json; add the one that was published with the model, "
        "or make one (after pip install transformers sentencepiece protobuf tiktoken; check it: "
        "transformers 5 differs from sentencepiece on leading and repeated spaces) with: "
        f"{command}"
    )


def _read_json(file: Path) -> dict[str, Any]:
    """{} if there is no such file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not JSON: {error}; download it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} must be a JSON object, it is a {type(value).__name__}")
    return value


def _content(token: Any) -> str:
    """A token is written as its text or as an object with flags."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""


def _added_token(token: Any, *, special: bool) -> AddedToken:
    if not isinstance(token, dict):
        return AddedToken(_content(token), special=special, normalized=not special)
    return AddedToken(
        _content(token),
        single_word=bool(token.get("single_word", False)),
        lstrip=bool(token.get("lstrip", False)),
        rstrip=bool(token.get("rstrip", False)),
        normalized=bool(token.get("normalized", not special)),
        special=special,
    )


def _add_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, Any]
) -> None:
    """Tokens that only the config names, in the order of their ids; named ones are special."""
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    decoder = config.get("added_tokens_decoder") or {}
    for _, token in sorted(decoder.items(), key=lambda item: int(item[0])):
        if _content(token) and _content(token) not in known:
            special = bool(token.get("special", False)) if isinstance(token, dict) else True
            added = _added_token(token, special=special)
            known[added.content] = added
            (backend.add_special_tokens if special else backend.add_tokens)([added])
    extra = named.get("extra_special_tokens") or named.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    for token in [*(named.get(name) for name in _NAMED_SPECIAL_TOKENS), *extra]:
        content = _content(token)
        if content and (content not in known or not known[content].special):
            added = _added_token(token, special=True)
            known[content] = added
            backend.add_special_tokens([added])


def _read_chat_templates(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Sources by name. A .jinja file wins over chat_template.json, that over the config."""
    templates = _named_templates(config.get("chat_template"), path / "tokenizer_config.json")
    legacy = path / "chat_template.json"
    templates |= _named_templates(_read_json(legacy).get("chat_template"), legacy)
    for file in sorted((path / "additional_chat_templates").glob("*.jinja")):
        templates[file.stem] = _read_text(file)
    if (path / "chat_template.jinja").is_file():
        templates["default"] = _read_text(path / "chat_template.jinja")
    return templates


def _named_templates(value: Any, file: Path) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if isinstance(value, dict) and all(isinstance(x, str) for pair in value.items() for x in pair):
        return dict(value)
    raise ModelError(
        f"chat_template in {file} must be a text or a list of {{name, template}}; mend it, or put "
        "the template into chat_template.jinja"
    )


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{file} is not UTF-8: {error}; download it again") from error
