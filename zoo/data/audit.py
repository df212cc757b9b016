"""Facts about an encoded sample that decide whether a model learns to begin and to stop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from zoo.text.samples import Encoded
from zoo.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class BosEosAudit:
    """What is at the ends of a sample.

    Attributes:
        starts_with_bos: the first token is BOS.
        double_bos: the first two are.
        ends_with_eos: the last token that is learnt is EOS.
        last_learnt: the text of that token: an end of turn where that is not EOS.
        truncated: the end was cut off.
        n_tokens, n_supervised: how many there are, and are learnt.
    """

    starts_with_bos: bool
    double_bos: bool
    ends_with_eos: bool
    last_learnt: str | None
    truncated: bool
    n_tokens: int
    n_supervised: int

    def problems(self, tokenizer: Tokenizer) -> list[str]:
        """What is wrong, one sentence each."""
        found = []
        if self.double_bos and tokenizer.bos_id != tokenizer.eos_id:
            found.append("the text begins with two BOS tokens: the template writes one and the tokenizer adds another.")
        if tokenizer.bos_id is not None and tokenizer.bos_id in tokenizer.ends[0] and not self.starts_with_bos:
            found.append("the tokenizer puts BOS before every text, and this one begins without it.")
        ended = self.ends_with_eos or self.truncated or self.last_learnt in (None, *tokenizer.marks)
        if not ended:
            found.append(f"the last token that is learnt is {self.last_learnt!r}: the model does not learn to stop.")
        return found


def bos_eos_audit(encoded: Encoded, tokenizer: Tokenizer) -> BosEosAudit:
    """The facts about one sample."""
    ids = encoded.ids.tolist()
    learnt = [token for token, is_learnt in zip(ids, encoded.supervised, strict=True) if is_learnt]
    bos = tokenizer.bos_id
    return BosEosAudit(
        starts_with_bos=bos is not None and ids[:1] == [bos],
        double_bos=bos is not None and ids[:2] == [bos, bos],
        ends_with_eos=bool(learnt) and learnt[-1] == tokenizer.eos_id,
        last_learnt=tokenizer.decode(learnt[-1:], skip_special_tokens=False) if learnt else None,
        truncated=encoded.truncated,
        n_tokens=len(ids),
        n_supervised=len(learnt),
    )


def masked_text(encoded: Encoded, tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """The text of a sample in runs, each with whether it is learnt: what to show before training."""
    ids, shown = encoded.ids.tolist(), ""
    for end in range(1, len(ids) + 1):
        if end < len(ids) and encoded.supervised[end] == encoded.supervised[end - 1]:
            continue
        text = tokenizer.decode(ids[:end], skip_special_tokens=False)  # a decoder may join neighbours
        if end < len(ids) and text.endswith("\ufffd"):
            continue  # inside a character
        yield text[len(shown) :], bool(encoded.supervised[end - 1])
        shown = text
