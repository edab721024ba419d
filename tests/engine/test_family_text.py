"""The text side of the families: their prompts, end tokens, and ids that must never be sampled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from statewise import LLM, SamplingParams
from statewise.engine.chat_template import ChatTemplate
from statewise.engine.tokenizer import Tokenizer
from tests.checkpoints import bailing_config, minimax_config, write_checkpoint
from tests.engine.test_tokenizer import byte_level_backend

# Text-01 wants the content as a list of parts and shows nothing of a string.
TEXT_01 = (
    "{% for message in messages %}{{ '<beginning_of_sentence>' }}"
    "{% if message.role == 'system' %}{{ 'system ai_setting=assistant\n' }}"
    "{% elif message.role == 'user' %}{{ 'user name=user\n' }}{% else %}{{ 'ai name=assistant\n' }}{% endif %}"
    "{{ message['content'][0]['text'] + '<end_of_sentence>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<beginning_of_sentence>ai name=assistant\n' }}{% endif %}"
)
M1 = (
    "{{ '<begin_of_document>' }}{% for message in messages %}{{ '<beginning_of_sentence>user name=user\n' }}"
    "{% if message.content is string %}{{ message.content | trim }}"
    "{% else %}{% for part in message.content %}{{ part.text | trim }}{% endfor %}{% endif %}"
    "{{ '<end_of_sentence>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<beginning_of_sentence>ai name=assistant\n' }}{% endif %}"
)
RING = (
    "{% if messages[0].role == 'system' %}{{ '<role>SYSTEM</role>' + messages[0].content + '\n' }}"
    "{% else %}{{ '<role>SYSTEM</role>' }}{% endif %}{{ 'detailed thinking off<|role_end|>' }}"
    "{% for message in messages if message.role == 'user' %}"
    "{{ '<role>HUMAN</role>' + message.content + '<|role_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<role>ASSISTANT</role>' }}{% endif %}"
)
CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " Hello "}]


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (
            TEXT_01,
            CHAT,
            "<beginning_of_sentence>system ai_setting=assistant\nBe kind.<end_of_sentence>\n"
            "<beginning_of_sentence>user name=user\n Hello <end_of_sentence>\n"
            "<beginning_of_sentence>ai name=assistant\n",
        ),
        (
            M1,
            CHAT[1:],
            "<begin_of_document><beginning_of_sentence>user name=user\nHello<end_of_sentence>\n"
            "<beginning_of_sentence>ai name=assistant\n",
        ),
        (
            RING,
            CHAT,
            "<role>SYSTEM</role>Be kind.\ndetailed thinking off<|role_end|><role>HUMAN</role> Hello <|role_end|>"
            "<role>ASSISTANT</role>",
        ),
    ],
    ids=["text-01", "m1", "ring"],
)
@pytest.mark.parametrize("as_parts", [False, True])
def test_prompts_of_the_families(template: str, messages: list[dict[str, str]], expected: str, as_parts: bool) -> None:
    """A client may send strings or parts; a template gets what it can read."""
    tokenizer = Tokenizer(byte_level_backend(), {"chat_template": template})
    given = [
        {**message, "content": [{"type": "text", "text": message["content"]}] if as_parts else message["content"]}
        for message in messages
    ]
    assert tokenizer.apply_chat_template(given) == expected


def test_a_template_that_refuses_a_lone_message_gets_strings() -> None:
    source = "{% if messages | length < 2 %}{{ raise_exception('two messages') }}{% endif %}{{ messages[1].content }}"
    assert ChatTemplate(source, {}).render(CHAT, False, None, {}) == " Hello "


def test_a_template_of_parts_may_want_a_system_message() -> None:
    source = (
        "{% if messages | length < 2 %}{{ raise_exception('no system') }}{% endif %}{{ messages[1].content[0].text }}"
    )
    assert ChatTemplate(source, {}).render(CHAT, False, None, {}) == " Hello "


def test_the_end_token_of_a_minimax_comes_from_its_generation_configuration(tmp_path: Path) -> None:
    """config.json says null."""
    write_checkpoint(tmp_path, minimax_config(), seed=1)
    prompt = {"prompt_token_ids": [5, 6, 7]}
    llm = LLM(tmp_path, num_records=2, num_pages=8, dtype="float32")
    greedy = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=6))[0].outputs[0].token_ids
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["eos_token_id"] is None
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [greedy[3]]}))
    again = LLM(tmp_path, num_records=2, num_pages=8, dtype="float32")
    answer = again.generate(prompt, SamplingParams(temperature=0, max_tokens=6))[0].outputs[0]
    assert (answer.token_ids, answer.finish_reason) == (greedy[: greedy.index(greedy[3]) + 1], "stop")


def test_chat_turns_of_ring_end_at_an_id_that_only_the_generation_configuration_names(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, bailing_config(), seed=1)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 319]}')
    llm = LLM(tmp_path, num_records=2, num_pages=8, dtype="float32")
    assert llm.engine.eos_ids == {1, 319}


def test_blank_rows_of_the_embedding_are_never_sampled(tmp_path: Path) -> None:
    """MiniMax's embedding has all-zero rows behind the vocabulary; nothing was trained for them."""
    write_checkpoint(tmp_path, minimax_config(), seed=1)
    tensors = load_file(tmp_path / "model.safetensors")
    blank = [17, 318, 319]
    tensors["model.embed_tokens.weight"][blank] = 0.0
    tensors["lm_head.weight"][blank] = 30 * torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    save_file(tensors, tmp_path / "model.safetensors")
    llm = LLM(tmp_path, num_records=4, num_pages=16, dtype="float32")
    assert llm.engine.sampler.vocab_size == 318
    assert llm.engine.sampler.blank_ids.tolist() == [17]
    prompts = [{"prompt_token_ids": [5, 6, i]} for i in range(20, 28)]
    assert any(int(llm.logits([5, 6, i])[-1].argmax()) in blank for i in range(20, 28))
    for params in (SamplingParams(temperature=0), SamplingParams(temperature=1.5, seed=3, logprobs=5)):
        for output in llm.generate(prompts, params):
            assert not set(output.outputs[0].token_ids) & set(blank)
    scored = llm.generate({"prompt_token_ids": [5, 319, 6]}, SamplingParams(max_tokens=1, prompt_logprobs=2))[0]
    assert scored.error is None
    assert scored.prompt_logprobs is not None
    values = [entry.logprob for entry in scored.prompt_logprobs if entry is not None]
    assert values[0] == -9999.0  # it cannot come
    assert -50 < values[1] < 0
