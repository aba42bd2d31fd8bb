"""The yaml section: PyYAML is the oracle. Whatever the reader accepts, PyYAML reads as the same value."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import plato_sandbox
from plato_sandbox import SandboxError, YamlError, YamlNode, yaml_compose, yaml_dump, yaml_load

DEEPEST = plato_sandbox.YAML_MAX_DEPTH
CORPUS = sorted((Path(__file__).parent / "data" / "yaml").iterdir())


class Oracle(yaml.SafeLoader):
    """PyYAML's safe loader, without timestamps."""


Oracle.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0] != "tag:yaml.org,2002:timestamp"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def oracle_load(text: str) -> Any:
    return yaml.load(text, Oracle)  # noqa: S506


def exact(value: Any) -> Any:
    """A form in which 1, 1.0 and True differ and nan equals itself; the order of keys means nothing."""
    if isinstance(value, dict):
        return ["dict", *sorted(([exact(key), exact(item)] for key, item in value.items()), key=repr)]
    if isinstance(value, list):
        return ["list", *map(exact, value)]
    return type(value).__name__, repr(value)


def check(text: str) -> None:
    """The reader and PyYAML make the same of a text."""
    assert exact(yaml_load(text)) == exact(oracle_load(text))


def accepts(text: str) -> bool:
    try:
        yaml_load(text)
    except YamlError:
        return False
    return True


def agrees_or_refuses(text: str) -> bool:
    """Whether the reader accepts `text`; fails when it does and PyYAML does not agree."""
    if not accepts(text):
        return False
    check(text)
    return True


def nodes(node: YamlNode) -> list[YamlNode]:
    value = node.value
    children = value if isinstance(value, list) else []
    if isinstance(value, dict):
        children = [child for pair in value.values() for child in pair]
    return [node, *(found for child in children for found in nodes(child))]


# Real files


def test_the_corpus_is_there() -> None:
    assert len(CORPUS) >= 5


@pytest.mark.parametrize("line_end", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_real_files_load_as_in_pyyaml(path: Path, line_end: str) -> None:
    text = path.read_text(encoding="utf-8").replace("\n", line_end)
    assert oracle_load(text)
    check(text)
    check("\ufeff" + text)


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_real_files_cut_anywhere_never_load_as_something_else(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    cuts = range(1, len(text), max(len(text) // 150, 1))
    accepted = [agrees_or_refuses(text[:cut]) for cut in cuts]
    assert len(accepted) >= 100


# What the reader must accept

SCALARS = """
yes|Yes|YES|no|on|Off|true|False|y|n|~|null|Null|nULL|=x|0|-0|+12|-12|012|-017|08|0o17|0_7|0x1f|-0xFF|0b101|0b2|1_000
1__0|1:60|01:30|1.|1.5|-1.5|.5|-.5|+1.5|1e3|1.0e3|1.0e+3|1.5E-3|1_0.5_0|+.nan
2001-01-01|2001-12-14t21:59:43.10-05:00|1.2.3|-|a:b|http://x/#y|:x|?x|-x|<<x|a#b|..
"""


@pytest.mark.sampled
@pytest.mark.parametrize("scalar", SCALARS.strip().replace("\n", "|").replace("|-|", "|").split("|"))
def test_plain_scalars_resolve_as_in_pyyaml(scalar: str) -> None:
    for text in (scalar, f"- {scalar}", f"k: {scalar}  # c", f"{scalar}: v", f"{scalar}\n  more"):
        check(text)


@pytest.mark.parametrize(
    "number", [".inf", "-.Inf", "+.INF", ".nan", ".NaN", "190:20:30", "8:30", "-1:30", "22:22"]
)
def test_numbers_that_few_expect_are_refused(number: str) -> None:
    assert accepts(f"k: '{number}'")
    with pytest.raises(YamlError, match="put it in quotes"):
        yaml_load(f"k: {number}")


DOCUMENTS = {
    "empty": "",
    "only-comments": "\n # a\n\n#b",
    "only-a-marker": "---\n",
    "ends": "---\na: 1\n...\n# end\n...\n",
    "byte-order-mark": "\ufeffa: 1\nb: 2\n",
    "value-behind-marker": "--- {a: 1}\n",
    "text-behind-marker": "--- |\n a\n b\n",
    "root-scalar-lines": "a\nb\n\nc # d\n",
    "same-indent-sequence": "a:\n- 1\n- 2\nb:\n  - 3\nc:",
    "compact-nesting": "- - a\n  - - b\n    -\n-   k: v\n    l:\n    - w\n- \n  - x",
    "empty-values": "a:\nb: # c\n\nc:\n  d:\n-1:\n~: x\n",
    "plain-lines": "a: one\n  two\n\n\n   three - four\n  - five\nb:\n  six\n seven\n",
    "quotes": "a: 'it''s'\nb: \"x: #\\\"\"\n'c': \"\"\n\"d\" : ''\n",
    "quoted-lines": "a: 'one\n  two \n\n\n three'\nb: \" x\n\\  y \\\n  z\\ \n\n \\t w\"\n",
    "escapes": r'"\0\a\b\t\n\v\f\r\e\ \"\/\\\N\_\L\P\x41\u00e9\U0001F600\ud800"',
    "literal": "a: |\n  one\n   two\n\n  three\n\n\nb: |-\n x\n\nc: |+\n x\n\nd: |2\n   y\n",
    "folded": "- >\n a\n b\n\n c\n   d\n   e\n f\n\n\n g\n- >-\n  x\n- >+\n  x\n\n- >1-\n  y\n",
    "block-text-empty": "a: |\nb: >+\n\nc: |-\n   \nd: |",
    "block-text-no-end": "a: |\n  x",
    "flow": "{a, b: , c: [d, e: f, {g: h},], 'i':j, \"k\": - }",
    "flow-lines": "a: [1,\n2, # c\n\n three\n four\n ]\nb: {x: [\n{}, []], y:\n  z\n  }\n",
    "flow-colons": "[a:b, http://x:80/y, {a: b:c}, \"q\":r, 's': , t:]",
    "anchors": "a: &a [1, &b x]\nc: *a\nd: &d\n  k: *b\n*b : e\nf: &f\ng: *f\n? g\n".replace(
        "? g\n", "h: *d\n"
    ),
    "anchored-keys": "&a k: v\nl: *a\nm:\n- &c n: o\n  p: *c\n- &d\n  - q\nr: &r\n  &s t: u\nv: *r\nw: *s\n",
    "merge": "a: &a {x: 1, y: 2}\nb: &b {y: 3, z: 4}\nc:\n  z: 0\n  <<: [*a, *b]\n  w: 5\nd: {<<: *b, y: 6}",
    "merge-chain": "a: &a {x: 1}\nb: &b {<<: *a, y: 2}\nc: {<<: *b, <: 3, '<<': 4}\nd: [<<: *a]\n<<: []",
}


@pytest.mark.sampled
@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in DOCUMENTS.items()])
def test_documents_load_as_in_pyyaml(text: str) -> None:
    for variant in (text, text.replace("\n", "\r\n")):
        check(variant.replace("- }", "v}"))


# What it refuses, and where, and with which words

ERRORS = [
    ("tab-indent", "a:\n\tb: 1", 2, 1, "a tab is used for indentation; use spaces"),
    ("tab-after-colon", "a:\tb", 1, 3, "tab"),
    ("tab-after-value", "a: b\t# c", 1, 5, "tab"),
    ("tab-in-brackets", "[a,\n\tb]", 2, 1, "tab"),
    ("duplicate-key", "a: 1\nb: 2\n'a': 3", 3, 1, "used twice, first on line 1"),
    ("duplicate-in-braces", "{a: 1, a: 2}", 1, 8, "used twice"),
    ("duplicate-equal", "1: a\ntrue: b", 2, 1, "the key true is used twice, first on line 1"),
    ("duplicate-merge", "a: &a {}\nb:\n  <<: *a\n  <<: *a", 4, 3, "write '<<: [*a, *b]'"),
    ("merge-scalar", "<<: 1", 1, 1, "takes a mapping or a list of mappings"),
    ("colon-in-value", "a: b: c", 1, 5, "put the value in quotes"),
    ("colon-after-quotes", "a: 'b': c", 1, 7, "quote the whole value"),
    ("quoted-key-over-lines", '"a\n b": c', 2, 4, "keep a key on one line"),
    ("colon-in-lines", "a: b\n  c: d", 2, 4, "put the value in quotes"),
    ("no-space-after-colon", "a: 1\nb:2\n", 2, 1, "a space behind the colon"),
    ("colon-missing", "a: 1\nb\n", 2, 1, "'key: value' is expected here"),
    ("key-missing", "a: 1\n: b", 2, 1, "a key is missing"),
    ("item-among-keys", "a: 1\n- b", 2, 1, "indented under its key"),
    ("item-behind-key", "a: - b", 1, 4, "on a line of its own"),
    (
        "too-deep",
        "a: 'b'\n  c: d",
        2,
        3,
        "wrong indentation: this line has 2 spaces, what starts on line 1 has 0",
    ),
    ("between", "a:\n    b: 1\n  c: 2", 3, 3, "wrong indentation"),
    ("item-between", "a:\n  - b\n - c", 3, 2, "wrong indentation"),
    ("left-of-root", "  a: 1\nb: 2", 2, 1, "does not belong to what starts on line 1"),
    ("after-comment", "a: b # c\n  d", 2, 3, "put a text of several lines in quotes"),
    ("bad-escape", 'a: "C:\\\n\\dir"', 2, 1, "\\d is no escape"),
    ("bad-hex-escape", '"\\x4g"', 1, 2, "\\x is no escape"),
    ("bad-code-point", '"a\\U00110000"', 1, 3, "\\U is no escape"),
    ("open-single-quote", "a: 'b\nc: it''s", 1, 4, "never closed"),
    ("open-double-quote", 'a: "b\\"', 1, 4, "never closed"),
    ("after-quote", "a: 'it's'", 1, 8, "text follows a closing quote"),
    ("comment-needs-space", "a: 'b'#c", 1, 7, "put one before it"),
    ("marker-in-quotes", "a: 'b\n--- c'", 2, 1, "document marker"),
    ("open-bracket", "a: [b,\nc: d\n", 1, 4, "'[' is never closed"),
    ("open-brace", "{a: [b]", 1, 1, "'{' is never closed"),
    ("wrong-bracket", "a: {b: c]", 1, 9, "',' or '}' is expected"),
    ("stray-bracket", "a: ]", 1, 4, "closes nothing"),
    ("no-comma", "['a' b]", 1, 6, "',' or ']' is expected"),
    ("two-commas", "[a,,b]", 1, 4, "a value is missing before ','"),
    ("question-mark-in-brackets", "[a?b]", 1, 3, "put the text in quotes"),
    ("marker-in-brackets", "[a,\n---\n]", 1, 1, "never closed"),
    ("dash-in-brackets", "[- a]", 1, 2, "list item"),
    ("block-text-in-brackets", "[|\n a]", 1, 2, "use quotes"),
    ("braces-as-key", "a: 1\n{b: c}: d", 2, 1, "cannot be a key"),
    ("template-braces", "a: {{ b }}", 1, 5, "cannot be a key"),
    ("alias-of-list-as-key", "a: &a []\n*a : b", 2, 1, "cannot be a key"),
    ("key-over-lines", "[a\n b: c]", 2, 3, "keep a key on one line"),
    ("colon-below-key", "{a: 1, b\n: c}", 2, 1, "keep a key on one line"),
    ("complex-key", "? a\n: b", 1, 1, "complex keys"),
    ("reserved-at", "a: @b", 1, 4, "reserved"),
    ("reserved-backtick", "- `b`", 1, 3, "reserved"),
    ("percent", "a: %b", 1, 4, "'%' cannot start"),
    ("tag", "a: !!str 1", 1, 4, "tags such as '!name' are not supported"),
    ("plain-equals", "a: =", 1, 4, "special meaning"),
    ("plain-merge-value", "a: <<", 1, 4, "special meaning"),
    ("number-without-digits", "a: 0x_", 1, 4, "put it in quotes"),
    ("fraction-in-base-60", "a: 1:30.5", 1, 4, "put it in quotes"),
    ("huge-number", "a: " + "9" * 5000, 1, 4, "put it in quotes"),
    ("block-text-header", "a: |x\n  b", 1, 4, "start the text on the next line"),
    ("block-text-blank", "a: |\n     \n  b", 3, 3, "wrong indentation"),
    ("undefined-alias", "a: *b", 1, 4, "no '&b' ends above"),
    ("bad-anchor-name", "a: &b.c d", 1, 4, "a name (letters"),
    ("anchor-twice", "a: &x 1\nb: &x 2", 2, 4, "defined twice"),
    ("two-anchors", "a: &x &y b", 1, 7, "two anchors"),
    ("two-anchors-over-lines", "a: &x\n  &y b", 1, 4, "remove the anchor"),
    ("anchored-alias", "a: &x 1\nb: &y *x", 2, 4, "an alias"),
    ("anchored-merge", "a: {&y <<: {}}", 1, 5, "remove the anchor"),
    ("alias-in-its-anchor", "a: &a [b, *a]", 1, 11, "no '&a' ends above"),
    ("second-document", "a: 1\n---\nb: 2", 2, 1, "only one document"),
    ("second-after-end", "a: 1\n...\nb: 2", 3, 1, "only one document"),
    ("end-without-start", "...\n", 1, 1, "only one document"),
    ("directive", "%TAG ! x\n---\na", 1, 1, "directive"),
    ("control-character", "a: b\x07", 1, 5, "\\x07"),
    ("next-line-character", "é: b\x85c", 1, 5, "\\x85 is not allowed"),
    ("lone-carriage-return", "a: b\rc: d", 1, 5, "\\r is not allowed"),
    ("inner-byte-order-mark", "a: \ufeffb", 1, 4, "\\ufeff"),
    ("depth-in-brackets", "[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), 1, DEEPEST + 1, "nested deeper than"),
    ("depth-in-blocks", "- " * (DEEPEST + 1) + "x", 1, 2 * DEEPEST + 1, "nested deeper than"),
]


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("text", "line", "column", "words"), [pytest.param(*row, id=name) for name, *row in ERRORS]
)
def test_errors_say_where_and_what_to_do(text: str, line: int, column: int, words: str) -> None:
    for variant in (text, "\ufeff" + text, text.replace("\n", "\r\n")):
        with pytest.raises(YamlError) as caught:
            yaml_load(variant, "config.yml")
        error = caught.value
        assert (error.source, error.line, error.column) == ("config.yml", line, column)
        assert words in error.message
        assert str(error) == f"config.yml:{line}:{column}: {error.message}"
        assert (error.exit_code, error.code) == (8, "yaml_invalid")


# Limits


DEEP = {
    "brackets": "[" * DEEPEST + "]" * DEEPEST,
    "braces": "{a: " * DEEPEST + "}" * DEEPEST,
    "dashes": "- " * DEEPEST + "x",
    "keys": "".join(" " * level + "k:\n" for level in range(DEEPEST)),
    "anchors": "".join(f"{' ' * level}- &a{level}\n" for level in range(DEEPEST)),
    "flow-anchors": "".join(f"&a{level} [" for level in range(DEEPEST)) + "]" * DEEPEST,
}


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in DEEP.items()])
def test_the_deepest_documents_load(text: str) -> None:
    value, depth = yaml_load(text), 0
    while isinstance(value, (list, dict)):
        value, depth = next(iter(value.values() if isinstance(value, dict) else value), None), depth + 1
    assert depth == DEEPEST


def test_depth_counts_what_aliases_stand_for() -> None:
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, DEEPEST + 2))]
    assert yaml_load("\n".join(lines[: DEEPEST - 1]))
    with pytest.raises(YamlError, match="nested deeper than") as caught:
        yaml_load("\n".join(lines))
    assert caught.value.line == 1


@pytest.mark.parametrize("entry", ["[{0}, {0}, {0}, {0}]", "{{<<: {0}, k{1}: {0}}}"], ids=["list", "merge"])
def test_alias_bomb_is_refused(entry: str) -> None:
    lines = ["a0: &a0 {k: lol}"]
    lines += [f"a{n}: &a{n} " + entry.format(f"*a{n - 1}", n) for n in range(1, 40)]
    with pytest.raises(YamlError, match="aliases up to here"):
        yaml_load("\n".join(lines))


def test_many_aliases_of_something_small_are_no_bomb() -> None:
    text = "a: &a {k: v, l: [1, 2]}\nb:\n" + "- *a\n" * 10_000
    assert yaml_load(text)["b"] == [{"k": "v", "l": [1, 2]}] * 10_000


GROWING = {
    "mapping": "key{}: value # c\n",
    "sequence": "- item{}\n",
    "nested": "k{}:\n  - a: {{b: [c, 'd']}}\n    e: |\n      text\n",
    "plain-lines": "{} line\n",
    "blank-lines-and-comments": "\n   \n#\n",
    "anchors": "- &a{0} [x]\n- *a{0}\n",
}
LONG = 200_000
HOSTILE = {
    **{name: "".join(entry.format(n) for n in range(LONG // 10)) for name, entry in GROWING.items()},
    "open-single-quote": "'" + "''" * LONG,
    "open-double-quote": '"' + "\\\\" * LONG,
    "spaces-in-quotes": '"' + " " * LONG + "x\n" + '"',
    "spaces-in-plain": "a" + " " * LONG + "b" + " " * LONG + "#",
    "spaces-in-flow": "[a" + " " * LONG + "b" + " " * LONG + "c?",
    "words": "a " * LONG,
    "colons": "a" + ":" * LONG + " b",
    "dashes": "-" * LONG,
    "digits": "1_" * LONG + "x",
    "sexagesimal": "1" + ":1" * LONG + "x",
    "block-spaces": "a: |\n" + (" " * 1000 + "\n") * (LONG // 1000) + "b",
    "brackets": "[" * LONG,
    "blank-lines": "a: b" + "\n" * LONG + "  c: d",
    "empty-block-texts": "- |\n" * (LONG // 4) + "\n" * LONG,
}


WELL_FORMED = {
    *GROWING,
    "colons",
    "spaces-in-quotes",
    "spaces-in-plain",
    "words",
    "dashes",
    "digits",
    "sexagesimal",
    "empty-block-texts",
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", HOSTILE)
def test_long_hostile_text_ends(name: str) -> None:
    """Quadratic work would take hours here; the suite's time limit is the judge."""
    assert accepts(HOSTILE[name]) == (name in WELL_FORMED)


# Nodes


def test_nodes_know_their_place() -> None:
    text = "a: 1\nb:\n  - x: 'y'\n    z:\n  - &n [p, q] # c\nc: *n\n"
    root = yaml_compose(text)
    b = root.get("b")
    c = root.get("c")
    assert b is not None
    assert c is not None
    assert [(node.line, node.column) for node, _ in root.value.values()] == [(1, 1), (2, 1), (6, 1)]
    assert (b.line, b.column, text[b.start : b.end]) == (3, 3, "- x: 'y'\n    z:\n  - &n [p, q]")
    first, second = b.value
    assert second is c
    assert (c.line, c.column, text[c.start : c.end]) == (5, 8, "[p, q]")
    empty = first.get("z")
    assert empty is not None
    assert (empty.line, empty.column, empty.start) == (4, 7, empty.end)
    key, _ = first.value["x"]
    assert (key.value, key.line, key.column) == ("x", 3, 5)
    assert text[root.start : root.end] == text.rstrip()
    assert first.get("none") is None
    assert b.get("x") is None
    assert str(key.error("no such name")) == "<yaml>:3:5: no such name"


def test_an_empty_document_is_nothing() -> None:
    assert [yaml_load(text) for text in ("", "# a\n", "---\n", "---\n...\n")] == [None] * 4


def test_merged_keys_are_found_and_own_keys_win() -> None:
    root = yaml_compose("a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3\n")
    b = root.get("b")
    assert b is not None
    assert b.plain() == {"x": 1, "y": 3}
    assert [key.line for key, _ in b.value.values()] == [1, 4]


def test_plain_values_of_an_alias_are_copies() -> None:
    value = yaml_load("a: &a [1]\nb: *a")
    value["a"].append(2)
    assert value == {"a": [1, 2], "b": [1]}


def stands_alone(node: YamlNode, source: str) -> bool:
    """Whether a node's source means the same as a document of its own."""
    if not isinstance(node.value, (list, dict)):
        marked = source.startswith(("---", "...")) or source.endswith(":") or source in ("-", "?")
        return bool(source) and not marked and not re.match(r"[|>][+-]?[1-9]", source)
    return not re.search(r"\*\w", source)


def check_positions(text: str) -> int:
    root = yaml_compose(text)
    checked = 0
    for node in nodes(root):
        source = text[node.start : node.end]
        if stands_alone(node, source):
            is_block = isinstance(node.value, (list, dict)) and source[0] not in "[{"
            padding = " " * (node.column - 1) if is_block else ""
            assert exact(yaml_load(padding + source)) == exact(node.plain())
            checked += 1
    return checked


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_the_source_of_every_node_reads_back(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert check_positions(text) > 20
    assert check_positions(text.replace("\n", "\r\n")) > 20


# Generated documents

punctuation = st.sampled_from(list(" \n\t'\"\\:#-,[]{}&*!|>%@`~=<.0_1exn"))
characters = st.characters(exclude_categories=["Cs"]) | punctuation
LOOK_ALIKES = [
    "",
    "<<",
    "=",
    "---",
    "...",
    "a: b",
    "a #b",
    " a",
    "a ",
    "a\n",
    "\nb",
    "x" * 130,
    "a:",
    "-",
    "- a",
]
words = st.sampled_from([*SCALARS.split("|"), *LOOK_ALIKES])
texts = st.text(characters, max_size=20) | words
finite = st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | st.integers() | finite | texts
keys = st.none() | st.integers(2) | texts.filter(lambda text: len(text) < 100)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)
options = st.fixed_dictionaries({
    "default_flow_style": st.sampled_from([True, False, None]),
    "default_style": st.sampled_from([None, None, "'", '"', "|", ">"]),
    "width": st.sampled_from([10, 30, 80, 10_000]),
    "indent": st.integers(2, 8),
    "allow_unicode": st.booleans(),
    "explicit_start": st.booleans(),
    "line_break": st.sampled_from(["\n", "\r\n"]),
    "sort_keys": st.just(False),
})  # fmt: skip
PIECES = [
    "a", "b", "c: ", "k: ", "'k':", ": ", ":", "- ", "- ", "-", "? ", ",", ", ", "[", "]", "{", "}", "#",
    " #", "# c\n", "&a ", "&b ", "*a", "*b ", "<<: ", "<<", "!", "!!str ", "|", ">", "|-\n", ">+\n", "|2\n",
    "'", '"', "''", "\\", "\\n", "\\\n", "%", "@", "`", "\n", "\n", "\n ", "\n  ", "\n  ", "\n    ", "\n- ",
    "\n  - ", "  ", " ", "\t", "---", "--- ", "\n---\n", "\n...\n", "\r\n", "é", "=", "1", "0x1f", "'q'",
    "\"q\"", "[a, b]", "{a: b}", "x\n",
]  # fmt: skip
documents = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


@pytest.mark.long
@settings(max_examples=250, deadline=None)
@given(values, options)
def test_what_pyyaml_writes_loads_equal(value: Any, chosen: dict[str, Any]) -> None:
    text = yaml.dump(value, Dumper=yaml.SafeDumper, **chosen)
    if "!!" in text or any(mark in text for mark in ("? ", "\x85", "\u2028", "\u2029")):
        agrees_or_refuses(text)  # tags, complex keys, and line ends of YAML 1.1 alone are not supported
    else:
        check(text)


@pytest.mark.long
@settings(max_examples=4000, deadline=None)
@given(documents)
def test_any_text_agrees_with_pyyaml_or_is_refused(text: str) -> None:
    if agrees_or_refuses(text):
        check_positions(text)


# Writing


@pytest.mark.long
@settings(max_examples=400, deadline=None)
@given(st.dictionaries(keys, values, max_size=4) | values)
def test_what_is_written_reads_back_here_and_in_pyyaml(value: Any) -> None:
    text = yaml_dump(value)
    assert exact(yaml_load(text)) == exact(value)
    assert exact(yaml.safe_load(text)) == exact(value)
    assert text.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (
            {"b": [1, {"c": None, "a": ()}], "a": {"x": {}}},
            "b:\n  - 1\n  - c: null\n    a: []\na:\n  x: {}\n",
        ),
        ({"url": "https://a.b?c=d:1", "l": ["a?b"]}, 'url: "https://a.b?c=d:1"\nl: ["a?b"]\n'),
        (
            {"path": "/home/é", "a\nb": '"\\ \x00', "no": "off"},
            'path: "/home/é"\n"a\\nb": "\\"\\\\ \\x00"\n"no": "off"\n',
        ),
        ({"b": 1, 1: "2001-01-01", "x": "a:"}, 'b: 1\n1: "2001-01-01"\nx: "a:"\n'),
        ([1e20, -math.inf, 0.1, 1e-7, True], "[1.0e+20, -.inf, 0.1, 1.0e-07, true]\n"),
        ({}, "{}\n"),
    ],
    ids=range(6),
)
def test_writes_as_people_do(value: Any, text: str) -> None:
    assert yaml_dump(value) == text


def deep(levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = [value]
    return value


cycle: list[Any] = []
cycle.append({"a": cycle})


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (cycle, "nested so deep"),
        (deep(1000), "nested so deep"),
        ({"a": {1, 2}}, "type set"),
        ([b"x"], "type bytes"),
        ({"p": Path("x")}, "Path"),
    ],
    ids=["cycle", "deep", "set", "bytes", "path"],
)
def test_refuses_to_write(value: Any, words: str) -> None:
    assert yaml_load(yaml_dump(deep(DEEPEST))) == deep(DEEPEST)
    with pytest.raises(SandboxError, match=words):
        yaml_dump(value)
