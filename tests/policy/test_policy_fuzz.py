"""Whatever happened to a policy file: it loads as a valid policy, or it is refused with one line."""

from __future__ import annotations

import random
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_tune.errors import MlaTuneError
from mla_tune.policy.codec import MAX_POLICY_BYTES, dump_policy, parse_policy
from mla_tune.policy.rules import problems
from mla_tune.policy.schema import Limit, Policy
from mla_tune.runtime import Dispatcher
from tests.policy.strategies import policy, table

GOOD = dump_policy(policy())
LIMITED = dump_policy(policy(table(limits=(Limit(candidate="sparse_fwd", num_qo_tokens=900),))))
MUTATIONS, ALL_MUTATIONS = 5_000, 100_000
"""Of a short run, and of one with ``--all``."""
INTEGERS = (0, 1, 17, 900, 901, 4096, 5000, 1 << 20, (1 << 26) - 3, 1 << 40, 1 << 62)
FRAGMENTS = [
    *(b"&a ", b"*a", b"!!int ", b"<<: *a", b"---\n", b"...", b"? ", b": ", b"- ", b"[", b"]", b"{", b"}", b",", b"\n"),
    *(
        b"|\n",
        b">\n",
        b"'",
        b'"',
        b"#",
        b"%YAML 1.1\n",
        b"\t",
        b"\x00",
        b"\xff",
        b"\xef\xbb\xbf",
        b"1e3",
        b".nan",
        b"~",
    ),
    *(b"yes", b"-1", b"0", b"99999999999999999999", b"1.0", b"null", b"\xe2\x80\xa8", b"\xc2\x85", b"\\x00", b"\r"),
]


def loads_or_refuses(data: bytes) -> bool:
    """Whether ``data`` was loaded; fails on anything but a valid policy or a one-line error of ours."""
    refusal = ""
    try:
        loaded = parse_policy(data, "p.yaml")
    except MlaTuneError as error:
        refusal = str(error)
    if refusal:
        assert refusal.isprintable()
        return False
    assert list(problems(loaded)) == []
    assert parse_policy(dump_policy(loaded), "again") == loaded
    answers_within_limits(loaded)
    return True


def answers_within_limits(loaded: Policy) -> None:
    """A listed candidate that may run there, for integers from 0 to 2^62 on every axis; or no table at all."""
    dispatcher = Dispatcher(loaded, source="p.yaml")
    for entry in loaded.tables:
        try:
            choose = dispatcher.resolve(entry.site, model=entry.model, layer=entry.layer, h_q=entry.h_q).choose
        except MlaTuneError:
            assert {limit.candidate for limit in entry.limits} == set(entry.candidates)
            continue
        limits = {name: [x.num_qo_tokens for x in entry.limits if x.candidate == name] for name in entry.candidates}
        for point in product(INTEGERS, repeat=3):
            answer = choose(*point)
            assert all(point[0] <= most for most in limits[answer])


def test_thousands_of_mutations_load_or_are_refused(everything: bool) -> None:
    """Changed bytes in most, fragments put in or over something in the rest."""
    dice = random.Random(0)
    loaded, mutations = 0, ALL_MUTATIONS if everything else MUTATIONS
    for _ in range(mutations):
        data = bytearray(dice.choice((GOOD, LIMITED)))
        for _ in range(dice.randint(1, 3)):
            at = dice.randrange(len(data))
            if dice.random() < 0.2:
                data[at : at + dice.randrange(12)] = dice.choice(FRAGMENTS)
            else:
                data[at] = dice.randrange(256) if dice.random() < 0.5 else dice.randrange(32, 127)
        loaded += loads_or_refuses(bytes(data))
    assert 0 < loaded < mutations  # a changed digit in a digest is a valid policy, a changed bracket is not


@settings(max_examples=600, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, len(GOOD)), st.integers(0, 12), st.sampled_from(FRAGMENTS) | st.binary(max_size=4)),
        min_size=1,
        max_size=3,
    )
)
def test_replaced_and_inserted_fragments_load_or_are_refused(edits: list[tuple[int, int, bytes]]) -> None:
    data = GOOD
    for start, removed, inserted in edits:
        data = data[:start] + inserted + data[start + removed :]
    loads_or_refuses(data)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.text("[]{}:,-?&*!|>'\"%@`#\n 0a", max_size=80).map(str.encode))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    assert not loads_or_refuses(data)


@pytest.mark.parametrize(
    "unit",
    [
        *(
            b"[",
            b"{",
            b"{a: ",
            b"- ",
            b"? ",
            b"a: &a [",
            b"[1, ",
            b"x: 1\n",
            b"- - -\n",
            b'"',
            b"'",
            b"!",
            b"%",
            b"#",
            b"\n",
        ),
        *(
            b"a",
            b"1",
            b"1.",
            b" ",
            b"\t",
            b"- a: 1\n  b: 2\n",
            b"---\n",
            b"{a: 1}, ",
            b"a, ",
            b"\xf0\x9f\x98\x80",
            b"|\n a\n",
            b"*a ",
        ),
    ],
)
def test_one_thing_repeated_up_to_the_size_limit_is_refused(unit: bytes) -> None:
    """Would not end in reasonable time if reading were more than linear in the size."""
    repeated = unit * (MAX_POLICY_BYTES // len(unit))
    assert not loads_or_refuses(repeated)
    assert not loads_or_refuses((b"schema: 1\ntables: [" + repeated)[:MAX_POLICY_BYTES])
