"""Sentences and their spans: by hand, on any text, and on all the real captions at hand."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastgoal_models import split_sentences, tokenize_caption
from fastgoal_models.captions import sentence_tokens, token_spans
from fastgoal_models.prepare import published_sentences

REAL_CAPTIONS = Path(__file__).parents[2].parent / "shared" / "data" / "captions"
TOKENIZER = open_clip.SimpleTokenizer(context_length=248)


@pytest.mark.parametrize(
    "sentences",
    [
        ["A cat sleeps.", "It is white."],
        ["A cat sleeps.", "It has no stop at the end"],
        ["Is it real?", "Yes!", "It is…", "Perhaps..."],
        ["It is 3.5 m high and costs $1.50 at most.", "It weighs 2.25 lbs. or so."],
        ["Mr. and Mrs. Smith met Dr. Jones at No. 5, St. James Ave. near Mt. Hood.", "They ate."],
        ["Works by J. R. R. Tolkien and George M. Cohan hang there.", "They are old."],
        ["It was made in the U.S. Navy yard.", "It left the U.S.", "The sea is calm."],
        ["It stands in San Antonio St.", "To the right is a house."],
        ["The shop opens at 5 p.m.", "The sun sets.", "Cups, plates, etc. stand around."],
        ["Fruit, e.g. apples, i.e. red ones, vs. pears.", "They look like Fig. 3 does."],
        ['The sign says "Stop!" and "Go." in red.', "The other is blank."],
        ['A sign reads "STOP."', "The man reads it.", "(He is tall.)", "“Wait.”", "He goes."],
        ["A sign reads 'Wait ... what?' in white.", "It is old."],
        ['The sign says "CRASH! " in red.', "It is big."],
        ["He waits ... and waits...", "Then he goes."],
        ["the sky is blue.", "the sea is green.", "daytime."],
        ["The shirt says www.cats. com in white.", "It is loose."],
        ["There are trees.", "3 cars stand below.", "12 people walk."],
        ["A man (and a dog).", "[Blurred.]", "*Sunny.*"],
        ["Une église à Paris.", "Élégante, elle brille.", "«Oui.»", "Ñandúes corren."],
        ["The letter V.", "The other letter is an L.", "They shine."],
        ["It is 4 ft. by 5 ft. in size.", "It was Jan. 5 or Dec. 6 then."],
        ["A cat 🐈.", "A dog.", "🐕 is here."],
        ["What?!", "Really!!!", "Yes."],
        ["日本語の文です。次の文。"],
        ["One word"],
        ["..."],
    ],
    ids=lambda sentences: sentences[0][:24],
)
def test_sentences_by_hand(sentences):
    assert split_sentences(" ".join(sentences)) == sentences
    assert split_sentences("  " + " \t ".join(sentences) + "\n") == sentences


def test_line_breaks():
    wrapped = "A long line that goes\non in the next. And\nEnds"
    assert split_sentences(wrapped) == ["A long line that goes\non in the next.", "And", "Ends"]
    listed = "A title\n\nand a text\r\n\r\n- one\n- two"
    assert split_sentences(listed) == ["A title", "and a text", "- one", "- two"]
    assert split_sentences("1. A cat\n2. A dog") == ["1. A cat", "2. A dog"]
    assert split_sentences("There are 5. The cats sleep.") == ["There are 5.", "The cats sleep."]


def test_pieces_without_a_word_stay_with_their_neighbour():
    assert split_sentences("... And then. ! It ends. ...") == ["... And then. !", "It ends. ..."]


@pytest.mark.parametrize("caption", ["", " ", "\n\t "])
def test_an_empty_caption_has_no_sentences(caption):
    assert split_sentences(caption) == []


# Text that looks like captions often enough, with the characters that cleaning is about.
PIECES = r"""
. ! ? ... … " ' ” ( ) Mr U.S A cat Σ ΟΔΟΣ 1 5.5 e.g &amp; &lt; <b> â€™ Â schÃ¶n ﬁ é 🐈 日本 </w>
<start_of_text> I'm 'S &nbsp; - • www
""".split()
SPACES = [" ", "\n", "\t", "\x0b", "\x1f", "\xa0", "\u2028", "\ufeff", "\u200b", "\x00"]
ANY_TEXT = st.lists(
    st.sampled_from(PIECES) | st.just(" ") | st.sampled_from(SPACES) | st.text(max_size=4),
    max_size=25,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(ANY_TEXT)
@example("A. \x1fB. \x0bC")
def test_sentences_are_the_caption_but_for_whitespace(caption):
    sentences = split_sentences(caption)
    at = 0
    for sentence in sentences:
        assert sentence.strip() == sentence != ""
        found = caption.index(sentence, at)
        assert not caption[at:found].strip()
        at = found + len(sentence)
    assert not caption[at:].strip()
    # Cuts are at whitespace: nothing that was one word becomes two.
    assert [word for sentence in sentences for word in sentence.split()] == caption.split()


@settings(max_examples=300, deadline=None)
@given(ANY_TEXT)
@example('schÃ¶n. "Â  ist. â€™s')
@example("A <b> &lt; cat. &lt;b>. Then")
def test_tokens_are_those_of_the_whole_caption(caption):
    try:
        caption.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which open_clip can not encode either
        return
    sentences = split_sentences(caption)
    dealt = sentence_tokens(caption, sentences, TOKENIZER)
    assert len(dealt) == len(sentences)
    if not sentences:  # nothing but whitespace
        assert dealt == TOKENIZER.encode(caption) == []
        return
    assert [t for tokens in dealt for t in tokens] == TOKENIZER.encode(caption)
    found = tokenize_caption(sentences, TOKENIZER, 24, caption=caption)
    assert torch.equal(found.tokens, TOKENIZER(caption, 24)[0])
    assert found.tokens[found.length - 1] == TOKENIZER.eot_token_id
    assert not found.tokens[found.length :].any()
    ends = [1, *(end for _, end in found.spans)]
    assert [start for start, _ in found.spans] == ends[:-1]
    assert ends[-1] == found.length - 1


def same_text(words, sentence):
    words = "".join(words.split())
    if words == "".join(sentence.lower().split()):
        return True
    return words == "".join(TOKENIZER.clean_fn(sentence).split())  # slow, and seldom needed


def test_spans_by_hand():
    found = tokenize_caption(["A Cat!", "It sleeps here.", "So does she"], TOKENIZER, 248)
    assert found.spans == [(1, 4), (4, 8), (8, 11)]
    assert (found.length, found.truncated) == (12, False)
    assert TOKENIZER.decode(found.tokens[4:8].tolist()) == "it sleeps here . "


def test_spans_past_the_context_are_clipped():
    sentences = ["One two three.", "Four five six.", "Seven eight."]
    found = tokenize_caption(sentences, TOKENIZER, 8)
    assert torch.equal(found.tokens, TOKENIZER(" ".join(sentences), 8)[0])
    assert (found.length, found.truncated) == (8, True)
    assert found.spans == [(1, 5), (5, 7), (7, 7)]  # position 7 holds the end token
    exact = tokenize_caption(sentences[:2], TOKENIZER, 10)
    assert (exact.length, exact.truncated, exact.spans) == (10, False, [(1, 5), (5, 9)])


def test_no_sentences():
    found = tokenize_caption([], TOKENIZER, 77)
    assert torch.equal(found.tokens, TOKENIZER("", 77)[0])
    assert (found.length, found.spans, found.truncated) == (2, [], False)


def real_captions(path):
    for row in json.loads(path.read_text("utf-8")):
        yield from row["caption"] if isinstance(row["caption"], list) else [row["caption"]]


@pytest.mark.slow
@pytest.mark.skipif(
    not REAL_CAPTIONS.is_dir(), reason="no ../shared/data/captions beside this checkout"
)
@pytest.mark.parametrize("path", sorted(REAL_CAPTIONS.glob("*.json")), ids=lambda path: path.stem)
def test_real_captions(path):
    captions = list(dict.fromkeys(real_captions(path)))
    assert captions
    whole = TOKENIZER(captions)
    for caption, wanted in zip(captions, whole, strict=True):
        sentences = split_sentences(caption)
        assert "".join("".join(sentences).split()) == "".join(caption.split())
        found = tokenize_caption(sentences, TOKENIZER, 248, caption=caption)
        assert torch.equal(found.tokens, wanted)
        spans = assert_spans_are_the_sentences(caption, sentences)
        # Those of a context are the same, cut at its end token.
        assert found.spans == [(min(start, 247), min(end, 247)) for start, end in spans]
        # The published splitter drops the stops, and short pieces: its sentences are spans of the
        # caption that `prepare --published` joins of them.
        if pieces := published_sentences(caption):
            assert_spans_are_the_sentences(" ".join(pieces), pieces)


def assert_spans_are_the_sentences(caption, sentences):
    """As `prepare` writes them, of a caption of any length."""
    tokens = [TOKENIZER.sot_token_id, *TOKENIZER.encode(caption)]
    spans = token_spans(sentence_tokens(caption, sentences, TOKENIZER))
    assert [start for start, _ in spans] == [1, *(end for _, end in spans[:-1])]
    assert spans[-1][1] == len(tokens)
    for sentence, (start, end) in zip(sentences, spans, strict=True):
        assert same_text(TOKENIZER.decode(tokens[start:end]), sentence)
    return spans


def test_endless_captions_take_no_endless_time():
    for piece in (".", " ", "\n", ". ", "a", "' ", '."', "- ", "...x"):
        split_sentences("A. " + piece * 100_000 + " B.")
