"""What several test modules of the model share."""

import torch

from minillm.transformer import GPTConfig

TINY = GPTConfig(
    vocab_size=50, context_length=24, d_model=32, n_layers=2, n_heads=2
)
EXACT = {  # weights of the presets
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "shakespeare-10m": 10_745_472,
    "tales-1m": 1_088_256,
    "llama-tiny": 1_000_576,
}


def randn(*shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=dtype, generator=g)


def outputs_and_gradients(fn, *inputs):
    inputs = [z.clone().requires_grad_() for z in inputs]
    out = fn(*inputs)
    grad = randn(*out.shape, seed=9).to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, grad)]
