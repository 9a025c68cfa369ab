"""Pieces of a growing text: each fits into a notification, and any may be lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from futures.notify import MAX_NOTE_BYTES
from training.text_pieces import TextPiece, Told

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=1500)


@given(st.lists(st.tuples(TEXT, st.booleans()), max_size=5))
def test_what_arrives_makes_up_a_beginning_of_the_text(growth):
    told, text, known = Told(), "", ""
    for new, arrives in growth:
        text += new
        pieces = list(told.pieces([text]))
        assert "".join(piece.text for piece in pieces).endswith(new)
        for piece in pieces:
            note = piece.to_note()
            assert "\0" not in note
            assert len(f"future_{'0' * 32} {note}".encode()) <= MAX_NOTE_BYTES
            if arrives:
                known += TextPiece.of_note(note).after(known)
        assert text.startswith(known)
    if all(arrives for _, arrives in growth):
        assert known == text


def test_a_note_makes_up_for_the_one_before_it():
    told = Told()
    list(told.pieces(["once upon "]))
    [piece] = told.pieces(["once upon a time"])

    assert piece.after("") == "once upon a time"
    assert piece.after("once upon a time") == ""
    assert piece.after("once more") == ""


@given(TEXT, st.integers(0, 1500), st.integers(1, 400))
def test_a_repetition_after_a_crash_goes_on_where_the_text_was(text, length, step):
    known = text[:length]
    told = Told()
    for count in range(0, len(text) + step, step):
        for piece in told.pieces([text[:count]]):
            known += piece.after(known)
    assert known == text
