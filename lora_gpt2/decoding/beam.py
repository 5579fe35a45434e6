"""Beam search and sampling over any model that gives logits.

Knows no tokenizer, file, model or device: functions from one state of Q queries, each at its own length, to
the next, so that queries may come and go. K beams, V vocabulary, L longest output, N outputs kept.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_gpt2.decoding.choices import chances, drawn, top_log_probs
from lora_gpt2.decoding.config import DecodingSettings, Dialect, EarlyStopping, Strategy
from lora_gpt2.decoding.phrases import Candidate, Phrases, allocate, missing, wanted
from lora_gpt2.decoding.rules import forbid, forbid_repeated_ngrams, penalise_repetition
from lora_gpt2.decoding.state import Beams, Choice, rows_of

Head = Callable[[Tensor], Tensor]
"""Hidden states (N, C) to logits (N, V), which may be overwritten."""

_HEAD_ROWS = {"cpu": 160}
"""Rows of logits that are computed, and reduced to their best tokens, at a time; elsewhere all."""


class Search:
    """One step at a time.

    `dialect=reference` is the published implementation's algorithm: of all K * V continuations the K best
    survive; one that ends leaves its beam dead and competes by score; at `eval_len` tokens the living ones
    compete too. A query is done as soon as no living beam can still win, which changes no result:
    log-probabilities are at most 0, so a beam's best possible score is known.
    """

    def __init__(
        self, settings: DecodingSettings, end_tokens: list[int], device: torch.device, context_size: int
    ) -> None:
        """`context_size`: tokens of the longest context."""
        self.settings, self.device = settings, device
        self.hf = settings.dialect is Dialect.hf
        self.said_size = context_size if self.hf else 0
        self.candidates = settings.beam_size * (max(2, 1 + len(end_tokens)) if self.hf else 1)
        self.ends = torch.tensor(end_tokens, device=device)
        self._end_tokens = frozenset(end_tokens)
        lengths = range(1, settings.eval_len + 1)
        self.norms = torch.tensor([0.0, *(n**settings.length_penalty for n in lengths)], device=device)

    def start(self, numbers: Sequence[int], contexts: Sequence[Sequence[int]], beams: int = 1) -> Beams:
        """Queries with `beams` empty beams each, the first alive; `numbers` seed their samples."""
        count, longest, device = len(numbers), self.settings.eval_len, self.device
        kept = self.settings.beam_size if self.hf else self.settings.n_best
        said = torch.zeros(count, self.said_size, dtype=torch.long)
        for row, context in enumerate(contexts if self.hf else ()):
            said[row, self.said_size - len(context) :] = torch.tensor(context)
        said_lengths = torch.tensor([len(context) if self.hf else 0 for context in contexts])
        running = torch.full((count, beams), -torch.inf)
        running[:, 0] = 0
        return Beams(
            said=said.to(device),
            said_lengths=said_lengths.to(device),
            chances=chances(self.settings, numbers).to(device),
            lengths=torch.zeros(count, dtype=torch.long, device=device),
            running=running.to(device),
            tokens=torch.zeros(count, beams, longest, dtype=torch.long, device=device),
            log_probs=torch.zeros(count, beams, longest, device=device),
            best_scores=torch.full((count, kept), -torch.inf, device=device),
            best_lengths=torch.zeros(count, kept, dtype=torch.long, device=device),
            best_tokens=torch.zeros(count, kept, longest, dtype=torch.long, device=device),
            best_log_probs=torch.zeros(count, kept, longest, device=device),
        )

    def extend(
        self, beams: Beams, hidden: Tensor, head: Head, phrases: Sequence[Phrases] = ()
    ) -> tuple[Beams, Tensor]:
        """Adds a token to each beam: the beams' next state and their parents (Q, K).

        `hidden` (N, C) are what `head` makes logits of, for some rows at a time: of the beams that are alive,
        those whose `running` is above -inf, in their order. `phrases`, for each query, must be in its
        outputs; an output that ends without them competes only where no other does.
        Raises ValueError when there are fewer tokens than are to be chosen.
        """
        if self.settings.strategy is Strategy.sample:
            choice = self._drawn(beams, hidden, head)
        elif any(phrases):
            choice = self._with_phrases(beams, hidden, head, phrases)
        else:
            choice = self._best(beams, hidden, head)
        after = replace(beams, lengths=beams.lengths + 1)
        last = (after.lengths == self.settings.eval_len)[:, None]
        width = self.settings.beam_size
        ended = torch.isin(choice.tokens, self.ends)
        competing = ((ended | last) & (choice.running > -torch.inf))[:, :width]
        if any(phrases):
            competing = competing & self._may_compete(beams, choice, phrases, competing)
        if competing.any():
            self._offer(after, beams, choice, competing)
        if self.hf:  # as many living beams however many have ended
            order = (choice.running.masked_fill(ended, -torch.inf)).sort(dim=1, descending=True, stable=True)
            choice, ended = choice.at(order.indices[:, :width]), ended.gather(1, order.indices[:, :width])
        after.running = choice.running.masked_fill(ended, -torch.inf)
        after.tokens, after.log_probs = beams.extended(choice)
        return after, choice.parents

    def done(self, beams: Beams) -> Tensor:
        """(Q,) whether the outputs are final."""
        longest, worst = self.settings.eval_len, beams.best_scores[:, -1]
        stopping = self.settings.early_stopping
        if self.hf and (stopping is not EarlyStopping.never or self.settings.length_penalty <= 0):
            best = beams.lengths
        elif self.settings.length_penalty > 0:
            best = torch.full_like(beams.lengths, longest)
        else:
            best = (beams.lengths + 1).clamp(max=longest)
        done = (beams.lengths == longest) | (worst >= beams.running.amax(dim=1) / self.norms[best])
        return done | (worst > -torch.inf) if self.hf and stopping is EarlyStopping.first else done

    def _best(self, beams: Beams, hidden: Tensor, head: Head) -> Choice:
        """The best continuations of each query, best first."""
        queries, alive = beams.running.shape
        log_probs, tokens = self._candidates(beams, hidden, head)
        log_probs, tokens = log_probs.view(queries, alive, -1), tokens.view(queries, alive, -1)
        groups = self.settings.beam_groups
        chosen: list[Choice] = []
        for group in range(groups):
            members = slice(group * alive // groups, max(1, (group + 1) * alive // groups))
            chosen.append(self._best_of(beams, log_probs, tokens, members, chosen))
        return Choice(*(torch.cat(parts, dim=1) for parts in zip(*chosen, strict=True)))

    def _candidates(
        self, beams: Beams, hidden: Tensor, head: Head, also: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and tokens (Q * K, M) of each beam's likeliest continuations, and of `also`."""
        parts = [
            self._top(beams, rows, head(part), None if also is None else also[rows])
            for rows, part in self._parts(beams, hidden)
        ]
        log_probs, tokens = (torch.cat(part) for part in zip(*parts, strict=True))
        return beams.spread(log_probs, -torch.inf), beams.spread(tokens, 0)

    def _top(self, beams: Beams, rows: Tensor, logits: Tensor, also: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same of these rows of all beams."""
        count = self.candidates
        if count > logits.size(1):
            what = f"beam_size {self.settings.beam_size} is larger than the vocabulary of"
            raise ValueError(f"{what} {logits.size(1)}" + " allows" * self.hf)
        if self.hf:  # transformers applies its rules to log-probabilities
            logits = logits.log_softmax(dim=1, dtype=torch.float32)
        self._apply_rules(beams, rows, logits)
        if also is not None:  # some may be end tokens of outputs that may not end yet
            count = min(count + len(self.ends), logits.size(1))
        log_probs, tokens = top_log_probs(logits, count, also, normalised=self.hf)
        return log_probs.nan_to_num(nan=-torch.inf, neginf=-torch.inf), tokens  # nan: all was forbidden

    def _parts(self, beams: Beams, hidden: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows (of Q * K) that are alive and their hidden states, some at a time."""
        size = _HEAD_ROWS.get(self.device.type, len(hidden))
        return zip(torch.split(beams.alive(), size), torch.split(hidden, size), strict=True)

    def _best_of(
        self, beams: Beams, log_probs: Tensor, tokens: Tensor, members: slice, earlier: list[Choice]
    ) -> Choice:
        """The best continuations (Q, M / groups) of the beams `members`, given what other groups chose."""
        count = log_probs.size(2)
        log_probs, tokens = log_probs[:, members], tokens[:, members].flatten(1)
        running = (beams.running[:, members, None] + log_probs).flatten(1)  # (Q, members * M)
        worth = running
        for choice in earlier:
            alive = choice.running > -torch.inf
            same = (tokens[:, :, None] == choice.tokens[:, None]) & alive[:, None]  # (Q, members * M, -)
            worth = worth - self.settings.diversity_penalty * same.sum(dim=2)
        order = worth.sort(dim=1, descending=True, stable=True).indices
        order = order[:, : count // self.settings.beam_groups]
        parents = order // count + members.start
        return Choice(parents, *(x.gather(1, order) for x in (tokens, log_probs.flatten(1), running)))

    def _with_phrases(self, beams: Beams, hidden: Tensor, head: Head, phrases: Sequence[Phrases]) -> Choice:
        """As `_best`, the beams of each query shared out by how much of its phrases they have said."""
        alive, width = beams.running.size(1), self.settings.beam_size
        histories = [
            [tokens[:length] for tokens in query]
            for query, length in zip(beams.tokens.tolist(), beams.lengths.tolist(), strict=True)
        ]
        asked = [
            wanted(tokens, own) for query, own in zip(histories, phrases, strict=True) for tokens in query
        ]
        most = max(map(len, asked))
        also = torch.tensor([[*tokens, *[-1] * (most - len(tokens))] for tokens in asked]).to(
            self.device, torch.long
        )
        log_probs, tokens = self._candidates(beams, hidden, head, also)
        sums = beams.running.flatten()[:, None] + log_probs
        table = tokens.tolist(), log_probs.tolist(), sums.tolist()
        found: list[list[Candidate]] = []
        for query, own in enumerate(histories):
            candidates = [
                Candidate(parent, *values)
                for parent in range(alive)
                for values in zip(*(column[query * alive + parent] for column in table), strict=True)
            ]
            possible = [
                candidate
                for candidate in candidates
                if candidate.running > -torch.inf
                and self._may_end(candidate.token, own[candidate.parent], phrases[query])
            ]
            best = allocate(possible, own, phrases[query], width)
            found.append([*best, *[Candidate(0, 0, -torch.inf, -torch.inf)] * (width - len(best))])
        return Choice(*(torch.tensor(part, device=self.device) for part in _columns(found)))

    def _may_end(self, token: int, history: list[int], phrases: Phrases) -> bool:
        return token not in self._end_tokens or not missing([*history, token], phrases)

    def _may_compete(
        self, beams: Beams, choice: Choice, phrases: Sequence[Phrases], competing: Tensor
    ) -> Tensor:
        """(Q, K) whether the output holds its phrases, or no output of the query does."""
        tokens, _ = beams.extended(choice)
        whole = torch.tensor(
            [
                [not missing(row[: length + 1], own) for row in query]
                for query, length, own in zip(tokens.tolist(), beams.lengths.tolist(), phrases, strict=True)
            ],
            device=self.device,
        )
        none_yet = beams.best_scores[:, :1].isneginf() & ~(whole & competing).any(dim=1, keepdim=True)
        return whole | none_yet

    def _drawn(self, beams: Beams, hidden: Tensor, head: Head) -> Choice:
        """One continuation of each beam, by chance."""
        queries, alive = beams.running.shape
        count = self.settings.beam_size
        at = beams.lengths[:, None, None].expand(-1, count, 1)
        uniform = beams.chances.gather(2, at).view(queries * alive, -1)  # several for the first token
        found = []
        for rows, part in self._parts(beams, hidden):
            logits = head(part)
            self._apply_rules(beams, rows, logits)
            found.append(drawn(logits.float(), uniform[rows], self.settings))
        log_probs, tokens = (torch.cat(parts) for parts in zip(*found, strict=True))
        log_probs = beams.spread(log_probs, -torch.inf).view(queries, count)
        tokens = beams.spread(tokens, 0).view(queries, count)
        parents = torch.arange(count, device=self.device).clamp(max=alive - 1).repeat(queries, 1)
        return Choice(parents, tokens, log_probs, beams.running.gather(1, parents) + log_probs)

    def _apply_rules(self, beams: Beams, rows: Tensor, scores: Tensor) -> None:
        """Changes the scores (N, V) of these rows of all beams (Q * K)."""
        alive, longest = beams.running.size(1), int(beams.lengths.max())
        queries = rows // alive
        tokens = beams.tokens[..., :longest].flatten(0, 1)[rows]
        history = torch.cat((beams.said[queries], tokens), dim=1)
        lengths = beams.lengths[queries]
        starts, stops = self.said_size - beams.said_lengths[queries], self.said_size + lengths
        penalise_repetition(scores, history, starts, stops, self.settings.repetition_penalty)
        if self.settings.min_length:
            forbid(scores, lengths < self.settings.min_length, self.ends)
        forbid_repeated_ngrams(scores, history, starts, stops, self.settings.no_repeat_ngram_size)

    def _offer(self, after: Beams, before: Beams, choice: Choice, competing: Tensor) -> None:
        """Lets the first continuations compete where `competing` (Q, K) says so."""
        choice = Choice(*(x[:, : competing.size(1)] for x in choice))
        scores = choice.running / self.norms[after.lengths][:, None]
        scores = torch.cat((before.best_scores, scores.masked_fill(~competing, -torch.inf)), dim=1)
        order = scores.sort(dim=1, descending=True, stable=True).indices[:, : before.best_scores.size(1)]
        lengths = after.lengths[:, None].expand_as(competing)
        tokens, log_probs = before.extended(choice)
        after.best_scores = scores.gather(1, order)
        after.best_lengths = torch.cat((before.best_lengths, lengths), dim=1).gather(1, order)
        after.best_tokens = rows_of(torch.cat((before.best_tokens, tokens), dim=1), order)
        after.best_log_probs = rows_of(torch.cat((before.best_log_probs, log_probs), dim=1), order)


def _columns(queries: list[list[Candidate]]) -> list[list[list[Any]]]:
    """Parents, tokens, log-probabilities and sums, each (Q, K)."""
    return [[[getattr(one, name) for one in query] for query in queries] for name in Candidate._fields]
