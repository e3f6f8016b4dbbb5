"""Files of results that several processes add to."""

from experiments.common.ledger import Ledger


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
    ledger = Ledger(path)
    assert 'b' not in ledger
    ledger.add('c', {'value': 3})
    again = Ledger(path)
    assert [line['key'] for line in again] == ['a', 'c']
