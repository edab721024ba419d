"""The text side: tokens and text, chats and their control tokens, malformed files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from statewise.engine.tokenizer import Tokenizer, end_token_ids
from statewise.errors import CheckpointError, RequestError

SPECIAL = ["[BOS]", "<|im_end|>", "<|im_user|>", "<|im_system|>", "<|im_assistant|>", "<|im_middle|>"]
TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_' + message.role + '|>' + message.role + '<|im_middle|>' + message.content + '<|im_end|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt %}{{ '<|im_assistant|>assistant<|im_middle|>' }}{% endif -%}"
)
PROSE = ["the quick brown fox jumps over the lazy dog, über die Straße, 敏捷的棕色狐狸, 🦊 naïve café"] * 4


def byte_level_backend() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(PROSE, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[BOS] $A", special_tokens=[("[BOS]", backend.token_to_id("[BOS]"))]
    )
    return backend


def byte_fallback_backend() -> tokenizers.Tokenizer:
    """The other common kind: words that begin with a mark for the space, and single bytes for the rest."""
    vocabulary = {"<unk>": 0, "</s>": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    for piece in ["▁", "▁he", "llo", "▁world", "a", "b"]:
        vocabulary[piece] = len(vocabulary)
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.add_special_tokens(["</s>"])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def write(directory: Path, **files: Any) -> Path:
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    byte_level_backend().save(str(path / "tokenizer.json"))
    return write(
        path,
        tokenizer_config={"bos_token": "[BOS]", "eos_token": {"content": "<|im_end|>"}, "chat_template": TEMPLATE},
        config={"eos_token_id": 300},
        generation_config={"eos_token_id": [301, 302]},
    )


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    found = Tokenizer.from_directory(directory)
    assert found is not None
    return found


def with_template(template: Any, **settings: Any) -> Tokenizer:
    return Tokenizer(byte_level_backend(), {"eos_token": "<|im_end|>", "chat_template": template, **settings})


# Files


def test_a_directory_without_tokenizer_has_none(tmp_path: Path) -> None:
    assert Tokenizer.from_directory(tmp_path) is None
    assert end_token_ids(tmp_path) == frozenset()


def test_end_tokens_are_the_union_of_three_sources(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_ids == {300, 301, 302, tokenizer.encode("<|im_end|>", add_special_tokens=False)[0]}


def test_end_tokens_of_an_inner_text_config(tmp_path: Path) -> None:
    assert end_token_ids(write(tmp_path, config={"text_config": {"eos_token_id": 7}, "eos_token_id": None})) == {7}


@pytest.mark.parametrize("value", ["2", [1, "2"], -1, True, {"a": 1}])
def test_a_malformed_end_token_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"config.json: eos_token_id"):
        end_token_ids(write(tmp_path, config={"eos_token_id": value}))


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"model": {"type": "BPE"}}', b"\xff\xfe"])
def test_a_malformed_tokenizer_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"^tokenizer.json cannot be read") as caught:
        Tokenizer.from_directory(tmp_path)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[1]", "[" * 100_000])
def test_a_malformed_companion_is_refused(tmp_path: Path, content: str) -> None:
    byte_level_backend().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"^tokenizer_config.json"):
        Tokenizer.from_directory(tmp_path)


def test_a_training_time_length_limit_does_not_cut_prompts(tmp_path: Path) -> None:
    backend = byte_level_backend()
    backend.enable_truncation(4)
    backend.save(str(tmp_path / "tokenizer.json"))
    found = Tokenizer.from_directory(tmp_path)
    assert found is not None
    assert found.decode(found.encode(PROSE[0])) == PROSE[0]


# Tokens and text


def test_encode_adds_what_the_checkpoint_asks_for(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("fox")[0] == tokenizer.bos_id
    assert tokenizer.bos_id not in tokenizer.encode("fox", add_special_tokens=False)
    assert tokenizer.vocab_size == byte_level_backend().get_vocab_size()


@given(st.text(max_size=60))
def test_decode_undoes_encode(tokenizer: Tokenizer, text: str) -> None:
    if not any(special in text for special in SPECIAL):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", ["\ud800", None, 3, b"bytes"])
def test_text_that_is_not_unicode_is_refused(tokenizer: Tokenizer, text: Any) -> None:
    with pytest.raises(RequestError, match="valid Unicode"):
        tokenizer.encode(text)


@pytest.mark.parametrize("skip", [True, False])
@given(data=st.data())
def test_pieces_of_any_tokens_add_up_to_one_decode(tokenizer: Tokenizer, skip: bool, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=150))
    stream = tokenizer.stream(skip_special_tokens=skip)
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    shown = ""
    for token_id in ids:
        shown += stream.push(token_id)
        assert whole.startswith(shown)
    assert shown + stream.finish() == whole


@given(st.text(alphabet=st.characters(codec="utf-8"), min_size=1, max_size=60))
def test_text_streams_without_replacement_characters_and_without_delay(tokenizer: Tokenizer, text: str) -> None:
    if "\ufffd" in text or any(special in text for special in SPECIAL):
        return
    stream = tokenizer.stream()
    ids = tokenizer.encode(text, add_special_tokens=False)
    shown = "".join(stream.push(token_id) for token_id in ids)
    assert shown == text
    assert stream.finish() == ""


@given(st.lists(st.sampled_from(["hello", " world", "a", "好", "é", "🦊", "ab"]), max_size=40))
def test_byte_fallback_streams_whole_characters(parts: list[str]) -> None:
    backend = byte_fallback_backend()
    tokenizer = Tokenizer(backend, {"eos_token": "</s>"})
    ids = []
    for part in parts:
        known = {"hello": ["▁he", "llo"], " world": ["▁world"], "a": ["a"], "ab": ["a", "b"]}
        names = known.get(part) or [f"<0x{byte:02X}>" for byte in part.encode()]
        ids += [backend.token_to_id(name) for name in names]
    stream = tokenizer.stream()
    shown = "".join(stream.push(token_id) for token_id in ids)
    assert "\ufffd" not in shown
    assert shown + stream.finish() == tokenizer.decode(ids)


def test_endless_invalid_bytes_are_shown_with_bounded_work(tokenizer: Tokenizer) -> None:
    calls: list[int] = []
    continuation = byte_level_backend().token_to_id("Ģ")  # the byte 0x80
    stream = tokenizer.stream()
    decode = stream._decode
    stream._decode = lambda ids: calls.append(len(ids)) or decode(ids)  # type: ignore[func-returns-value]
    shown = "".join(stream.push(continuation) for _ in range(500))
    assert 500 - 3 <= len(shown) < 500
    assert max(calls) <= 65
    assert shown + stream.finish() == "\ufffd" * 500


# Chats


def test_chat_template_renders_and_encodes(tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "naïve 🦊"}]
    text = tokenizer.apply_chat_template(messages)
    assert text == (
        "<|im_system|>system<|im_middle|>be brief<|im_end|><|im_user|>user<|im_middle|>naïve 🦊<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>"
    )
    assert tokenizer.encode_chat(messages) == tokenizer.encode(text, add_special_tokens=False)
    assert not tokenizer.apply_chat_template(messages, add_generation_prompt=False).endswith("<|im_middle|>")


def test_text_parts_are_joined(tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert tokenizer.encode_chat([{"role": "user", "content": parts}]) == tokenizer.encode_chat(
        [{"role": "user", "content": "one two"}]
    )


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ("hello", "messages"),
        (None, "messages"),
        (["hello"], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": "x"}, {"role": 3, "content": "x"}], "messages[1].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0]"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
def test_a_malformed_message_is_named(tokenizer: Tokenizer, messages: Any, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        tokenizer.encode_chat(messages)
    assert caught.value.field == field
    assert field.split("[")[0] in str(caught.value)


@given(
    st.lists(
        st.one_of(st.sampled_from([*SPECIAL, "\ue000", "\ue001", "<|im_", "end|>", "<", "\n"]), st.text(max_size=5)),
        max_size=8,
    ).map("".join)
)
def test_special_tokens_spelled_by_a_user_do_not_control(tokenizer: Tokenizer, content: str) -> None:
    ids = tokenizer.encode_chat([{"role": "user", "content": content}])
    control = [tokenizer.decode([one], skip_special_tokens=False) for one in ids]
    assert [text for text in control if text in SPECIAL] == [
        "<|im_user|>",
        "<|im_middle|>",
        "<|im_end|>",
        "<|im_assistant|>",
        "<|im_middle|>",
    ]
    # and the model still reads exactly what the user wrote
    assert tokenizer.decode(ids, skip_special_tokens=False) == tokenizer.apply_chat_template(
        [{"role": "user", "content": content}]
    )


def test_tool_arguments_reach_the_template_as_objects_in_their_order() -> None:
    source = (
        "{% for m in messages %}{% for c in m.tool_calls %}"
        "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}"
        "{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}|{{ tools | tojson }}"
    )
    call = {"id": "1", "function": {"name": "f", "arguments": '{"zeta": "<ß>", "alpha": 1}'}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    text = with_template(source).apply_chat_template(messages, tools=[{"name": "f", "description": "für"}])
    assert text == 'zeta=<ß>;alpha=1;{"zeta": "<ß>", "alpha": 1}|[{"name": "f", "description": "für"}]'
    assert call["function"] == {"name": "f", "arguments": '{"zeta": "<ß>", "alpha": 1}'}


def test_named_templates_choose_by_tools() -> None:
    chooser = with_template([{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}])
    messages = [{"role": "user", "content": "x"}]
    assert chooser.apply_chat_template(messages) == "plain"
    assert chooser.apply_chat_template(messages, tools=[{"name": "f"}]) == "tools"


def test_template_whitespace_special_names_and_generation_blocks() -> None:
    source = "  {% if true %}\n{{ eos_token }}{% generation %}a{% endgeneration %}\n  {% endif %}\nb"
    assert with_template(source).apply_chat_template([{"role": "user", "content": "x"}]) == "<|im_end|>ab"


def test_template_file_wins(tmp_path: Path) -> None:
    byte_level_backend().save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, tokenizer_config={"chat_template": "settings"})
    (tmp_path / "chat_template.jinja").write_text("file {{ strftime_now('%Y') | length }}")
    found = Tokenizer.from_directory(tmp_path)
    assert found is not None
    assert found.apply_chat_template([{"role": "user", "content": "x"}]) == "file 4"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot render"),
        ("{{ '{0.__class__}'.format(messages) }}{{ messages.append(1) }}", "cannot render"),
        ("{{ messages[0].content.nothing.more }}", "cannot render"),
        ("{% for i in range(99999999) %}{% endfor %}", "cannot render"),
        ("{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "longer than"),
        ("{{ 'x' * 3000000000 }}", "too long"),
        ("{{ 2 ** 3 ** 99 }}", "too large"),
        ("{{ 1 // 0 }}", "cannot render"),
    ],
)
def test_a_template_cannot_reach_out_or_grow(source: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        with_template(source).apply_chat_template([{"role": "user", "content": "x"}])


def test_bad_template_and_missing_template() -> None:
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(CheckpointError, match="line 1"):
        with_template("{% if %}").encode_chat(messages)
    with pytest.raises(RequestError, match="no chat template"):
        with_template(None).encode_chat(messages)


def test_template_arguments_are_allowed_by_name_and_type() -> None:
    tokenizer = with_template("{{ enable_thinking }}")
    messages = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(messages, enable_thinking=False) == "False"
    with pytest.raises(RequestError, match="'messages_'") as caught:
        tokenizer.apply_chat_template(messages, messages_=[1])
    assert caught.value.field == "messages_"
    with pytest.raises(RequestError, match="must be a bool"):
        tokenizer.apply_chat_template(messages, enable_thinking="yes")
    with pytest.raises(RequestError, match="tools must be a list"):
        tokenizer.apply_chat_template(messages, tools="f")  # type: ignore[arg-type]
