"""A small text and a small run that the tests of the trainer share."""

import torch

from minillm.pretrain import TrainConfig
from minillm.tokenizer import CharTokenizer
from minillm.train import train
from minillm.transformer import GPT, GPTConfig

DOCS = [f"story {i}: " + "abcdefgh ij"[: 3 + i % 8] * (1 + i % 5)
        for i in range(400)]  # fmt: skip
TOKENIZER = CharTokenizer.train("".join(DOCS))
TOKENS = TOKENIZER.encode_documents(DOCS[:360])
HELD_OUT = TOKENIZER.encode_documents(DOCS[360:])
SHAPE = GPTConfig(vocab_size=TOKENIZER.vocab_size, context_length=32,
                  d_model=16, n_layers=2, n_heads=2, dropout=0.1)  # fmt: skip


def config(**changes):
    base = dict(max_steps=12, batch_size=4, warmup_steps=2, eval_every=4,
                checkpoint_every=4, log_every=2, device="cpu",
                dtype="float32")  # fmt: skip
    return TrainConfig(**base | changes)


def run(out_dir=None, *, seed=0, cfg=None, **options):
    options = {"tokenizer": TOKENIZER, "progress": False} | options
    model = GPT(SHAPE, seed=seed)
    return model, train(model, TOKENS, HELD_OUT, cfg or config(),
                        out_dir=out_dir, **options)  # fmt: skip


def same_weights(a, b):
    return all(torch.equal(p, q)
               for p, q in zip(a.parameters(), b.parameters()))  # fmt: skip
