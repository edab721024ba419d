"""Training batches: rows of conversations and prose as token ids, made by worker processes."""

import multiprocessing as mp
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from conversations import LONG, SHORT, Composer, filler_lines
from tokenizers import Tokenizer

from statewise.evaluation.documents import Message
from statewise.evaluation.skills import SKILLS, Instance, make

PAD, EOS, IM_END, IM_MIDDLE = 0, 2, 3, 7
ROLE_START = {"system": 4, "user": 5, "assistant": 6}
PROSE_SHARE, PROSE_WEIGHT = 0.2, 0.25
SHORT_REPLY = 8  # a reply of fewer tokens weighs as much in the loss as one of this many

# (until this share of the training, {row length: share of the batches})
Curriculum = tuple[tuple[float, dict[int, float]], ...]
CURRICULUM: Curriculum = (
    (0.06, {256: 0.7, 512: 0.3}),
    (0.15, {256: 0.4, 512: 0.3, 1024: 0.3}),
    (0.30, {256: 0.3, 512: 0.2, 1024: 0.25, 2048: 0.25}),
    (1.01, {256: 0.25, 512: 0.15, 1024: 0.15, 2048: 0.2, 5120: 0.25}),
)
START_WEIGHTS = {
    "add": 3.0,
    "subtract": 3.0,
    "multiply": 2.0,
    "copy": 2.0,
    "sort": 2.0,
    "count": 2.0,
    "lookup": 1.0,
    "update": 1.0,
    "talk": 1.5,
}
NAMES = tuple(START_WEIGHTS)


@dataclass
class Batch:
    """Arrays [rows, length]: inputs, the tokens after them, and the weight of each prediction."""

    tokens: np.ndarray
    target: np.ndarray
    weight: np.ndarray


class Encoder:
    def __init__(self, tokenizer: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(tokenizer))
        self.roles = {role: self.tokenizer.encode(role).ids for role in ROLE_START}

    def conversation(self, messages: list[Message]) -> tuple[list[int], list[float]]:
        """Token ids as the chat template gives them, and the loss weight of each (replies and their end only)."""
        ids: list[int] = []
        weights: list[float] = []
        texts = self.tokenizer.encode_batch([message["content"] for message in messages], add_special_tokens=False)
        for message, text in zip(messages, texts, strict=True):
            head = [ROLE_START[message["role"]], *self.roles[message["role"]], IM_MIDDLE]
            ids += [*head, *text.ids, IM_END]
            wanted = max(1.0, SHORT_REPLY / (len(text.ids) + 1)) if message["role"] == "assistant" else 0.0
            weights += [0.0] * len(head) + [wanted] * (len(text.ids) + 1)
        return ids, weights


def encode_prose(encoder: Encoder, text: str) -> np.ndarray:
    """All documents as one array; each ends with [EOS]."""
    documents = [document.strip() for document in text.split("\n\n")]
    encoded = encoder.tokenizer.encode_batch([d for d in documents if d], add_special_tokens=False)
    return np.array([token for e in encoded for token in (*e.ids, EOS)], dtype=np.uint16)


def rows_to_batch(rows: list[tuple[list[int], list[float]]], length: int) -> Batch:
    ids = np.zeros((len(rows), length + 1), dtype=np.int64)
    weight = np.zeros((len(rows), length + 1), dtype=np.float32)
    for i, (row, row_weight) in enumerate(rows):
        kept = min(len(row), length + 1)
        ids[i, :kept], weight[i, :kept] = row[:kept], row_weight[:kept]
    return Batch(ids[:, :-1], ids[:, 1:], weight[:, 1:])


class Maker:
    """Makes batches of `batch_tokens` tokens."""

    def __init__(self, tokenizer: Path, prose: Path, batch_tokens: int, layout: str = "kimi") -> None:
        self.encoder = Encoder(tokenizer)
        text = prose.read_text(encoding="utf-8")
        self.prose = encode_prose(self.encoder, text)
        ends = [self.encoder.tokenizer.encode(end).ids[0] for end in ("\n", ".")]
        self.starts = np.flatnonzero(np.isin(self.prose, [*ends, EOS])) + 1
        lines = filler_lines([line for line in text.splitlines() if line])
        self.composer = Composer(lines, dict(START_WEIGHTS), layout)
        self.batch_tokens = batch_tokens
        self.curriculum = CURRICULUM
        self.document_share: float | None = None
        self.prose_share = PROSE_SHARE

    def batch(self, rng: Random, length: int) -> Batch:
        share = 0.3 if length <= 256 else 0.5 if length <= 512 else 0.9
        share = share if self.document_share is None else self.document_share
        rows: list[tuple[list[int], list[float]]] = []
        for _ in range(self.batch_tokens // length):
            if rng.random() < self.prose_share:
                anywhere = rng.randrange(int(self.starts[-1]) - length)
                start = int(self.starts[np.searchsorted(self.starts, anywhere)])
                ids = self.prose[start : start + length + 1].tolist()
                rows.append((ids, [PROSE_WEIGHT] * len(ids)))
            else:
                rows.append(self.encoder.conversation(self.composer.conversation(rng, length, share)))
        return rows_to_batch(rows, length)


def pick_length(rng: Random, curriculum: Curriculum, progress: float) -> int:
    mix = next(mix for until, mix in curriculum if progress < until)
    return rng.choices(list(mix), list(mix.values()))[0]


def work(maker: Maker, seed: int, progress, weights, queue) -> None:
    rng = Random(seed)
    while True:
        maker.composer.weights = dict(zip(NAMES, weights, strict=True))
        batch = maker.batch(rng, pick_length(rng, maker.curriculum, progress.value))
        queue.put((batch.tokens.astype(np.uint16), batch.target.astype(np.uint16), batch.weight.astype(np.float16)))


class Stream:
    """Batches from worker processes. `set_progress` and `set_weights` steer what they make next."""

    def __init__(self, maker: Maker, workers: int, seed: int) -> None:
        context = mp.get_context("fork")
        self.progress = context.Value("d", 0.0)
        self.weights = context.Array("d", list(START_WEIGHTS.values()))
        self.queue = context.Queue(maxsize=2 * workers)
        self.processes = [
            context.Process(
                target=work, args=(maker, seed * 1000 + i, self.progress, self.weights, self.queue), daemon=True
            )
            for i in range(workers)
        ]
        for process in self.processes:
            process.start()

    def next(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.queue.get(timeout=180)

    def set_weights(self, weights: dict[str, float]) -> None:
        for i, name in enumerate(NAMES):
            self.weights[i] = weights[name]

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()


def evaluation_row_length(distance: int) -> int:
    return {0: 256, 256: 1024, 1024: 2048, 2048: 3072, 4096: 5120}[distance]


def evaluation_cells(encoder: Encoder, split: str, instances: int, batch_tokens: int, seed: int, prose=None):
    """For each (skill, distance): batches whose rows are single instances with their answer."""
    cells: dict[tuple[str, int], list[Batch]] = {}
    for name in (*SHORT, *LONG):
        for distance in SKILLS[name].distances:
            length = evaluation_row_length(distance)
            size = max(1, batch_tokens // length)
            made: list[Instance] = [make(name, distance, seed + i, split, prose=prose) for i in range(instances)]
            rows = [encoder.conversation([*one.messages, {"role": "assistant", "content": one.answer}]) for one in made]
            for ids, weights in rows:  # only the last reply counts
                last = len(ids) - 1 - ids[::-1].index(ROLE_START["assistant"])
                weights[:last] = [0.0] * last
            cells[name, distance] = [
                rows_to_batch(padded(rows[i : i + size], size), length) for i in range(0, len(rows), size)
            ]
    return cells


def padded(rows: list[tuple[list[int], list[float]]], size: int) -> list[tuple[list[int], list[float]]]:
    return rows + [([PAD], [0.0])] * (size - len(rows))
