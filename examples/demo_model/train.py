"""Trains a demo model.

    python train.py WORK_DIR --tokenizer TOKENIZER_JSON --minutes 20 [--layout bailing]

Reads WORK_DIR/prose.txt, writes WORK_DIR/weights.safetensors (fp32) and WORK_DIR/state.pt (to resume with --resume).
On a GPU it needs fla-core; without one it runs, slowly, in plain torch: --tiny makes that a quick check of the script.
The schedule follows the clock: learning rate, row lengths and the end depend on the share of --minutes that has passed.
A number written to WORK_DIR/minutes changes --minutes while the training runs.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from batches import NAMES, START_WEIGHTS, Encoder, Maker, Stream, evaluation_cells
from config import LAYOUTS, TINY
from export import stacked
from model import DemoModel
from optimizer import Muon
from safetensors.torch import load_file, save_file
from torch import Tensor


def is_matrix(name: str, w: Tensor) -> bool:
    """Whether Muon trains it: matrices inside the layers, but not routers and the narrow b_proj."""
    apart = ("embed", "lm_head", "conv1d", "A_log", "gate.weight", "b_proj.weight")
    low_rank = ("f_b_proj.weight", "g_b_proj.weight", "kv_b_proj.weight")
    return w.dim() >= 2 and (name.endswith(low_rank) or not any(part in name for part in apart))


class Trainer:
    def __init__(self, model: DemoModel, args: argparse.Namespace, device: str) -> None:
        self.model, self.args, self.device = model, args, device
        trained = {n: w for n, w in model.weights.items() if w.requires_grad}
        self.matrices = [w for n, w in trained.items() if is_matrix(n, w)]
        others = [w for n, w in trained.items() if not is_matrix(n, w)]
        self.muon = Muon(self.matrices)
        self.adam = torch.optim.AdamW(
            others, lr=args.adam_rate, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.0, fused=device == "cuda"
        )
        self.step_number, self.spent = 0, 0.0

    def rate(self, progress: float) -> float:
        """Warm-up, constant, then a straight line down over the last part of the training."""
        warm = min(1.0, (self.step_number + 1) / self.args.warmup)
        down = min(1.0, max(0.0, (1.0 - progress) / self.args.decay_share))
        return warm * max(down, 0.01)

    def step(self, arrays: tuple[np.ndarray, ...], progress: float) -> Tensor:
        tokens, target, weight = self.to_device(arrays)
        loss, _, counts = self.model.loss(tokens, target, weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.adam.param_groups[0]["params"], 1.0)
        rate = self.rate(progress)
        self.adam.param_groups[0]["lr"] = self.args.adam_rate * rate
        self.adam.step()
        self.muon.step(self.args.muon_rate * rate)
        self.model.balance(counts, 0.002 * rate)
        for w in self.model.parameters():
            w.grad = None
        self.step_number += 1
        self.counts = counts
        return loss.detach()

    def to_device(self, arrays: tuple[np.ndarray, ...]) -> tuple[Tensor, Tensor, Tensor]:
        tokens, target, weight = (torch.from_numpy(a) for a in arrays)
        if self.device == "cuda":
            tokens, target, weight = (
                t.pin_memory().to(self.device, non_blocking=True) for t in (tokens, target, weight)
            )
        return tokens.long(), target.long(), weight.float()

    def evaluate(self, cells) -> dict[tuple[str, int], float]:
        """Share of instances whose whole answer is predicted, which is exact match under greedy decoding.

        Runs with gradients enabled, so that the compiled code of the training steps is used.
        """
        scores = {}
        for cell, batches in cells.items():
            right, total = 0, 0
            for batch in batches:
                tokens, target, weight = self.to_device((batch.tokens, batch.target, batch.weight))
                _, hit, _ = self.model.loss(tokens, target, weight)
                asked = weight > 0
                right += int((hit | ~asked).all(1)[asked.any(1)].sum())
                total += int(asked.any(1).sum())
            scores[cell] = right / max(total, 1)
        return scores

    def save(self, folder: Path, with_state: bool) -> None:
        weights = {n: w.detach().cpu() for n, w in self.model.weights.items()}
        note = {"layout": self.args.layout, "shape": json.dumps(self.args.shape)}
        save_file(weights, folder / "weights.tmp", metadata=note)
        (folder / "weights.tmp").replace(folder / "weights.safetensors")
        if with_state:
            state = {
                "weights": weights,
                "adam": self.adam.state_dict(),
                "muon": self.muon.state(),
                "step": self.step_number,
                "spent": self.spent,
            }
            torch.save(state, folder / "state.tmp")
            (folder / "state.tmp").replace(folder / "state.pt")

    @torch.no_grad()
    def resume(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        for name, w in self.model.weights.items():
            w.copy_(state["weights"][name])
        self.adam.load_state_dict(state["adam"])
        self.muon.load(state["muon"])
        self.step_number, self.spent = state["step"], state["spent"]


def new_weights(scores: dict[tuple[str, int], float]) -> dict[str, float]:
    """More of what is answered wrongly: a skill's share grows with the error of its worst distance."""
    weights = dict(START_WEIGHTS)
    for name in NAMES:
        worst = min((score for (skill, _), score in scores.items() if skill == name), default=0.9)
        weights[name] = START_WEIGHTS[name] * (0.35 + min(1.0, 3 * (1.0 - worst)))
    return weights


def table(scores: dict[tuple[str, int], float]) -> str:
    return "  ".join(f"{name}{'@' + str(d) if d else ''} {score:.3f}" for (name, d), score in scores.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--layout", choices=LAYOUTS, default="kimi")
    parser.add_argument("--shape", type=json.loads, default={}, help='JSON, such as {"heads": 4}: fields of the config')
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--batch-tokens", type=int, default=61440)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--muon-rate", type=float, default=4e-3)
    parser.add_argument("--adam-rate", type=float, default=2e-3)
    parser.add_argument("--decay-share", type=float, default=0.35)
    parser.add_argument("--evaluate-every", type=float, default=60.0, help="seconds")
    parser.add_argument(
        "--instances", type=int, default=96, help="evaluation instances per skill and distance, 0: none"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--candidates", type=int, default=3, help="launch configurations tried per GPU kernel")
    parser.add_argument("--start", type=Path, help="exported model.safetensors to go on from")
    parser.add_argument("--until", type=float, help="Unix time of the end, in place of --minutes")
    parser.add_argument(
        "--lengths", type=json.loads, help='JSON, such as {"256": 0.5, "1024": 0.5}: row lengths throughout'
    )
    parser.add_argument(
        "--mix", type=json.loads, default={}, help='JSON, such as {"count": 4.0}: first shares of skills'
    )
    parser.add_argument("--documents", type=float, help="share of conversations that begin with a document, throughout")
    parser.add_argument("--prose", type=float, default=0.2, help="share of rows that are prose")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--compile-backend", default="inductor")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)  # a decayed state is full of denormals, which a CPU is slow at
    maker = Maker(args.tokenizer, args.work / "prose.txt", args.batch_tokens, args.layout)
    maker.document_share, maker.prose_share = args.documents, args.prose
    if args.lengths:
        maker.curriculum = ((1.01, {int(length): share for length, share in args.lengths.items()}),)
    stream = Stream(maker, args.workers, args.seed)  # forked before CUDA is used
    stream.set_weights(START_WEIGHTS | args.mix)
    encoder = Encoder(args.tokenizer)
    held_out = evaluation_cells(encoder, "eval", args.instances, args.batch_tokens, 0)
    known = evaluation_cells(encoder, "train", args.instances, args.batch_tokens, 7_000_000, maker.composer.prose)
    print(f"{len(maker.prose):,} tokens of prose", flush=True)

    if args.tiny:
        args.shape = TINY | args.shape
    config = LAYOUTS[args.layout](**args.shape)
    model = DemoModel(config, torch.bfloat16 if device == "cuda" else torch.float32).to(device)
    if device == "cuda":
        from kda import kda_fla, limit_autotuning
        from lightning import lightning_fla

        limit_autotuning(args.candidates)
        model.kda, model.lightning = kda_fla, lightning_fla
        torch.backends.cuda.matmul.allow_tf32 = True
    if device == "cuda" or args.compile_backend != "inductor":
        model.compiled = lambda f: torch.compile(f, dynamic=False, backend=args.compile_backend)
    model.prepare()
    if args.start:
        saved = stacked(load_file(args.start), config, list(model.weights))
        with torch.no_grad():
            for name, w in model.weights.items():
                w.copy_(saved[name])
    trainer = Trainer(model, args, device)
    if args.resume:
        trainer.resume(args.work / "state.pt")
    print(f"{sum(w.numel() for w in model.parameters()):,} parameters", flush=True)

    started = time.perf_counter()
    trainer.step(stream.next(), 0.0)
    print(f"first step after {time.perf_counter() - started:.1f} s", flush=True)
    if args.until:
        args.minutes = (args.until - time.time() + trainer.spent) / 60
    started, before = time.perf_counter(), trainer.spent
    evaluated = reported = started
    tokens_done, losses, first = 0, [], True
    while True:
        now = time.perf_counter()
        trainer.spent = before + now - started
        progress = trainer.spent / (60 * args.minutes)
        if progress >= 1.0:
            break
        stream.progress.value = progress
        arrays = stream.next()
        losses.append(trainer.step(arrays, progress))
        tokens_done += arrays[0].size
        if trainer.step_number % 20 == 0 and (now - reported > 10 or trainer.step_number <= 100):
            mean = float(torch.stack(losses).mean())
            speed = tokens_done / (time.perf_counter() - reported)
            load = torch.stack(trainer.counts)
            uneven = float((load.max(1).values / load.mean(1)).max())
            print(
                f"{trainer.spent:6.0f} s  step {trainer.step_number}  loss {mean:.4f}  {speed / 1e3:.0f}k tokens/s  "
                f"waiting {stream.queue.qsize()}  load {uneven:.2f}",
                flush=True,
            )
            if not math.isfinite(mean):
                raise SystemExit("the loss is not finite")
            reported, tokens_done, losses = time.perf_counter(), 0, []
        if args.instances and (now - evaluated > args.evaluate_every or (first and now - started > 20)):
            first = False
            begun = time.perf_counter()
            scores = trainer.evaluate(held_out)
            print(f"eval {table(scores)}", flush=True)
            stream.set_weights(new_weights(trainer.evaluate(known)))
            trainer.save(args.work, with_state=False)
            if (args.work / "minutes").exists():
                args.minutes = float((args.work / "minutes").read_text())
            evaluated = time.perf_counter()
            print(
                f"evaluation took {evaluated - begun:.1f} s; weights {[round(w, 2) for w in stream.weights]}",
                flush=True,
            )
    stream.stop()
    trainer.save(args.work, with_state=True)
    scores = trainer.evaluate(held_out) if args.instances else {}
    print(f"end after {trainer.step_number} steps\neval {table(scores)}", flush=True)
    rows = [{"skill": s, "distance": d, "exact_match": x} for (s, d), x in scores.items()]
    (args.work / "scores.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
