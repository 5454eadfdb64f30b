"""What the heads of a decoder attend to, and how large its residual stream grows: its portrait, beside its scores.

An *induction* head looks at what followed the token when it last occurred (Olsson et al., 2022, arXiv:2209.11895). A
*retrieval* head looks at the very token that is to be copied from afar (Wu et al., 2024, arXiv:2404.15574). A *sink* is
the first token where heads put the weight that they have no use for (Xiao et al., 2023, arXiv:2309.17453), and
*massive activations* are the few dimensions that carry it there (Sun et al., 2024, arXiv:2402.17762).
"""

from itertools import islice

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperlab.data import corpus, skills
from paperlab.data.held_out import HELD_OUT
from paperlab.devices import generator
from paperlab.nn.transformer import Transformer, generate
from paperlab.zoo.language import CONTEXT, VOCAB

PROMPTS = (
    "The argument must be an integer or a string. If it is not,",
    'def read(self, size=-1):\n    """Read up to size bytes from the file."""\n    if',
    "class Queue:\n    def __init__(self, maxsize=0):\n        self.maxsize = maxsize\n",
    "339+296=",  # its digits from the last to the first
    "Alto: mar-im bek ran-im zim. Brio:",  # two made-up languages
)
END = " ∎"  # a text is over where a model would begin the next one
SETTLED = 8  # queries before it see so few tokens that weight on the first says little


@torch.no_grad()
def patterns(model: Transformer, tokens: Int[Tensor, "rows tokens"]) -> Float[Tensor, "layers rows heads query key"]:
    """The attention of all layers."""
    names = [f"blocks.{layer}.attn.pattern" for layer in range(model.config.layers)]
    _, seen = model.run_with_cache(tokens, names)
    return torch.stack([seen[name] for name in names])


def induction_scores(model: Transformer, *, rows: int = 16) -> Float[Tensor, "layers heads"]:
    """Mean weight on what followed the same token before, over the second of two copies of random tokens."""
    length = (CONTEXT - 1) // 2
    segment = torch.randint(4, VOCAB, (rows, length), generator=generator(HELD_OUT))
    first = torch.full((rows, 1), model.tokenizer.bos)
    query = torch.arange(length + 1, 2 * length + 1)
    found = patterns(model, torch.cat([first, segment, segment], dim=1))
    return found[..., query, query - length + 1].mean((1, 3))


def retrieval_scores(model: Transformer, *, n: int = 40) -> Float[Tensor, "layers heads"]:
    """Mean weight, where a token of a looked-up value is about to be written, on that token in the list of pairs."""
    tokenizer, found = model.tokenizer, []
    for example in skills.key_value_retrieval(n, seed=HELD_OUT, part="held_out", context=(60, 200)):
        spans = example.truth["spans"]
        key, written = (torch.tensor(tokenizer.positions(example.text, spans[s])) + 1 for s in ("source", "answer"))
        tokens = torch.tensor([[tokenizer.bos, *tokenizer.encode(example.text)]])
        found.append(patterns(model, tokens)[:, 0, :, written - 1, key].mean(-1))
    return torch.stack(found).mean(0)


def first_token_scores(model: Transformer, *, rows: int = 16) -> Float[Tensor, "layers heads"]:
    """Mean weight on the first token, over held-out English."""
    return patterns(model, _english(model, rows))[..., SETTLED:, 0].mean((1, 3))


@torch.no_grad()
def stream_sizes(model: Transformer, *, rows: int = 16) -> dict[str, list[float]]:
    """After each block, over held-out English: the median absolute value of the residual stream, and the largest at the
    first token and elsewhere.
    """
    names = [f"blocks.{layer}.resid_post" for layer in range(model.config.layers)]
    _, seen = model.run_with_cache(_english(model, rows), names)
    sizes = [seen[name].abs() for name in names]
    return {
        "median": [_short(x.median()) for x in sizes],
        "largest at the first token": [_short(x[:, 0].max()) for x in sizes],
        "largest elsewhere": [_short(x[:, 1:].max()) for x in sizes],
    }


def portrait(model: Transformer) -> dict:
    """What a card keeps: scores of every head, sizes of the stream, and text that it writes."""
    heads = {
        "induction": induction_scores(model),
        "retrieval": retrieval_scores(model),
        "first token": first_token_scores(model),
    }
    return {
        "heads": {name: [[_short(x) for x in row] for row in found] for name, found in heads.items()},
        "stream": stream_sizes(model),
        "samples": [[prompt, _continued(model, prompt, seed)] for seed, prompt in enumerate(PROMPTS)],
    }


def _english(model: Transformer, rows: int) -> Int[Tensor, "rows context"]:
    """The beginnings of held-out documents."""
    _, held = corpus.split(corpus.english())
    encoded = (ids for ids in model.tokenizer.encode_batch([d.text for d in held]) if len(ids) >= CONTEXT)
    return torch.tensor([[model.tokenizer.bos, *ids[: CONTEXT - 1]] for ids in islice(encoded, rows)])


def _continued(model: Transformer, prompt: str, seed: int) -> str:
    """Forty tokens, drawn from the smallest sets that hold 95% of the probability; `END` where the model stops."""
    stop = model.tokenizer.bos
    tokens = torch.tensor([[stop, *model.tokenizer.encode(prompt)]])
    longer = generate(model, tokens, steps=40, temperature=1.0, top_p=0.95, generator=generator(seed), stop=stop)
    new = longer[0, tokens.shape[1] :].tolist()
    return model.tokenizer.decode(new) + END * (stop in new)


def _short(x: Tensor) -> float:
    return round(float(x), 4)
