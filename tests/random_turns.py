"""Turns with any tokens, and with any of the fields that most turns leave out."""

from __future__ import annotations

from hypothesis import strategies as st

from lightning_rft.experience import Support, Truncation, Turn

IDS = st.integers(0, 2**31 - 1)
LOGPROBS = st.floats(max_value=0.0, width=32)


@st.composite
def supports(draw: st.DrawFn, tokens: int) -> Support:
    counts = draw(st.lists(st.integers(1, 3), min_size=tokens, max_size=tokens))
    total = sum(counts)
    ids, logprobs = (draw(st.lists(kind, min_size=total, max_size=total)) for kind in (IDS, LOGPROBS))
    return Support(counts, ids, logprobs)


@st.composite
def turns(draw: st.DrawFn) -> Turn:
    n = draw(st.integers(0, 5))

    def array(kind: st.SearchStrategy[float]) -> st.SearchStrategy[list[float]]:
        return st.lists(kind, min_size=n, max_size=n)

    return Turn(
        prompt_ids=draw(st.lists(IDS, max_size=5)),
        token_ids=draw(array(IDS)),  # type: ignore[arg-type]
        logprobs=draw(array(LOGPROBS)),
        versions=draw(array(st.integers(-1, 2**31 - 1))),  # type: ignore[arg-type]
        finish_reason=draw(st.sampled_from(("stop", "length"))),
        temperature=draw(st.floats(0, 4)),
        sampling=draw(st.builds(Truncation, st.integers(0, 99), st.floats(0, 1), st.floats(0, 1))),
        reward=draw(st.none() | st.floats(-9, 9)),
        teacher_logprobs=draw(st.none() | array(LOGPROBS)),
        support=draw(st.none() | supports(n)),
    )
