"""Each task's rule on items in the official format; the tokens at a boundary; costs against sums by hand."""
import dataclasses
import importlib.util
import json
import sys
import time

import pytest
import torch

import ar
import common
import masked
from text import ends, vocabulary
from theirs import make_folder, tokenizer_json
from tools import items, tasks
from tools.items import Blank, Choice

TOKENIZER = vocabulary.Tokenizer(dict(kind='json', json=tokenizer_json(), vocab_size=300, end=299))
CPU = torch.device('cpu')

# ---- three to five items of every official file, as far as the readers look -------------------------------

HELLASWAG = [dict(activity_label='Removing ice', ctx_a='A man [deep] stands [title] Then  he', ctx_b='he is',
                  endings=['wrapping it.', '[substeps] eating.', 'gone.', 'skiing.'], label=1),
             dict(activity_label='Cooking', ctx_a='She cooks.', ctx_b='', endings=list('abcd'), label='0'),
             dict(activity_label='Cooking', ctx_a='She cooks.', ctx_b='then', endings=list('abcd'), label=3)]
WINOGRANDE = [dict(sentence=sentence, option1=a, option2=b, answer=gold) for sentence, a, b, gold in (
    ('Ann thanked Bea because _ had helped.', 'Ann', 'Bea', '2'),
    ('_ is late, so Bea waits for Ann.', 'Ann', 'Bea', '1'), ('The "_" fell.', 'cup', 'jug', '1'))]
PIQA = [dict(goal='open a jar', sol1='twist it', sol2='sing to it'), dict(goal='g', sol1='a', sol2='b'),
        dict(goal='h', sol1='c', sol2='d')]
SIQA = [dict(context='Ann fell.', question='How is Ann?', answerA='hurt', answerB='tall', answerC='old'),
        dict(context='c', question='q', answerA='a', answerB='b', answerC='c'),
        dict(context='c', question='q', answerA='a', answerB='b', answerC='c')]
STORIES = ('InputStoryid,InputSentence1,InputSentence2,InputSentence3,InputSentence4,'
           'RandomFifthSentenceQuiz1,RandomFifthSentenceQuiz2,AnswerRightEnding\n'
           '1,Rick grew up.,"He, too, left.",It rained.,He came back.,He is happy.,He is a shark.,1\n'
           '2,A.,B.,C.,D.,E1.,E2.,2\n3,F.,G.,H.,I.,J1.,J2.,1\n')
LAMBADA = 'the cat saw the dog\n\nshe said `` yes , he did\n{"text": "in front of the house"}\n'
TRIVIA = dict(Data=[dict(Question=question, Answer=dict(Value=value, Aliases=aliases))
                    for question, value, aliases in (('Who?', 'The Beatles', ['Beatles', 'The Beatles']),
                                                     ('Where?', 'Rome', []), ('When?', '1969', ['69']))])
SQUAD = dict(data=[dict(paragraphs=[
    dict(context='Rome is old.', qas=[dict(question='What?', answers=[dict(text='Rome'), dict(text='Rome')]),
                                      dict(question='How?', answers=[dict(text='old')])]),
    dict(context='B.', qas=[dict(question='C?', answers=[dict(text='B')])])])])
HUMANEVAL = [dict(prompt='def f(x):\n', canonical_solution=f'    y = x + {n}\n', suffix='    return y\n',
                  entry_point='f', test=f'def check(g):\n    assert g(1) == {1 + n}\n') for n in range(3)]
GSM8K = [dict(question=' What is 1 and 2? ', answer='It is <<1+2=3>>3.\n#### 3'),
         dict(question='b', answer='#### 1,200'), dict(question='c', answer='#### 5')]
LINES = lambda items: '\n'.join(map(json.dumps, items)) + '\n'
FILES = {'hellaswag': LINES(HELLASWAG), 'winogrande': LINES(WINOGRANDE), 'piqa': LINES(PIQA),
         'siqa': LINES(SIQA), 'rocstories': STORIES, 'rocstories_infill': STORIES, 'lambada': LAMBADA,
         'triviaqa': json.dumps(TRIVIA), 'squad': json.dumps(SQUAD),
         'humaneval_infill': LINES(HUMANEVAL), 'gsm8k': LINES(GSM8K)}
LABELS = {'piqa': '1\n0\n0\n', 'siqa': '1\n3\n2\n'}
FIRST = {
    'hellaswag': Choice('Removing ice: A man stands. Then he He is',
                        [' wrapping it.', ' eating.', ' gone.', ' skiing.'], 1),
    'winogrande': Choice('Ann thanked Bea because', [' Ann had helped.', ' Bea had helped.'], 1),
    'piqa': Choice('Question: open a jar\nAnswer:', [' twist it', ' sing to it'], 1),
    'siqa': Choice('Question: Ann fell. How is Ann?\nAnswer:', [' hurt', ' tall', ' old'], 0),
    'rocstories': Choice('Rick grew up. He, too, left. It rained. He came back.',
                         [' He is happy.', ' He is a shark.'], 0),
    'rocstories_infill': Blank('Rick grew up. He, too, left.', [' It rained.'],
                               ' He came back. He is happy.'),
    'lambada': Blank('the cat saw the', [' dog']),
    'triviaqa': Blank('Question: Who?\nAnswer:', [' The Beatles', ' Beatles'], '\n'),
    'squad': Blank('Rome is old.\nQuestion: What?\nAnswer:', [' Rome'], '\n'),
    'humaneval_infill': Blank('def f(x):\n', ['    y = x + 0\n'], '    return y\n',
                              dict(code='def check(g):\n    assert g(1) == 1\n', entry='f')),
    'gsm8k': Blank('What is 1 and 2?', [' It is <<1+2=3>>3.\n#### 3'])}


def write(folder, name):
    path = folder / f'{name}.jsonl'
    path.write_text(FILES[name])
    if name in LABELS:
        (folder / f'{name}-labels.lst').write_text(LABELS[name])
    return str(path)


@pytest.mark.parametrize('name', tasks.TASKS)
def test_an_official_file_becomes_items(name, tmp_path):
    found = tasks.load(name, write(tmp_path, name))
    assert found[0] == FIRST[name] and len(found) == 3


def test_a_line_of_json_may_hold_what_ends_lines_elsewhere():
    text = json.dumps(PIQA[0] | dict(goal='a\u2028b\x85c'), ensure_ascii=False) + '\n'
    assert items.piqa(text, '1')[0].context == 'Question: a\u2028b\x85c\nAnswer:'


def test_other_items_of_the_fixtures():
    read = lambda name: tasks.TASKS[name].read(FILES[name], *([LABELS[name]] if name in LABELS else []))
    contexts = [item.context for item in read('hellaswag')[1:]]
    assert contexts == ['Cooking: She cooks.', 'Cooking: She cooks. Then']
    assert [item.gold for item in read('hellaswag')] == [1, 0, 3]
    # at the beginning there is no space, and in quotes none
    late = ' is late, so Bea waits for Ann.'
    assert read('winogrande')[1] == Choice('', ['Ann' + late, 'Bea' + late], 0)
    assert read('winogrande')[2] == Choice('The "', ['cup" fell.', 'jug" fell.'], 0)
    assert [item.gold for item in read('siqa')] == [0, 2, 1]
    assert [item.gold for item in read('piqa')] == [1, 0, 0]
    assert read('rocstories')[1].gold == 1 and read('rocstories_infill')[1].after == ' D. E2.'
    assert [item.answers for item in read('lambada')] == [[' dog'], [' did'], [' house']]


# ---- tokens at a boundary ---------------------------------------------------------------------------------

def test_a_choice_is_what_differs_from_the_context():
    ids, start = tasks.locate(TOKENIZER, 'see the', ' big dog')
    assert TOKENIZER.decode(ids[:start]) == 'see the' and TOKENIZER.decode(ids[start:]) == ' big dog'


def test_a_token_across_the_border_belongs_to_the_choice():
    """'t' + 'he' is one token: the whole text has it, its parts have not."""
    ids, start = tasks.locate(TOKENIZER, 'see t', 'he dog')
    assert ids == TOKENIZER.encode('see the dog') and TOKENIZER.decode(ids[start:]) == ' the dog'


def test_a_choice_keeps_at_least_a_token():
    for context, choice in (('aaa', 'a'), ('', 'x'), ('a', '')):
        ids, start = tasks.locate(TOKENIZER, context, choice)
        assert 0 <= start < len(ids) and ids == TOKENIZER.encode(context + choice)


def test_a_border_in_the_middle_of_a_token_leaves_what_is_given_as_it_is():
    """A newline and the spaces behind it are one token of the whole; the line ends before the spaces."""
    tokenizer = vocabulary.Tokenizer(dict(kind='json', vocab_size=300, end=299,
                                          json=tokenizer_json([('Ċ', 'Ġ'), ('ĊĠ', 'Ġ'), ('ĊĠĠ', 'Ġ')])))
    item = Blank('def f(x):\n', ['    y = x\n'], '    return y\n')
    whole = item.before + item.answers[0] + item.after
    assert [tokenizer.piece(i) for i in tokenizer.encode(whole)].count('\n   ') == 2
    model = Writes(item.answers[0], tokenizer=tokenizer)
    text = tasks.fill(model, tokenizer, item, CPU, steps=64)
    assert item.before + text + item.after == whole
    given = [i for i in model.seen[0].tolist() if i != 300]
    assert tokenizer.decode(given) == item.before + item.after


def test_what_is_far_from_the_middle_is_cut_and_a_middle_that_is_too_long_refused():
    ids = list(range(10))
    assert tasks.cut_to(ids, 6, 8, 10) == (ids, 6, 8)
    assert tasks.cut_to(ids, 6, 8, 5) == (ids[5:], 1, 3)
    assert tasks.cut_to(ids, 1, 3, 5) == (ids[1:6], 0, 2)
    with pytest.raises(tasks.TooLong, match='5 tokens'):
        tasks.cut_to(ids, 2, 7, 4)


# ---- costs ------------------------------------------------------------------------------------------------

def net_of(module, **knobs):
    torch.manual_seed(0)
    config = module.Config(**dict(vocab_size=300, block_size=40, n_layer=1, n_head=2, n_embd=16) | knobs)
    net = module.Model(config).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net


ITEM = Choice('see the', [' big dog', ' bad', ' the end of the'], 1)


def test_the_twins_cost_is_the_sum_over_the_continuation_and_the_same_per_token():
    net = net_of(ar)
    found = tasks.costs(net, TOKENIZER, ITEM, 4, 0, CPU)
    for i, choice in enumerate(ITEM.choices):
        n, ids = len(TOKENIZER.encode('see the')), TOKENIZER.encode('see the' + choice)
        logp = net.logits(torch.tensor([ids])).log_softmax(-1)[0]
        want = -sum(logp[j, ids[j]].item() for j in range(n, len(ids)))
        assert found['nats'][i] == pytest.approx(want, abs=1e-4)
        assert found['nats/token'][i] == pytest.approx(want / (len(ids) - n), abs=1e-4)


@pytest.mark.parametrize('shift', [False, True])
def test_the_denoisers_cost_is_its_bound_given_the_context(shift):
    """Of one token there is nothing to draw; of more the mean over many draws is that of `nats`."""
    net = net_of(masked, shift=shift)
    one = Choice('see the', [' bad'[:2], ' the'], 0)
    found = tasks.costs(net, TOKENIZER, one, 3, 0, CPU)
    context = TOKENIZER.encode('see the')
    for i, choice in enumerate(one.choices):
        ids = torch.tensor([context + TOKENIZER.encode(choice)])
        logp = net.denoise(ids.where(torch.arange(ids.size(1)) < len(context), 300))[0, -1, ids[0, -1]]
        assert found['nats'][i] == pytest.approx(-logp.item(), abs=1e-4)
    found = tasks.costs(net, TOKENIZER, ITEM, 3000, 0, CPU)
    ids = torch.tensor([TOKENIZER.encode('see the big dog')])
    given = torch.arange(ids.size(1))[None] < len(context)
    torch.manual_seed(5)
    want = net.nats(ids.expand(3000, -1), given=given.expand(3000, -1))
    error = want.std().item() / 3000 ** 0.5
    assert abs(found['nats'][0] - want.mean().item()) < 6 * error  # fails once in 10^5


def test_equal_choices_get_equal_costs_and_a_cost_is_a_function_of_the_seed():
    net, item = net_of(masked), Choice('see the', [' big dog', ' big dog'], 0)
    a, b, c = (tasks.costs(net, TOKENIZER, item, 4, seed, CPU) for seed in (1, 1, 2))
    assert a == b != c and all(x == y for x, y in a.values())


def test_the_published_score_is_a_mean_over_levels_of_means_over_masked_tokens():
    net = net_of(masked)
    ids = torch.tensor([TOKENIZER.encode('see the big dog')])
    given = torch.arange(ids.size(1))[None] < 5
    noise, total = torch.rand(4, ids.size(1)), 0.0
    for t in range(4):
        hidden = [i for i in range(5, ids.size(1)) if noise[t, i] < (t + 1) / 4]
        xt = ids.clone()
        xt[0, hidden] = 300
        logp = net.denoise(xt)[0]
        total += sum(-logp[i, ids[0, i]].item() for i in hidden) / max(1, len(hidden)) / 4
    assert tasks.published_cost(net, ids, given, noise) == pytest.approx(total, abs=1e-4)


def test_a_model_that_knows_the_answer_scores_all_and_the_rule_takes_the_least():
    class Knows:
        bound, config = 'exact', ar.Config(vocab_size=300, block_size=99)

        def nats(self, x, given):
            return torch.tensor([0.0 if 'bad' in TOKENIZER.decode(x[0].tolist()) else 9.0])
    found, n = tasks.measure('piqa', [ITEM, ITEM], Knows(), TOKENIZER, CPU, 2, 0, {})
    assert found['nats'] == (1.0, 0.0) and n == 2
    assert tasks.measure('piqa', [ITEM], Knows(), TOKENIZER, CPU, 2, 0, {})[0]['nats'] == (1.0, 0.0)
    long = Choice('see', [' the' * 200, ' a'], 1)
    assert tasks.measure('piqa', [long, ITEM, long], Knows(), TOKENIZER, CPU, 2, 0, {})[1] == 1
    with pytest.raises(tasks.TooLong):
        tasks.measure('piqa', [long], Knows(), TOKENIZER, CPU, 2, 0, {})


# ---- blanks -----------------------------------------------------------------------------------------------

class Writes:
    """Writes `text` into the blanks, whatever they are; keeps the canvas that it was given."""
    config, mask_id = ar.Config(vocab_size=300, block_size=99), 300

    def __init__(self, text, bound='upper', tokenizer=TOKENIZER):
        self.ids, self.bound, self.seen = tokenizer.encode(text), bound, None

    def sample(self, xt, steps, **how):
        self.seen, self.steps = xt, steps
        new = xt.clone()
        where = (xt[0] == 300).nonzero()[:, 0]
        new[0, where] = torch.tensor((self.ids + [299] * len(where))[:len(where)])
        yield new


def test_a_denoiser_sees_both_sides_and_as_many_blanks_as_the_longest_answer_a_twin_what_is_before():
    item = Blank('see the', [' dog', ' big dog'], ' the end')
    model = Writes(' big dog')
    assert tasks.fill(model, TOKENIZER, item, CPU, steps=64) == ' big dog'
    assert TOKENIZER.decode(model.seen[0].tolist(), '_') == 'see the' + '_' * 7 + ' the end'
    assert model.steps == 7
    model = Writes(' big dog', 'exact')
    tasks.fill(model, TOKENIZER, item, CPU, steps=64)
    assert TOKENIZER.decode(model.seen[0].tolist(), '_') == 'see the' + '_' * 7


@pytest.mark.parametrize('name, text, want', [
    ('lambada', ' dog', {'accuracy': 1.0}), ('lambada', ' dot', {'accuracy': 0.0}),
    ('triviaqa', ' the beatles!\nand', {'EM': 1.0, 'F1': 1.0}),
    ('triviaqa', ' Beatles band', {'EM': 0.0, 'F1': pytest.approx(2 / 3)}),
    ('squad', ' a Rome', {'EM': 1.0, 'F1': 1.0}), ('squad', '', {'EM': 0.0, 'F1': 0.0}),
    ('humaneval_infill', '    y = x + 0', {'accuracy': 1.0}),
    ('humaneval_infill', '    y = x', {'accuracy': 0.0}),
    ('gsm8k', ' So it is\n#### 3', {'accuracy': 1.0, 'has ####': 1.0}),
    ('gsm8k', ' It is 3.', {'accuracy': 0.0, 'has ####': 0.0})])
def test_how_texts_are_graded(name, text, want):
    item = tasks.TASKS[name].read(FILES[name])[0]
    assert tasks.TASKS[name].grade(text, item) == want


def test_numbers_behind_the_marks_lose_their_commas():
    assert items.last_number('#### 1,200') == '1200' and items.last_number('#### 1 #### 7.') == '7'
    assert items.last_number('12') is None


def test_rouge_is_that_of_the_library():
    pytest.importorskip('rouge_score')
    found = items.rouge(' It rained again.', Blank('', [' It rained.']))
    assert found['ROUGE-1'] == pytest.approx(0.8) and found['ROUGE-2'] == pytest.approx(2 / 3)


def test_programs_run_only_in_a_process_of_their_own_with_a_time_limit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    item = tasks.TASKS['humaneval_infill'].read(FILES['humaneval_infill'])[1]
    assert tasks.passes('    y = 1 + x\n', item) and not tasks.passes('    y = x\n', item)
    assert not tasks.passes('    while True: pass\n', item, seconds=0.5)
    for leave in ('exit()', 'import os; os._exit(0)', 'raise SystemExit(3)'):  # before the tests are over
        assert not tasks.passes(f'    y = x + 1; {leave}\n', item)
    assert tasks.passes("    y = x + 1; open('left', 'w')\n", item) and not (tmp_path / 'left').exists()
    for line, right in (('# \0', False), ('# \ud800', False), ('# é', True)):
        assert tasks.passes(f'    y = x + 1  {line}\n', item) is right
    monkeypatch.setenv('HF_TOKEN', 'secret')
    assert tasks.passes("    import os; y = x + 1 + ('HF_TOKEN' in os.environ)\n", item)


@pytest.mark.skipif(sys.platform != 'linux', reason="other systems cannot limit another process's memory")
def test_a_program_that_asks_for_too_much_memory_does_not_pass():
    item = tasks.TASKS['humaneval_infill'].read(FILES['humaneval_infill'])[1]
    line = '    y = x + 1 + 0 * len(bytearray(2 ** 28))\n'
    assert tasks.passes(line, item) and not tasks.passes(line, item, memory=2 ** 27)


def test_what_a_program_has_started_ends_with_it(tmp_path):
    item = tasks.TASKS['humaneval_infill'].read(FILES['humaneval_infill'])[0]
    late = f"subprocess.Popen(['/bin/sh', '-c', 'sleep 1; touch {tmp_path}/late'])"
    assert tasks.passes(f'    import subprocess; {late}; y = x\n', item)
    time.sleep(1.5)
    assert not (tmp_path / 'late').exists()


def test_a_system_without_process_groups_runs_programs_too(monkeypatch):
    """Windows, as far as it can be had here: no os.killpg, no SIGKILL."""
    item = tasks.TASKS['humaneval_infill'].read(FILES['humaneval_infill'])[1]
    monkeypatch.delattr(items.os, 'killpg', raising=False)
    monkeypatch.delattr(items.signal, 'SIGKILL', raising=False)
    assert tasks.passes('    y = 1 + x\n', item)
    assert not tasks.passes('    while True: pass\n', item, seconds=0.5)


def sentencepiece_tokenizer(**more):
    """A tokenizer of 300 pieces that puts a space before every text."""
    import base64
    import io
    library = pytest.importorskip('sentencepiece')
    out = io.BytesIO()
    text = [' of the government and the states of the country', 'the government of the people',
            'in it: yes'] * 30
    library.SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=out, vocab_size=320,
                                       model_type='bpe', byte_fallback=True, minloglevel=2,
                                       hard_vocab_limit=False, **dict(
                                           normalization_rule_name='identity',
                                           remove_extra_whitespaces=False) | more)
    model = base64.b64encode(out.getvalue()).decode()
    return vocabulary.Tokenizer(dict(kind='sentencepiece', model=model, vocab_size=320, end=2, sep='\nA:'))


@pytest.mark.parametrize('lead', [True, False])
def test_a_part_of_a_text_is_cut_as_in_its_context(lead):
    """The library cuts the whole text; a part has no space before it that the text has not."""
    tokenizer = sentencepiece_tokenizer(add_dummy_prefix=lead)
    assert tokenizer.lead == ' ' * lead
    for before, part in (('the people', ' of the government'), ('in', ' it'), ('it: ', 'yes'), ('the', 're'),
                         ('of', '\nA:'), ('a', ''), ('the', ' '), ('the', '  of')):
        ids = tokenizer.encode_rest(part)
        assert tokenizer.decode(ids) == part
        whole = tokenizer.encode(before + part)
        if part.startswith(' ') and part.strip() and part[1] != ' ':
            assert whole == tokenizer.encode(before) + ids, (before, part)
    assert tokenizer.decode(tokenizer.sep) == '\nA:'
    thrifty = sentencepiece_tokenizer(add_dummy_prefix=lead, remove_extra_whitespaces=True)
    assert thrifty.decode(thrifty.encode_rest(' of the')) == ' of the'
    for text in ('the people', ' of the', '  two', 'ä 漢'):
        assert tokenizer.text(tokenizer.encode(text)) == text


def test_a_blank_has_as_many_tokens_as_the_answer_has_behind_the_text_before():
    tokenizer, seen = sentencepiece_tokenizer(), []
    word = ' government'
    whole = tokenizer.encode('the people of the' + word + ' and the states')

    class Oracle:  # a language model that knows how the text goes on
        bound, mask_id = 'exact', tokenizer.vocab_size

        class config:
            block_size = 64

        def sample(self, row, **how):
            n = int((row[0] != self.mask_id).sum())
            seen.append(row.size(1) - n)
            row = row.clone()
            row[0, n:] = torch.tensor(whole[n:row.size(1)])
            yield row
    item = Blank('the people of the', [word], ' and the states')
    assert tasks.fill(Oracle(), tokenizer, item, 'cpu', steps=64) == word and len(seen) == 1
    assert seen[0] == len(tokenizer.encode_rest(word)) == tasks.count_behind(tokenizer, item.before, word)
    assert tasks.count_behind(tokenizer, 'the gov', 'ernment') >= 1  # a token across the border


def test_a_template_and_a_suffix_get_no_space_that_they_have_not():
    import sample
    tokenizer = sentencepiece_tokenizer()
    config = sample.Config(template='the ___ of the___ and:___', hole=2)
    row = sample.make_canvas(config, '', tokenizer, 64).tolist()
    assert tokenizer.text(row) == 'the ░░ of the░░ and:░░'
    row = sample.make_canvas(sample.Config(suffix=' of it', length=20), 'the\nA:', tokenizer, 64).tolist()
    assert tokenizer.text(row).startswith('the\nA:░') and tokenizer.text(row).endswith('░ of it')
    again = sample.make_canvas(sample.Config(suffix=' of it', length=20), 'the', tokenizer, 64).tolist()
    assert row == again  # what stands before an answer is compared as text


def test_a_normaliser_that_takes_line_ends_away_does_not_put_spaces_in(mistake):
    """SentencePiece's default, nmt_nfkc: a line end is a space, and is nothing at the beginning."""
    tokenizer = sentencepiece_tokenizer(normalization_rule_name='nmt_nfkc', remove_extra_whitespaces=True)
    ids = tokenizer.encode('the gov') + tokenizer.encode_rest('ernment')
    assert tokenizer.text(ids) == 'the government'
    meta = tokenizer.meta | dict(sep=' ')
    assert 'is nothing in the tokens' in mistake(lambda argv: vocabulary.Tokenizer(meta))


def test_the_end_of_a_model_of_sentencepiece_and_the_space_before_its_texts_are_not_text():
    import sample
    tokenizer = sentencepiece_tokenizer()
    ids = tokenizer.encode('the people of')

    def end(row, stop):
        plain = vocabulary.Tokenizer({k: v for k, v in tokenizer.meta.items() if k != 'sep'})
        stops = ends.of(plain, stop)
        return ends.ending(row, 0, tokenizer.vocab_size, stops, 0.0)
    assert end(ids, ' the') == 0 and tokenizer.text(ids[:end(ids, 'the')]) == 'the'
    assert end([*ids, 2, *ids], '</s>') == len(ids) + 1


def test_a_piece_that_ends_answers_cannot_stand_in_them(mistake):
    from theirs import tokenizer_json
    from data.gsm8k import prepare
    tokenizer = vocabulary.Tokenizer(dict(kind='json', json=tokenizer_json(), vocab_size=300, end=101))  # 'e'
    assert tokenizer.n_bytes(tokenizer.encode('tele e')) == 6
    assert 'no mark of its own' in mistake(lambda argv: prepare.stream([('a', 'seed')], tokenizer))


@pytest.mark.parametrize('answer', ['', None])
def test_an_item_without_an_answer_is_refused(answer, tmp_path, mistake):
    item = dict(prompt='a', suffix='b', test='', entry_point='f', canonical_solution=answer)
    (tmp_path / 'f.jsonl').write_text(json.dumps(item))
    assert 'item 1 has no answer' in mistake(lambda argv: tasks.load('humaneval_infill',
                                                                     str(tmp_path / 'f.jsonl')))


def test_a_program_that_cannot_be_written_down_does_not_pass():
    item = tasks.TASKS['humaneval_infill'].read(FILES['humaneval_infill'])[1]
    assert not tasks.passes('    y = 1 + x #\0\n', item) and not tasks.passes('    y = 1 + x #\ud800\n', item)


def test_the_name_of_a_mask_in_a_text_is_text():
    from theirs import tokenizer_json
    source = tokenizer_json()
    source['added_tokens'] = source['added_tokens'] + [dict(id=290 + i, content=name, special=True)
                                                       for i, name in enumerate(('[MASK]', '<|mdm_mask|>'))]
    for tokenizer in (vocabulary.Tokenizer(dict(kind='json', json=source, vocab_size=300, end=299)),
                      sentencepiece_tokenizer(), vocabulary.Tokenizer(dict(kind='byte'))):
        for text in ('[MASK]', '<|mdm_mask|>', 'a [MASK] b', '<unk>', '</s>', '░'):
            ids = tokenizer.encode(text)
            special = {0, 1, 2} if tokenizer.lead else {290, 291, 299, 300}
            assert tokenizer.text(ids) == text and not special & set(ids)


def test_nothing_is_executed_without_the_flag(monkeypatch):
    calls = []
    monkeypatch.setattr(tasks, 'passes', lambda text, item: calls.append(text) or True)
    three = tasks.TASKS['humaneval_infill'].read(FILES['humaneval_infill'])
    for execute in (False, True):
        found, _ = tasks.measure('humaneval_infill', three, Writes('    y = x + 0\n'), TOKENIZER, CPU, 1, 0,
                                 dict(steps=4), execute)
        assert ('passes' in found) == execute == bool(calls)
    assert found['accuracy'][0] == pytest.approx(1 / 3)


# ---- the script -------------------------------------------------------------------------------------------

@pytest.fixture
def models(tmp_path, monkeypatch):
    """theirs: a random LLaMA; out-m: a denoiser of its shape."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / 'theirs', 'llama', max_position_embeddings=200)
    net = net_of(masked, shift=True, block_size=200)
    common.save(dict(objective='masked', config=dataclasses.asdict(net.config), run=dict(dataset=''),
                     tokenizer=TOKENIZER.meta, model=net.state_dict(), ema=net.state_dict(), iter=0,
                     tokens=0),
                'out-m/last.pt')
    return tmp_path


ROUGE = importlib.util.find_spec('rouge_score')
ZERO_SHOT = [name for name in tasks.TASKS if name != 'gsm8k']


@pytest.mark.parametrize('out_dir', ['theirs', 'out-m'])
def test_all_tasks_run_for_both_kinds_of_model_none_changes_the_next(models, out_dir, capsys, monkeypatch):
    """Each row of a run of all tasks is that of a run of its own."""
    names = [name for name in ZERO_SHOT if name != 'rocstories_infill' or ROUGE]
    paths = {name: write(models, name) for name in names}
    own = tasks.load
    monkeypatch.setattr(tasks, 'load', lambda name, path='': own(name, paths[name]))
    base = [f'--out_dir={out_dir}', '--draws=4', '--device=cpu']
    tasks.main([*base, '--task=' + ','.join(names)])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == len(names)
    for name in (names[-1], names[0], 'lambada'):
        tasks.main([*base, f'--task={name}'])
        assert capsys.readouterr().out.splitlines()[2] == rows[names.index(name)]


def test_mistakes_end_in_one_line(models, mistake):
    run = lambda *flags: mistake(tasks.main, '--out_dir=out-m', *flags)
    assert 'hellaswag' in run('--task=hellaswagg') and 'is not one of' in run('--task=')
    assert '--data=' in run('--task=rocstories') and 'cs.rochester.edu' in run('--task=rocstories')
    assert 'nowhere' in run('--task=lambada', '--data=nowhere')
    (models / 'bad').write_text('{"goal": 1}')
    assert 'official format' in run('--task=hellaswag', '--data=bad')
    (models / 'short-labels.lst').write_text('1\n')
    (models / 'short.jsonl').write_text(FILES['piqa'])
    assert 'official format' in run('--task=piqa', '--data=short.jsonl')
    (models / 'gold-labels.lst').write_text('0\n3\n1\n')  # from 0, as they should not be
    (models / 'gold.jsonl').write_text(FILES['siqa'])
    assert 'item 1' in run('--task=siqa', '--data=gold.jsonl')
    (models / 'bare.csv').write_bytes(STORIES.replace('\n', '\r').encode() * 2)
    assert 'official format' in run('--task=rocstories', '--data=bare.csv')
    assert 'gamma' in run('--task=lambada', f"--data={write(models, 'lambada')}", '--gamma=3')
    assert 'one task' in run('--task=lambada,piqa', '--data=short.jsonl')
    assert 'longer than the model' in run('--task=rocstories', f"--data={write(models, 'rocstories')}",
                                          '--block_size=1')
    assert 'block_size=300' in run('--task=lambada', '--block_size=300')
