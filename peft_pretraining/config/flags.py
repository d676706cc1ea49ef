"""Command-line flags generated from frozen dataclasses.

Every field of a group is one flag of the same name. Its type and limits come from the annotation
(`Annotated[int, Flag("updates", at_least=0)]`), its default from the field, and its help from the docstring under the
field. argparse formats the help and splits the command line; values are converted here, so that all problems of a
command line are collected.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import itertools
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_type_hints

from peft_pretraining.config.tried_names import RENAMED, meant_values, normal_form, what_is_right
from qgalore.config import Allowed, limits_of

_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_COUNT = re.compile(r"((?:\d+\.?\d*|\.\d+)(?:e\+?\d+)?)([KMBT]?)", re.IGNORECASE)
_LARGEST_EXPONENT = 18  # beyond 64 bits, and an exponent of a billion would fill the memory with digits
# Units of flags that take a path, or may; a shell expands ~ only at the beginning of a word, not in --flag=~/folder.
_PATH_UNITS = ("file", "folder", "name_or_path")
_COUNT_SUFFIX = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_SIZE = re.compile(r"(\d+\.?\d*|\.\d+) ?([MGT]i?)B?", re.IGNORECASE)
_SIZE_SUFFIX = {"m": 10**6, "g": 10**9, "t": 10**12, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}


@dataclass(frozen=True)
class Flag(Allowed):
    """The unit and limits of a flag and the function that parses its text; part of the field's annotation."""

    parse: Callable[[str], Any] | None = None
    listing: Callable[[], str] | None = None
    """Returns the text that replaces `{listing}` in the docstring, for values that other modules define."""
    unless: str = ""
    """Of a required flag: another one that stands in for it."""


@dataclass(frozen=True)
class FlagSpec:
    """One flag, as read from a field of a group."""

    name: str
    group: type
    kind: type
    optional: bool
    default: Any  # dataclasses.MISSING for a required flag
    docstring: str
    flag: Flag

    @property
    def help(self) -> str:
        """The text of the help."""
        return self.docstring.replace("{listing}", self.flag.listing()) if self.flag.listing else self.docstring

    @property
    def is_switch(self) -> bool:
        """Whether the flag stands alone on the command line."""
        return self.kind is bool

    @property
    def can_be_denied(self) -> bool:
        """Whether a switch has a --no- form, because it is not always off by default."""
        return self.is_switch and (self.optional or self.default is True or bool(self.flag.auto))

    @property
    def default_text(self) -> str:
        """The default as the help shows it."""
        if self.default is dataclasses.MISSING:
            return f"required without --{self.flag.unless}" if self.flag.unless else "required"
        if self.flag.auto:
            return f"default: {self.flag.auto if isinstance(self.flag.auto, str) else self.flag.auto()}"
        if self.is_switch:
            return f"default: {'on' if self.default else 'off'}"
        if self.flag.parse is parse_count:
            return f"default: {format_count(self.default)}"
        return f"default: {self.default if self.default != '' else 'none'}"


@dataclass(frozen=True)
class ParsedFlags:
    """The values of a command line by flag name, and its problems in sentences."""

    values: dict[str, Any]
    problems: list[str]
    unreadable: set[str]
    """Flags whose value is missing or wrong: combinations with them are not checked."""


def parse_count(text: str) -> int:
    """A whole number with an optional suffix K, M, B or T (powers of 1000), such as 5000, 100M, 1.1B or 1e9."""
    match = _COUNT.fullmatch(text.strip().replace("_", ""))
    try:
        return _whole(Decimal(match[1]) * _COUNT_SUFFIX[match[2].upper()] if match else Decimal("nan"))
    except ValueError:
        raise ValueError(
            "a number with an optional suffix K, M, B or T, such as 5000, 100M, 1.1B or 1e9, and a whole one"
        ) from None


def parse_whole(text: str) -> int:
    """A whole number in any notation: 1000, 1_000, 1e3, 1.5e3. Raises ValueError for others, such as 1.5."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return _whole(Decimal(text.strip()))
    except (InvalidOperation, ValueError):
        raise ValueError("a whole number") from None


def whole_number(text: str) -> int:
    """`parse_whole` as a type for argparse. Raises ArgumentTypeError."""
    try:
        return parse_whole(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}, it must be {error}") from None


def _whole(number: Decimal) -> int:
    """Convert exactly. Raises ValueError for what is not whole, not finite, or has too many digits."""
    if not number.is_finite() or number.adjusted() > _LARGEST_EXPONENT or number != number.to_integral_value():
        raise ValueError("a whole number")
    return int(number)


def parse_size(text: str) -> int:
    """Bytes of a size of memory with its unit, such as 24GB (10^9 bytes), 22.5GiB (2^30) or 800MB."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or not float(match[1]):
        raise ValueError("a size with its unit, such as 24GB (10^9 bytes) or 22.5GiB (2^30)")
    return round(float(match[1]) * _SIZE_SUFFIX[match[2].lower()])


def format_size(nbytes: int) -> str:
    """The shortest form that `parse_size` reads back as the same number, to the megabyte: 24GB, 22.5GB, 800MB."""
    return f"{nbytes / 10**9:.3f}".rstrip("0").rstrip(".") + "GB" if nbytes >= 10**9 else f"{nbytes / 10**6:g}MB"


def names_given(argv: Sequence[str]) -> set[str]:
    """The names of the flags of a command line."""
    return {token.partition("=")[0].removeprefix("--") for token in argv if token.startswith("--")}


def flag_values(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Flags of a command line with the text that follows them."""
    for token, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        name, glued, value = token.partition("=")
        yield name, value if glued else following


def is_given(argv: Sequence[str], name: str, value: str | None = None) -> bool:
    """Whether a command line has a flag, with this value if one is asked for."""
    return any(flag == f"--{name}" and value in (None, text) for flag, text in flag_values(argv))


def parse_path(text: str) -> Path:
    """A path, with ~ for the user's folder; a type for argparse. Raises ArgumentTypeError for an unknown user."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(
            f"a path whose {text.partition('/')[0]} is the folder of a user: there is no such user; write ./{text} for "
            "a file of that name"
        ) from None


def parse_name_or_path(text: str) -> str:
    """A name, or a path with ~ for the user's folder; a type for argparse. Raises ArgumentTypeError as `parse_path`."""
    return str(parse_path(text)) if text.startswith("~") else text


def format_count(count: int) -> str:
    """The shortest form that `parse_count` reads back as the same number: 10000000 is 10M."""
    for suffix in ("T", "B", "M", "K"):
        if count and count % _COUNT_SUFFIX[suffix] == 0:
            return f"{count // _COUNT_SUFFIX[suffix]}{suffix}"
    return str(count)


@cache
def read_specs(group: type) -> tuple[FlagSpec, ...]:
    """The flags of one dataclass group, in the order of its fields."""
    hints, limits = get_type_hints(group), limits_of(group)
    # A subclass that changes the default of a field keeps the help of its base class.
    texts = {name: text for owner in reversed(group.__mro__[:-1]) for name, text in _field_docstrings(owner).items()}
    specs = []
    for field in dataclasses.fields(group):
        hint, allowed = hints[field.name], limits.get(field.name, Allowed())
        flag = allowed if isinstance(allowed, Flag) else Flag(**vars(allowed))
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        optional, kind = NoneType in kinds, next(kind for kind in kinds if kind is not NoneType)
        specs.append(FlagSpec(field.name, group, kind, optional, field.default, texts[field.name], flag))
    return tuple(specs)


def _field_docstrings(group: type) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(group))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for node, following in zip(body.body, body.body[1:], strict=False):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if isinstance(following, ast.Expr):
            texts[node.target.id] = " ".join(str(ast.literal_eval(following.value)).split())
    return texts


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=118)


def build_parser(groups: Mapping[str, type], description: str, usage: str) -> argparse.ArgumentParser:
    """The parser whose `--help` shows `groups` (title -> dataclass) with a type, unit and default for every flag."""
    parser = argparse.ArgumentParser(
        description=description, usage=usage, allow_abbrev=False, formatter_class=_HelpFormatter
    )
    for title, group in groups.items():
        section = parser.add_argument_group(title, inspect.getdoc(group))
        for spec in read_specs(group):
            add_flag(section, spec, default=argparse.SUPPRESS)
    return parser


def add_flag(section: argparse._ActionsContainer, spec: FlagSpec, **settings: Any) -> None:
    """Add a flag with its help to a parser or a section of one; `settings` are argparse's.

    Its value is text, for `convert`. A switch that is not off by default has a --no- form beside it.
    """
    settings = {"help": f"{spec.help} ({spec.default_text})".replace("%", "%%")} | settings
    if spec.is_switch:
        action = argparse.BooleanOptionalAction if spec.can_be_denied else "store_true"
        section.add_argument(f"--{spec.name}", action=action, **settings)
    else:
        metavar = "{" + ",".join(map(str, spec.flag.choices)) + "}" if spec.flag.choices else spec.flag.unit.upper()
        section.add_argument(f"--{spec.name}", metavar=metavar, **settings)


def parse_flags(parser: argparse.ArgumentParser, groups: Mapping[str, type], argv: Sequence[str]) -> ParsedFlags:
    """Read `argv`; flags that are not given are absent from the values, problems are sentences that name the flag."""
    specs = {spec.name: spec for group in groups.values() for spec in read_specs(group)}
    tokens, problems = _pair_flags_with_values(argv, specs)
    namespace, unknown = parser.parse_known_args(tokens)
    problems += _describe_unknown(unknown, specs)
    values: dict[str, Any] = {}
    for name, raw in vars(namespace).items():
        try:
            values[name] = raw if specs[name].is_switch else convert(specs[name], raw)
        except ValueError as error:
            problems.append(str(error))
    named = names_given(argv)
    required = {name for name, spec in specs.items() if spec.default is dataclasses.MISSING}
    tried = {RENAMED.get(normal_form(token)) for token in unknown if token.startswith("-")}
    missing = required - named - tried
    for name in sorted(name for name in missing if specs[name].flag.unless not in named):
        problems.append(f"--{name} is missing: {specs[name].help[0].lower()}{specs[name].help[1:]}")
    return ParsedFlags(values, problems, unreadable=(required | named & specs.keys()) - values.keys())


def _pair_flags_with_values(argv: Sequence[str], specs: Mapping[str, FlagSpec]) -> tuple[list[str], list[str]]:
    """Write `--flag value` as `--flag=value`, so that argparse takes -1e-3 for a number; name flags without a value."""
    tokens: list[str] = []
    problems: list[str] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        spec = specs.get(token.removeprefix("--")) if token.startswith("--") else None
        if spec is None or spec.is_switch:
            name, _, value = token.partition("=")
            plain = name.removeprefix("--")
            denied = specs.get(plain.removeprefix("no-"))
            given = specs.get(plain) or (denied if denied and denied.can_be_denied else None)
            if value and given is not None and given.is_switch:
                problems.append(f"{name} is a switch and takes no value: write {name} alone, not {token}")
            else:
                tokens.append(token)
        elif rest and (not rest[0].startswith("-") or _NUMBER.fullmatch(rest[0])):
            tokens.append(f"{token}={rest.pop(0)}")
        else:
            problems.append(f"{token} has no value: write {token} {spec.flag.unit.upper() or 'VALUE'}")
    return tokens, problems


def _describe_unknown(unknown: Sequence[str], specs: Mapping[str, FlagSpec]) -> list[str]:
    problems = []
    after_unknown_flag = False
    for index, token in enumerate(unknown):
        if not token.startswith("-"):
            # The value of an unknown flag is no problem of its own.
            if not after_unknown_flag:
                problems.append(f"{token!r} belongs to no flag: every value follows its flag, as in --lr 0.01")
            after_unknown_flag = False
            continue
        name, equals, value = token.partition("=")
        after_unknown_flag = not equals
        if after_unknown_flag and index + 1 < len(unknown) and not unknown[index + 1].startswith("-"):
            value = unknown[index + 1]
        problems.append(f"{name} is no flag of this program: {_advice(name, value, specs)}")
    return problems


def _advice(name: str, value: str, specs: Mapping[str, FlagSpec]) -> str:
    switches = {spec.name for spec in specs.values() if spec.is_switch}
    dtypes = specs["dtype"].flag.choices if "dtype" in specs else ()
    right = what_is_right(name, value, switches, dtypes)
    nearest = difflib.get_close_matches(normal_form(name), specs, n=1, cutoff=0.6)
    return right or (f"did you mean --{nearest[0]}?" if nearest else "--help lists them all")


def convert(spec: FlagSpec, raw: str) -> Any:
    """The value of a flag's text; of a switch there is none. Raises ValueError with a sentence that names the flag."""
    flag = spec.flag
    if flag.choices:
        return _choose(spec, raw)
    if raw in flag.words:
        return raw
    if flag.unit in _PATH_UNITS and raw.startswith("~"):
        try:
            raw = str(parse_path(raw))
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"--{spec.name} is {raw!r}, {error}") from None
    try:
        value = flag.parse(raw) if flag.parse else parse_whole(raw) if spec.kind is int else spec.kind(raw)
    except ValueError as error:
        right = str(error) if flag.parse else {int: "a whole number", float: "a number"}.get(spec.kind, "text")
        right = " or ".join([right, *flag.words])
        raise ValueError(f"--{spec.name} is {raw!r}, it must be {right}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"--{spec.name} is {raw!r}, it must be a finite number")
    if limits := flag.missed_limits(value):
        raise ValueError(f"--{spec.name} is {raw}, it must be {limits}{f' ({flag.unit})' if flag.unit else ''}")
    return value


def _choose(spec: FlagSpec, raw: str) -> Any:
    text = spec.flag.parse(raw) if spec.flag.parse else raw
    for choice in spec.flag.choices:
        if str(choice) == text:
            return choice
    names = [str(choice) for choice in spec.flag.choices]
    nearest = meant_values(spec.name, text) or difflib.get_close_matches(text, names, n=1, cutoff=0.6)
    advice = f" (did you mean {' or '.join(nearest)}?)" if nearest else ""
    raise ValueError(f"--{spec.name} is {raw!r}, it must be one of {', '.join(names)}{advice}")
