"""Answers that keep to a grammar: which tokens may come next, found beside the forward pass.

Where a sequence is in its grammar is a function of the grammar and the tokens so far. So nothing of it travels: an
instance that takes a sequence over, or resumes it, reads the known tokens again.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Final

import llguidance
import numpy as np
from numpy.typing import NDArray

from disagg.base.errors import DisaggError
from disagg.base.request import GenerationRequest
from disagg.models.grammar import GrammarCompiler

COMPILE_DEADLINE_S: Final = 60.0
"""A grammar that the server took is compiled in milliseconds, once the vocabulary is read."""

_logger = logging.getLogger(__name__)

MakeCompiler = Callable[[tuple[int, ...]], GrammarCompiler]
"""From the tokens that end an answer."""


class Grammars:
    """Compiles the grammars of sequences in ``thread``, while their prompts are computed."""

    def __init__(self, make_compiler: MakeCompiler, thread: Executor) -> None:
        self._make_compiler = make_compiler
        self._thread = thread
        self._compilers: dict[tuple[int, ...], GrammarCompiler] = {}

    def prepare(self, eos_token_ids: Callable[[], tuple[int, ...]]) -> "Future[None]":
        """Read the vocabulary while the weights are loaded, rather than while the first grammar's step waits for it.

        ``eos_token_ids`` is called in the thread, and gives the tokens that end an answer unless a request says others.
        """
        return self._thread.submit(self._prepare, eos_token_ids)

    def _prepare(self, eos_token_ids: Callable[[], tuple[int, ...]]) -> None:
        try:
            self._compiler(eos_token_ids()).prepare()
        except DisaggError as error:
            _logger.info("grammars cannot be used with this model: %s", error)

    def state_of(self, request: GenerationRequest) -> "GrammarState | None":
        """Return where a sequence is in its grammar, None for one without."""
        if not request.sampling.grammar:
            return None
        compiled = self._thread.submit(self._compile, request.sampling.grammar, request.eos_token_ids)
        return GrammarState(compiled, request.output_token_ids)

    def _compile(self, grammar: str, eos_token_ids: tuple[int, ...]) -> llguidance.LLMatcher:
        return self._compiler(eos_token_ids).compile(grammar)

    def _compiler(self, eos_token_ids: tuple[int, ...]) -> GrammarCompiler:
        if eos_token_ids not in self._compilers:
            self._compilers[eos_token_ids] = self._make_compiler(eos_token_ids)
        return self._compilers[eos_token_ids]


class GrammarState:
    """Where one sequence is in its grammar. ``failure`` says why it cannot go on, if so."""

    def __init__(self, compiled: "Future[llguidance.LLMatcher]", output_token_ids: Sequence[int]) -> None:
        self._compiled = compiled
        self._matcher: llguidance.LLMatcher | None = None
        self._unread = list(output_token_ids)
        self.failure = ""

    def accept(self, token_id: int) -> None:
        """Note the next token of the sequence."""
        self._unread.append(token_id)

    @property
    def is_complete(self) -> bool:
        """Whether the text is one of the grammar's, and can have no more tokens."""
        matcher = self._read()
        return matcher is not None and matcher.is_stopped() and not matcher.is_error()

    def fill(self, allowed: NDArray[np.uint32]) -> None:
        """Set in ``allowed`` [vocab / 32, rounded up] the bits of the tokens that may come next, and no others.

        None at all where the grammar cannot go on.
        """
        matcher = self._read()
        if matcher is not None:
            matcher.unsafe_compute_mask_ptr(allowed.ctypes.data, allowed.nbytes)
            self._check(matcher)
        if self.failure:
            allowed.fill(0)

    def _read(self) -> llguidance.LLMatcher | None:
        """Return the matcher after all tokens, None where there is none."""
        if self._matcher is None:
            try:
                self._matcher = self._compiled.result(COMPILE_DEADLINE_S)
            except (DisaggError, TimeoutError) as error:
                self.failure = f"the grammar cannot be used: {error or 'it was not compiled in time'}"
                return None
        if self._unread:
            self._matcher.consume_tokens(self._unread)
            self._unread.clear()
            self._check(self._matcher)
        return self._matcher

    def _check(self, matcher: llguidance.LLMatcher) -> None:
        if matcher.is_error():
            self.failure = f"the answer cannot go on by the grammar: {matcher.get_error().strip().splitlines()[0]}"
