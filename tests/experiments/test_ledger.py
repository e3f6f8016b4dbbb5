"""Files of results that several processes add to."""

from experiments.common.ledger import Ledger
from experiments.report import provenance


def test_lines_of_several_are_kept_and_read_again(tmp_path):
    path = tmp_path / 'results' / 'runs.jsonl'
    one, two = Ledger(path), Ledger(path)
    one.add('a', {'value': 1 / 3, 'loss': float('nan')})
    two.add('b', {'value': 2})
    assert 'b' not in one
    one.reload()
    assert one['b'] == {'key': 'b', 'value': 2}
    assert one['a'] == {'key': 'a', 'value': 0.3333333, 'loss': None}
    assert (len(one), [line['key'] for line in one]) == (2, ['a', 'b'])
    one.add('b', {'value': 3})
    assert Ledger(path)['b']['value'] == 3


def test_a_line_that_was_cut_short_is_as_if_it_were_not_there(tmp_path):
    path = tmp_path / 'runs.jsonl'
    Ledger(path).add('a', {'value': 1})
    with path.open('a') as file:
        file.write('{"key": "b", "val')
    with path.open('ab') as file:
        file.write('"η'.encode()[:-1])  # Half of a letter.
    ledger = Ledger(path)
    assert 'b' not in ledger
    ledger.add('c', {'value': 3})
    again = Ledger(path)
    assert [line['key'] for line in again] == ['a', 'c']


def test_what_lines_were_made_on_is_counted_where_it_differs():
    of = lambda *places: provenance.made_on({'on': x} if x else {} for x in places)
    assert of('a', 'a') == 'Made on a.'
    assert of('b', None, 'a', 'b') == (
        'Made on b (2 of 4); a (1 of 4); not recorded (1 of 4).'
    )
    nothing = 'What it was made on is not recorded.'
    assert of() == of(None, None) == nothing
    assert provenance.made_on([provenance.environment()]).startswith('Made on ')
