"""Decoding on a GPT-2: contexts run once, and queries come and go while the others go on."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import psutil
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lora_gpt2.decoding.beam import Search
from lora_gpt2.decoding.config import DecodingSettings
from lora_gpt2.decoding.phrases import Phrases
from lora_gpt2.decoding.state import Beams, Hypothesis
from lora_gpt2.model.cache import BeamTree, RowCache
from lora_gpt2.model.language_model import GPT2LMModel

Watch = Callable[[Beams, Tensor], None]
"""Sees the beams after each token, and their parents (Q, K) before it."""


class Query(NamedTuple):
    number: int
    context: Sequence[int]
    adapter: str = ""
    phrases: Phrases = ()
    """Tokens of phrases that the output must contain."""


def decode(
    model: GPT2LMModel,
    contexts: Sequence[Sequence[int]],
    settings: DecodingSettings,
    end_tokens: list[int],
    phrases: Sequence[Phrases] = (),
) -> list[list[Hypothesis]]:
    """The best outputs of each context, best first, whatever else is decoded. `model` is in eval mode.

    `phrases`, for each context, are token lists that its outputs must contain.

    Raises ValueError when a context is empty, or exceeds the model's positions together with `eval_len`, and
    for phrases where `settings` take none.
    """
    asked = zip(contexts, phrases or [()] * len(contexts), strict=True)
    queries = (Query(number, context, phrases=own) for number, (context, own) in enumerate(asked))
    found = dict(decode_stream(model, queries, settings, end_tokens))
    return [found[number] for number in range(len(contexts))]


@torch.inference_mode()
def decode_stream(
    model: GPT2LMModel,
    queries: Iterable[Query],
    settings: DecodingSettings,
    end_tokens: list[int],
    watch: Watch = lambda beams, parents: None,
) -> Iterator[tuple[int, list[Hypothesis]]]:
    """(number, best outputs) of each query, in the order in which they are done; adapters are not looked at.

    `batch_size` queries are decoded at a time; the next ones are read when there is room for them.
    """
    waiting = iter(queries)
    fresh = list(islice(waiting, settings.batch_size or fitting_batch(model, settings)))
    if not fresh:
        return
    pool = _Pool(model, settings, end_tokens, len(fresh), watch)
    while fresh or pool.numbers:
        if not fresh:
            pool.step()
        while fresh:
            size = max(1, _CONTEXT_TOKENS // max(1, *(len(query.context) for query in fresh)))
            pool.admit(fresh[:size])
            fresh = fresh[size:]
        yield from pool.take_done()
        room = pool.places - len(pool.numbers)
        enough = room * _SHARE >= pool.places
        fresh = list(islice(waiting, room)) if enough else []
        if enough and not fresh:
            pool.shrink()


def fitting_batch(model: GPT2LMModel, settings: DecodingSettings) -> int:
    """Queries that keep the processor busy, and whose keys and values fit into half of the free memory."""
    weight, config = model.transformer.wte.weight, model.config
    tokens = config.n_ctx - settings.eval_len + settings.beam_size * settings.eval_len  # at most
    size = 2 * config.n_layer * config.n_embd * tokens * weight.element_size()
    if weight.is_cuda:
        rows, free = 2560, torch.cuda.mem_get_info(weight.device)[0]
    else:
        rows, free = 160 * max(1, 1024 // config.n_embd), psutil.virtual_memory().available
    return max(1, min(rows // settings.beam_size, free // 2 // size))


_SHARE = 8
"""New queries enter, or the pool shrinks, when one place in so many is free: either costs about a step."""


_MULTIPLE = 32
"""Beams that are computed at a time are a multiple of this."""

_CONTEXT_TOKENS = 8192
"""Tokens of contexts, padding included, that run through the model at a time."""


class _Pool:
    """The queries that are being decoded, each at its place."""

    def __init__(
        self,
        model: GPT2LMModel,
        settings: DecodingSettings,
        end_tokens: list[int],
        places: int,
        watch: Watch,
    ) -> None:
        self.model, self.places, self.watch = model, places, watch
        self.device = model.transformer.wte.weight.device
        longest = max(0, model.config.n_ctx - settings.eval_len)
        self.search = Search(settings, end_tokens, self.device, longest)
        self.numbers: dict[int, int] = {}  # of the query at each taken place
        self.contexts = torch.zeros(places, dtype=torch.long, device=self.device)  # (P,) lengths
        self.parents = torch.zeros(places, settings.beam_size, dtype=torch.long, device=self.device)
        self.beams = self.search.start([0] * places, [[]] * places, settings.beam_size)
        self.phrases: list[Phrases] = [()] * places
        self.tree: BeamTree | None = None

    def admit(self, queries: Sequence[Query]) -> None:
        """Runs the contexts and chooses their first tokens."""
        self._check(queries)
        free = [place for place in range(self.places) if place not in self.numbers][: len(queries)]
        self.numbers |= zip(free, (query.number for query in queries), strict=True)
        for place, query in zip(free, queries, strict=True):
            self.phrases[place] = query.phrases
        places = torch.tensor(free, device=self.device)
        lengths = torch.tensor([len(query.context) for query in queries], device=self.device)
        rows = [torch.tensor(query.context, device=self.device) for query in queries]
        caches = [RowCache() for _ in self.model.transformer.h]
        hidden = self.model.transformer.hidden_states(pad_sequence(rows, batch_first=True), caches=caches)
        presents = [cache.present for cache in caches if cache.present is not None]
        if self.tree is None:
            self.tree = BeamTree(len(caches), self.places, self.parents.size(1), presents[0])
        self.tree.admit(places, lengths, presents)
        last = hidden[torch.arange(len(rows), device=self.device), lengths - 1]
        start = self.search.start([query.number for query in queries], [query.context for query in queries])
        phrases = [query.phrases for query in queries]
        beams, parents = self.search.extend(start, last, self.model.lm_head, phrases)
        self.watch(beams, parents)
        self.beams.put(places, beams)
        self.parents[places] = parents
        self.contexts[places] = lengths

    def step(self) -> None:
        """One token more for every query."""
        assert self.tree is not None
        beams = self.beams
        alive = beams.running > -torch.inf
        computed = _rounded(alive)
        self.tree.advance(self.parents, alive, computed)
        newest = (beams.lengths - 1).clamp(min=0)
        tokens = beams.tokens.gather(2, newest[:, None, None].expand(*self.parents.shape, 1))  # (P, K, 1)
        positions = (self.contexts + newest)[:, None, None].expand_as(tokens)
        hidden = self.model.transformer.hidden_states(tokens[computed], positions[computed], self.tree.layers)
        last = hidden[alive[computed], 0]
        self.beams, self.parents = self.search.extend(beams, last, self.model.lm_head, self.phrases)
        self.watch(self.beams, self.parents)
        self._clear(place for place in range(self.places) if place not in self.numbers)

    def take_done(self) -> Iterator[tuple[int, list[Hypothesis]]]:
        """Numbers and outputs of the queries that are done; their places become free."""
        done = self.search.done(self.beams).tolist()
        places = [place for place in self.numbers if done[place]]
        for place in places:
            yield self.numbers.pop(place), self.beams.hypotheses(place, self.search.settings.n_best)
            self.phrases[place] = ()
        self._clear(places)

    def shrink(self) -> None:
        """Gives up the free places."""
        places = list(self.numbers)
        rows = torch.tensor(places, dtype=torch.long, device=self.device)
        self.numbers = {row: self.numbers[place] for row, place in enumerate(places)}
        self.places, self.beams = len(places), self.beams.keep(rows)
        self.contexts, self.parents = self.contexts[rows], self.parents[rows]
        self.phrases = [self.phrases[place] for place in places]
        if self.tree is not None:
            self.tree.keep(rows)

    def _clear(self, places: Iterable[int]) -> None:
        """What is at these places is over: no beam of it is alive."""
        rows = torch.tensor(list(places), dtype=torch.long, device=self.device)
        self.beams.lengths[rows] = 0
        self.beams.running[rows] = -torch.inf

    def _check(self, queries: Sequence[Query]) -> None:
        positions, settings = self.model.config.n_ctx, self.search.settings
        longest = max(len(query.context) for query in queries)
        if longest + settings.eval_len > positions:
            what = f"a context of {longest} tokens and eval_len {settings.eval_len}"
            raise ValueError(f"{what} exceed the model's {positions} positions")
        if not all(len(query.context) for query in queries):
            raise ValueError("a context has no token")
        if any(query.phrases for query in queries) and not settings.takes_phrases:
            raise ValueError("phrases need strategy=beam, dialect=reference and beam_groups=1")


def _rounded(alive: Tensor) -> Tensor:
    """(P, K) `alive` and some that are not, so that the blocks have few different numbers of rows.

    Libraries prepare products for each, and keep what they prepared.
    """
    rows = alive.flatten().clone()
    rows[(~rows).nonzero()[: -int(rows.sum()) % _MULTIPLE, 0]] = True
    return rows.view_as(alive)
