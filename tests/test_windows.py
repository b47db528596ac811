"""Windows of a text: what is cut where, and what comes before; each against a loop over a plain list."""
import itertools

import numpy as np
import pytest
import torch

from text.windows import (END, OTHER, SPACE, Passages, Rows, last, place, sentence_ends, sentences,
                          tokens_before)

V = 7  # six tokens of text and one, 6, between documents
ENDS = torch.tensor([END if i in (1, 4) else SPACE if i == 3 else OTHER for i in range(V)])


def text(seed, L, sides=V):
    return torch.randint(sides, (L,), generator=torch.Generator().manual_seed(seed))


def slow_sentences(tokens, W, kinds, end):
    """[(start, length, document)], by the rules: token after token."""
    def over(i):
        """Is a sentence over before token i, by the tokens before it in its document?"""
        if kinds[tokens[i]] != OTHER:
            return False
        while i and tokens[i - 1] != end:
            i -= 1
            if kinds[tokens[i]] != SPACE:
                return kinds[tokens[i]] == END
        return False
    found, document, i = [], 0, 0
    while i < len(tokens):
        if tokens[i] == end:
            document, i = document + 1, i + 1
            continue
        k = 1
        while k < W and i + k < len(tokens) and tokens[i + k] != end:
            if over(i + k):
                break
            k += 1
        found.append((i, k, document))
        i += k
    return found


def streams():
    """Arguments of `sentences`: random tokens, few or many, with few or many ends and documents."""
    laws = [set(), {1}, {1, 4}, {0, 1, 2, 3, 4, 5}, {1, 6}]
    for seed, (W, ends, end) in enumerate(itertools.product([1, 2, 3, 5, 40], laws, [None, 6])):
        for L, sides in ((seed % 3, V), (60, V), (60, 3 * V)):
            t = text(seed, L, sides)
            kinds = [END if i in ends else SPACE if i == 5 and seed % 2 else OTHER for i in range(V)]
            yield torch.where(t < V, t, 2), W, torch.tensor(kinds), end


def cases():
    """Windows of one text in several ways, with the document of every token, -1 if it is between two."""
    t = text(1, 60, 12)
    t = torch.where(t < V, t, 2)
    t[20], t[30], t[31] = 6, 6, 6
    for stride in (1, 2, 4):
        yield Passages(t, 4, V, stride), t.tolist(), [0] * 60
    of = [-1 if token == 6 else int((t[:i] == 6).sum()) for i, token in enumerate(t)]
    for W in (1, 3, 4, 9):
        yield Passages(t, W, V, ends=ENDS, end=6), t.tolist(), of
    yield Passages(t, 4, V, ends=ENDS), t.tolist(), [0] * 60


def spans(windows):
    return list(zip(windows.start.tolist(), windows.length.tolist()))


def test_a_token_ends_a_sentence_if_it_stops_before_any_quotes_and_brackets_or_breaks_the_line():
    yes = [b'.', b'!', b'?', b'\n', b'end.', b' end.', b'."', b".'", b'.)', b'.]', b'?!")] ', b'. ', b'...',
           b'\r\n', b'.\r', b'\n ', b' \n', b'a\n', b'\n\n', b'said."\n']
    no = [b'', b'a', b',', b';', b':', b'"', b')', b"'", b'3.14', b'.a', b'?,', b'\na', b'.-', b'\xe2\x80',
          b'(', b'.(', b'[UNK]']
    space = [b' ', b'  ', b'\r', b'\t']
    found = sentence_ends(yes + no + space)
    assert found.tolist() == [END] * len(yes) + [OTHER] * len(no) + [SPACE] * len(space)


def test_sentences_of_a_text_read_by_eye():
    pieces = [b'Hi', b'.', b'"', b' so', b' it', b'!', b'\n', b'<eos>']
    ends = sentence_ends(pieces)
    tokens = torch.tensor([0, 5, 1, 3, 4, 4, 4, 7, 3, 7, 7, 6, 3, 2, 1, 6, 4])
    start, length, document = sentences(tokens, 3, ends, 7)
    assert [tokens[s:s + n].tolist() for s, n in zip(start, length)] == [
        [0, 5, 1], [3, 4, 4], [4], [3], [6], [3, 2, 1], [6], [4]]
    assert document.tolist() == [0, 0, 0, 1, 3, 3, 3, 3]


def test_sentences_are_those_of_a_loop_over_the_tokens():
    for tokens, W, ends, end in streams():
        found = sentences(tokens, W, ends, end)
        expected = slow_sentences(tokens.tolist(), W, ends.tolist(), end)
        assert list(zip(*(t.tolist() for t in found))) == expected, (tokens, W, ends, end)
        assert all(t.dtype == torch.int64 for t in found)


def test_sentences_hold_every_token_but_the_end_once_and_in_order_and_cross_no_document():
    for tokens, W, ends, end in streams():
        start, length, document = sentences(tokens, W, ends, end)
        inside = [i for s, n in zip(start.tolist(), length.tolist()) for i in range(s, s + n)]
        assert inside == [i for i, token in enumerate(tokens.tolist()) if token != end]
        assert ((length > 0) & (length <= W)).all()
        for a, b, i, j in zip(start, start[1:], document, document[1:]):
            assert (i == j) == (end not in tokens[a:b].tolist())


def test_a_fixed_window_is_the_tokens_from_its_start():
    t = text(0, 30, 6)
    for W, stride in ((4, 1), (4, 2), (4, 4), (1, 1), (30, 30)):
        windows = Passages(t, W, V, stride)
        assert windows.start.tolist() == [s for s in range(0, 30, stride) if s + W <= 30]
        assert len(windows) == len(windows.start)
        rows = windows.window(torch.arange(len(windows)))
        assert rows.tolist() == [t[s:s + W].tolist() for s in windows.start]


@pytest.mark.parametrize('L', range(5))
def test_a_text_shorter_than_a_window_has_none(L):
    windows = Passages(text(0, L), 4, V)
    assert len(windows) == (L == 4)


def test_a_short_window_has_mask_ids_behind_it_and_no_window_has_nothing_else():
    for windows, tokens, _ in cases():
        i = torch.tensor([[-1, 0, 3], [len(windows) - 1, -1, 0]])
        rows, W = windows.window(i), windows.W
        assert rows.shape == (2, 3, W) and rows.dtype == torch.int64
        for row, which in zip(rows.flatten(0, 1).tolist(), i.flatten().tolist()):
            s, n = spans(windows)[which] if which >= 0 else (0, 0)
            assert row == tokens[s:s + n] + [V] * (W - n)


def test_a_prefix_is_the_tokens_before_in_their_document_and_mask_ids_where_there_are_fewer():
    for windows, tokens, document in cases():
        rows = windows.prefix(torch.arange(len(windows)))
        assert rows.dtype == torch.int64
        for row, (s, _) in zip(rows.tolist(), spans(windows)):
            known = [tokens[i] for i in range(max(0, s - windows.W), s) if document[i] == document[s]]
            assert row == [V] * (windows.W - len(known)) + known
        some = torch.tensor([5, 2, 5])
        assert torch.equal(windows.prefix(some), rows[some])


def follow(windows, document, i, n):
    """The windows before i, the last one nearest, by looking for one that ends where the next one starts."""
    found, begin = [], windows.start[i].item()
    ending = {(document[s], s + k): (j, s) for j, (s, k) in enumerate(spans(windows))}
    where = document[begin]
    for _ in range(n):
        j, begin = ending.get((where, begin), (-1, None))
        found.append(j)
    return found[::-1]


def test_the_window_before_ends_where_the_next_one_starts_in_the_same_document():
    for windows, _, document in cases():
        every = torch.arange(len(windows))
        for n in (1, 3):
            found = windows.before(every, n)
            assert found.tolist() == [follow(windows, document, i, n) for i in range(len(windows))]
            assert found.dtype == torch.int64 and (found == -1).any() and (found >= 0).any()
        assert windows.before(every, 0).shape == (len(windows), 0)


@pytest.mark.parametrize('stride', [3, 5, 8])
def test_no_window_is_before_another_that_it_overlaps_whatever_the_stride(stride):
    """A stride that does not divide W may also be refused."""
    try:
        windows = Passages(text(0, 40, 6), 4, V, stride)
    except ValueError as told:
        assert 'stride' in str(told)
        return
    found = windows.before(torch.arange(len(windows)), 2)
    assert found.tolist() == [follow(windows, [0] * 40, i, 2) for i in range(len(windows))]


def test_inputs_are_windows_prefixes_and_the_windows_before():
    for windows, tokens, document in cases():
        i = torch.tensor([7, 0, 7, len(windows) - 1])
        plain = windows.inputs(i)
        assert list(plain) == ['x', 'prefix']
        assert torch.equal(plain['x'], windows.window(i)) and torch.equal(plain['prefix'], windows.prefix(i))
        windows.n_prev = 2
        found = windows.inputs(i)
        before = found.pop('before')
        assert found.keys() == plain.keys() and all(torch.equal(found[name], plain[name]) for name in plain)
        assert before.shape == (4, 2, windows.W) and before.dtype == torch.int64
        for rows, which in zip(before, i.tolist()):
            for row, j in zip(rows.tolist(), follow(windows, document, which, 2)):
                s, n = spans(windows)[j] if j >= 0 else (0, 0)
                assert row == tokens[s:s + n] + [V] * (windows.W - n)


def test_a_batch_is_random_windows_of_all_with_their_prefixes_and_a_function_of_the_seed():
    for windows in (Passages(text(0, 30, 6), 4, V, 2), Passages(text(0, 50), 4, V, ends=ENDS, end=6)):
        torch.manual_seed(0)
        batch, count = windows.batch(600)
        x, prefix = batch['x'], batch['prefix']
        assert x.shape == prefix.shape == (600, 4) and x.dtype == prefix.dtype == torch.int64
        assert count == 600 * 4
        seen = set(map(tuple, torch.cat([prefix, x], 1).tolist()))
        every = windows.all()
        assert seen == set(map(tuple, torch.cat([every['prefix'], every['x']], 1).tolist()))
        other = windows.batch(600)[0]['x']
        torch.manual_seed(0)
        assert torch.equal(windows.batch(600)[0]['x'], x) and not torch.equal(other, x)


def test_ids_beyond_the_sign_of_int16_are_positive_again():
    ids = [40000, 1, 65535, 32768, 50256, 32767, 2, 65535]
    tokens = torch.from_numpy(np.array(ids, np.uint16).view(np.int16))
    fixed = Passages(tokens, 3, 65536)
    assert fixed.window(torch.arange(6)).tolist() == [ids[s:s + 3] for s in range(6)]
    assert fixed.prefix(torch.tensor([1, 5])).tolist() == [[65536, 65536, 40000], ids[2:5]]
    ends = torch.zeros(65536, dtype=torch.bool)
    ends[[32768, 2]] = True
    found = Passages(tokens, 3, 65536, ends=ends, end=65535)
    assert found.window(torch.arange(len(found))).tolist() == [[40000, 1, 65536], [32768, 65536, 65536],
                                                               [50256, 32767, 2]]
    assert found.prefix(torch.arange(3)).tolist() == [[65536] * 3, [65536] * 3, [65536, 65536, 32768]]


def test_windows_are_spread_evenly_from_the_first_to_the_last():
    for N in (1, 2, 5, 17, 64):
        windows = Passages(text(0, N + 3, 6), 4, V)
        for most in (0, 1, 2, 3, 5, 15, 16, 63, 64, 100):
            found = windows.spread(most).tolist()
            assert torch.equal(windows.all(most)['x'], windows.window(torch.tensor(found)))
            if most == 0 or most >= N:
                assert found == list(range(N))
                continue
            assert len(found) == most and found[0] == 0 and (most == 1 or found[-1] == N - 1)
            gaps = np.diff(found)
            assert most == 1 or gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


def test_windows_of_more_than_float32_counts_are_spread_inside():
    windows = Passages(text(0, 4), 4, V)
    windows.start = torch.zeros(1, dtype=torch.int64).expand(2 ** 24 + 4)
    found = windows.spread(5)
    assert found[-1] == len(windows) - 1 and (found.diff() - len(windows) / 4).abs().max() < 2


def test_the_last_fixed_windows_of_a_prompt_are_cut_from_its_end():
    for L in range(13):
        prompt = text(L, L, 6)
        back = prompt.tolist()[::-1]
        parts = [back[k:k + 4][::-1] for k in range(0, L, 4)][::-1]
        rows = [part + [V] * (4 - len(part)) for part in parts]
        for n in range(5):
            found = last(prompt, n, 4, V)
            expected = [[V] * 4] * (n - len(rows)) + rows[-n:] if n else rows
            assert found.shape == (n or len(rows), 4) and found.dtype == torch.int64
            assert found.tolist() == expected


def test_a_short_window_of_a_prompt_can_stand_at_the_end_of_its_place():
    ids = torch.arange(7)
    assert last(ids, 3, 5, 9, right=True).tolist() == [[9] * 5, [9, 9, 9, 0, 1], [2, 3, 4, 5, 6]]
    assert last(ids[:0], 1, 5, 9, right=True).tolist() == [[9] * 5]


def test_the_last_sentences_of_a_prompt_are_those_of_the_same_text_as_windows():
    for L in range(16):
        prompt = text(L, L, 6)
        windows = Passages(prompt, 3, V, ends=ENDS)
        rows = windows.window(torch.arange(len(windows))).tolist()
        assert len(rows) == len(slow_sentences(prompt.tolist(), 3, ENDS.tolist(), None))
        for n in range(5):
            found = last(prompt, n, 3, V, ENDS)
            expected = [[V] * 3] * (n - len(rows)) + rows[-n:] if n else rows
            assert found.shape == (n or len(rows), 3) and found.dtype == torch.int64
            assert found.tolist() == expected


def test_tokens_before_and_place_read_and_write_every_row_at_its_own_position():
    xt = torch.tensor([[0, 1, 2, V, V, V, V], [3, V, V, V, V, V, V]])
    start = torch.tensor([3, 1])
    assert tokens_before(xt, start, 2, V).tolist() == [[1, 2], [V, 3]]
    window = torch.tensor([[4, 4, V], [5, 6, 5]])
    assert place(xt, start, window, V).tolist() == [[0, 1, 2, 4, 4, V, V], [3, 5, 6, 5, V, V, V]]
    cut = place(xt, torch.tensor([5, 5]), window, V)
    assert cut.tolist()[1] == [3, V, V, V, V, 5, 6]


def test_random_length_cuts_the_share_of_rows_that_it_says_to_any_length():
    """5 standard errors: a false alarm in 10^6 runs; the seed is fixed."""
    torch.manual_seed(0)
    rows = Rows(torch.arange(1000) % 50, None, 16, random_length=0.25)
    batch, n = rows.batch(4000)
    kept = batch['segment'] == 0
    share = 0.25 * 15 / 16  # a length of 16 cuts nothing
    assert abs((~kept).any(-1).double().mean() - share) < 5 * (share * (1 - share) / 4000) ** 0.5
    assert set(kept.sum(-1).tolist()) == set(range(1, 17)) and n == 4000 * 16
    assert (kept[:, 1:] <= kept[:, :-1]).all() and (batch['segment'][~kept] == -1).all()
    assert rows.all()['x'].shape == (62, 16) and 'segment' not in rows.all()
