"""Describe a run's data in a few lines: the splits, and how much text is cut off or unknown to the tokenizer."""

from collections.abc import Sequence
from itertools import islice

from peft_pretraining.data.sources.documents import Share, Source, describe_source, is_text
from peft_pretraining.data.sources.kind import Splits
from peft_pretraining.data.sources.mapped_tokens import TokenFiles, TokenMixture
from peft_pretraining.data.sources.mixture import Mixture
from peft_pretraining.data.tokenizer import Tokenizer

# A sample of each source: the first documents of its first shards; of a long document its beginning.
_SHARDS, _DOCUMENTS, _ITEMS, _CHARACTERS = 4, 16, 1000, 20_000
_WORTH_SAYING_CUT, _WORTH_SAYING_PADDED, _WORTH_SAYING_UNKNOWN = 0.01, 0.4, 0.001


def describe_data(
    splits: Splits, tokenizer: Tokenizer | None, packing: str, max_length: int, reads: bool = True
) -> list[str]:
    """Lines on the training and validation data; of text also `describe_losses`, unless `reads` is False."""
    lines = [f"training on {describe_split(splits.train)}", f"validation on {describe_split(splits.validation)}"]
    if not reads or tokenizer is None or splits.train is None or isinstance(splits.train, TokenFiles | TokenMixture):
        return lines
    samples = [(_first_texts(share.source), share.weight) for share in _shares(splits.train)]
    return [*lines, *describe_losses(samples, tokenizer, packing, max_length)]


def describe_losses(
    samples: Sequence[tuple[Sequence[str], float]], tokenizer: Tokenizer, packing: str, max_length: int
) -> list[str]:
    """Lines on the share of the sampled text that is cut off or unknown to the tokenizer, and of rows that is padding.

    There is none on what is small. samples: (documents, weight) of each source.
    """
    room = max_length - sum(token is not None for token in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    weights = cut = padded = unknown = 0.0
    for texts, weight in samples:
        beginnings = [text[:_CHARACTERS] for text in texts]
        encoded = tokenizer.encode(beginnings)
        if not (count := sum(map(len, encoded))):
            continue
        whole = [len(ids) * len(text) / len(begin) for ids, text, begin in zip(encoded, texts, beginnings, strict=True)]
        weights += weight
        kept = sum(min(tokens, room) for tokens in whole)
        cut += weight * (1 - kept / sum(whole))
        padded += weight * (1 - (kept / len(whole) + max_length - room) / max_length)
        if tokenizer.unk_token_id is not None:
            unknown += weight * sum(ids.count(tokenizer.unk_token_id) for ids in encoded) / count
    cut, padded, unknown = (value / weights if weights else 0.0 for value in (cut, padded, unknown))
    lines = []
    if packing == "pad" and cut >= _WORTH_SAYING_CUT:
        lines.append(
            f"a row holds one document, cut at {max_length} tokens (--packing pad): of the first documents about "
            f"{cut:.0%} of the text is cut off and never trained on; --packing pack joins documents and cuts nothing"
        )
    if packing == "pad" and padded >= _WORTH_SAYING_PADDED:
        lines.append(
            f"a row holds one document, padded to {max_length} tokens (--packing pad): of the first documents about "
            f"{padded:.0%} of the positions are padding, which takes time and trains nothing; --packing pack has none"
        )
    if unknown >= _WORTH_SAYING_UNKNOWN:
        lines.append(
            f"warning: {unknown:.1%} of the tokens of the first documents are unknown to the tokenizer, and "
            "all of these are one id: --tokenizer train:32000 trains one on this text"
        )
    return lines


def _shares(source: Source) -> Sequence[Share]:
    return source.shares if isinstance(source, Mixture) else (Share(source),)


def _first_texts(source: Source) -> list[str]:
    return [
        item
        for shard in range(min(source.shards, _SHARDS))
        for item in islice(filter(is_text, islice(source.read(shard, 1, 0, 0), _ITEMS)), _DOCUMENTS)
    ]


def describe_split(split: Source | TokenFiles | TokenMixture | None) -> str:
    """A phrase that describes a split."""
    if isinstance(split, Mixture | TokenMixture):
        shares = [(s.source, s.weight) for s in split.shares] if isinstance(split, Mixture) else split.shares
        total = sum(weight for _, weight in shares)
        return "; ".join(f"{describe_split(source)} ({weight / total:.1%} of the rows)" for source, weight in shares)
    if isinstance(split, TokenFiles):
        return split.describe()
    return "nothing" if split is None else describe_source(split)
