"""Write the token ids of a data set to files, so that repeated runs and benchmarks do not tokenise again.

    python scripts/tokenize_dataset.py --dataset c4 --output_dir tokens/ --max_tokens 1B
    python run_pretrain.py --dataset tokens/ ...

Writes <output_dir>/train.bin and validation.bin: little-endian uint16 (uint32 for more than 65,536 ids), every document
followed by the end-of-sequence id, in the order of the files; beside each a .json with dtype, tokenizer, vocab_size,
eos_token_id, documents, tokens. Where the data set has no validation split, documents are held out of the other.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout, installed or not

from peft_pretraining.config.flag_groups import DataArgs  # noqa: E402
from peft_pretraining.config.flags import parse_path, read_specs  # noqa: E402
from peft_pretraining.data.eval_set import read_documents  # noqa: E402
from peft_pretraining.data.held_out import open_split  # noqa: E402
from peft_pretraining.data.order import DamageCount  # noqa: E402
from peft_pretraining.data.sources.kind import TextKind  # noqa: E402
from peft_pretraining.data.sources.mapped_tokens import TokenFiles, TokenMixture  # noqa: E402
from peft_pretraining.data.sources.registry import (  # noqa: E402
    default_tokenizers_in_words,
    find_kind,
    text_kinds_in_words,
)
from peft_pretraining.data.tokenizer import Tokenizer, load_tokenizer  # noqa: E402
from peft_pretraining.data.waiting import progress  # noqa: E402
from peft_pretraining.errors import UserError  # noqa: E402

DOCUMENTS_PER_BATCH = 512
SOURCE_FLAGS = ("dataset_config", "dataset_revision", "train_split", "validation_split", "text_column", "text_unit")
"""Flags of run_pretrain.py that say how a data set is read."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help=text_kinds_in_words())
    parser.add_argument(
        "--tokenizer",
        default="",
        help=f"hub name, directory or tokenizer.json (default: {default_tokenizers_in_words()})",
    )
    parser.add_argument(
        "--output_dir", required=True, type=parse_path, help="folder for the token files; made if missing"
    )
    parser.add_argument(
        "--splits", nargs="+", metavar="SPLIT", help="such as train validation (default: all there are)"
    )
    parser.add_argument("--max_tokens", default="0", help="tokens of each split, such as 100M or 1.5B (default 0: all)")
    parser.add_argument(
        "--damaged_limit", type=int, default=100, help="damaged lines and files to skip before giving up"
    )
    for spec in read_specs(DataArgs):
        if spec.name in SOURCE_FLAGS:
            text = f"{spec.help} ({spec.default_text})"
            parser.add_argument(f"--{spec.name}", default=spec.default, choices=spec.flag.choices or None, help=text)
    args = parser.parse_args(argv)
    options = DataArgs(**{name: getattr(args, name) for name in SOURCE_FLAGS}).source_options
    try:
        max_tokens = parse_count(args.max_tokens)
        kind = find_kind(args.dataset)
        if not isinstance(kind, TextKind):
            raise UserError(f"--dataset {args.dataset}: it holds token ids already.")
        tokenizer = load_tokenizer(args.tokenizer, args.dataset, options=options)
        for split in args.splits or kind.splits:
            if split not in kind.splits:
                raise UserError(f"--splits {split}: --dataset {args.dataset} has {' and '.join(kind.splits)}")
            source = open_split(args.dataset, split, options)
            assert not isinstance(source, TokenFiles | TokenMixture)
            texts = read_documents(source, DamageCount(args.damaged_limit))
            write_split(texts, tokenizer, args.output_dir, split, max_tokens)
    except (UserError, OSError) as error:
        print(f"tokenize_dataset.py: {error}", file=sys.stderr)
        return 2
    return 0


def parse_count(text: str) -> int:
    """100M, 1.5B, 20K or a plain number."""
    factor = {"K": 10**3, "M": 10**6, "B": 10**9}.get(text[-1:].upper(), 1)
    try:
        return int(float(text if factor == 1 else text[:-1]) * factor)
    except ValueError:
        raise UserError(f"--max_tokens {text}: give a number, or one followed by K, M or B.") from None


def write_split(texts: Iterator[str], tokenizer: Tokenizer, folder: Path, split: str, max_tokens: int) -> None:
    """Write <folder>/<split>.bin and its sidecar; both appear under their names only when they are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    target, partial = folder / f"{split}.bin", folder / f"{split}.bin.partial"
    documents = tokens = 0
    start = time.perf_counter()
    with partial.open("wb") as file, progress(f"{split} of {target.parent}", "tokens", max_tokens or None) as done:
        while (not max_tokens or tokens < max_tokens) and (batch := list(islice(texts, DOCUMENTS_PER_BATCH))):
            before = tokens
            for ids in tokenizer.encode_documents(batch):
                file.write(np.array(ids, dtype).tobytes())
                documents += 1
                tokens += len(ids)
                if max_tokens and tokens >= max_tokens:
                    break
            done(tokens - before)
    if not tokens:
        partial.unlink()
        raise UserError(f"the {split} split has no documents")
    settings = {
        "dtype": "uint16" if dtype.itemsize == 2 else "uint32",
        "tokenizer": tokenizer.name,
        "tokenizer_fingerprint": tokenizer.fingerprint(),
        "vocab_size": tokenizer.vocab_size,
        "eos_token_id": tokenizer.eos_token_id,
        "documents": documents,
        "tokens": tokens,
    }
    # The sidecar first: ids of unknown type would be refused, a sidecar without ids is merely unused.
    target.with_name(target.name + ".json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    partial.replace(target)
    rate = tokens / (time.perf_counter() - start)
    print(f"{target}: {documents:,} documents, {tokens:,} tokens, {rate:,.0f} tokens/s")


if __name__ == "__main__":
    sys.exit(main())
