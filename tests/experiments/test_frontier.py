"""The frontier: which runs there are, their plan, their report; nothing of it long."""

import dataclasses
import json
import re

import numpy as np
import pytest

from experiments.common import configuration
from experiments.common.ledger import Job, Ledger, quality
from experiments.common.shards import Shard
from experiments.methods import registry
from experiments.methods.compared import METHODS, config_of
from experiments.report import provenance
from experiments.studies.frontier import __main__ as program
from experiments.studies.frontier import cost, look, plan, protocol, report
from experiments.studies.frontier.protocol import Unit
from experiments.studies.frontier.task import EFFORTS, Effort
from experiments.studies.frontier.tasks import CANDIDATES, CHOSEN, NOISY, TASKS
from experiments.studies.proof import gpu, widths
from experiments.training import many, plans
from experiments.training.loop import train
from tests.experiments.small import TASK

TINY = (
    ('data.train', 96),
    ('batch_size', 48),
    ('epochs', 2),
    ('models.mlp.width', 4),
    ('models.mlp.depth', 1),
)


@pytest.fixture
def task(monkeypatch):
    """A task of four steps in the place of a short one."""
    effort = Effort((600,), (700, 701), True)
    monkeypatch.setitem(EFFORTS, 'short', effort)
    small = dataclasses.replace(
        TASKS['mlp_200'],
        radii=(0.5, 1.0, 2.0),
        rates=(0.1,),
        sgd_rates=(0.1, 0.01),
        changes=TINY,
    )
    monkeypatch.setitem(TASKS, 'mlp_200', small)
    return small


def told(job: Job) -> dict:
    """What a run would give: larger radii are better, and every method a bit."""
    notes = job.notes
    bonus = {'sgd': 0.0, 'sam': 0.05}.get(notes['method'], 0.049)
    value = 0.8 + bonus + 0.001 * notes['rho'] + 1e-4 * (notes['seed'] % 7)
    result = {'accuracy': value, 'loss': 1 - value}
    splits = ('validation', 'test') if job.tests else ('validation',)
    return {
        **notes,
        **dict.fromkeys(splits, result),
        'training': result,
        'seconds': 1.0,
        'settings': many.digest(job.config),
    }


class Told:
    """Makes no runs, but their lines."""

    made: list[str]

    def __init__(self, ledger, *_, **__):
        self._ledger = ledger

    def work(self, jobs, **_):
        while todo := [job for job in jobs() if job.key not in self._ledger]:
            for job in todo:
                self.made.append(job.key)
                self._ledger.add(job.key, told(job))


@pytest.mark.parametrize('name', list(TASKS))
def test_every_task_is_complete(name):
    task = TASKS[name]
    config = task.config()
    assert config.batch_size % 8 == 0  # A part of an eighth is possible.
    assert config.data.train >= config.batch_size
    for method in task.methods:
        run = config_of(config, method, 0.1, 0.2, seed=3)
        configuration.check(run)
        made = registry.create(method, run.methods[method], run.optimizer, TASK)
        assert made.tx
        rates = registry.hyperparameters(run)
        assert rates == {'learning_rate': 0.2} | (
            {'rho': 0.1} if method != 'sgd' else {}
        )
    seeds = task.work
    assert not {*seeds.tuning, *plan.SEEDS} & set(seeds.seeds)


def test_the_tasks_are_those_of_the_plan():
    assert set(NOISY) <= set(CHOSEN) <= set(TASKS)
    assert len({*CHOSEN} & {*CANDIDATES}) >= 3
    assert set(TASKS['cifar'].methods) == {
        name for name, method in METHODS.items() if method.everywhere
    }


def test_radii_are_centred_on_those_of_sam(task):
    unit = lambda method: Unit('mlp_200', task, method)
    assert unit('sam').pairs(None) == [(0.5, 0.1), (1.0, 0.1), (2.0, 0.1)]
    assert unit('slice_8_3').pairs(None) == []
    assert unit('slice_8_3').pairs((2.0, 0.1))[2] == (2.0, 0.1)
    assert unit('msam').pairs((0.5, 0.1)) == [
        (rho, 0.1) for rho in (0.5, 1.0, 2.0, 4.0, 8.0)
    ]


def test_settings_are_chosen_before_they_are_tested(task, tmp_path):
    ledger = Ledger(tmp_path / 'runs.jsonl')
    next_jobs = lambda: protocol.jobs(ledger, {'mlp_200': task}, METHODS)
    first = next_jobs()
    # SGD and SAM alone; where the others look depends on SAM.
    assert {job.notes['method'] for job in first} == {'sgd', 'sam'}
    assert not any(job.tests for job in first)
    for job in first:
        ledger.add(job.key, told(job))
    second = [job for job in next_jobs() if job.key not in ledger]
    reported = [job for job in second if job.tests]
    assert {job.notes['seed'] for job in reported} == {700, 701}
    assert {job.notes['rho'] for job in reported} == {0.0, 2.0}
    assert 'test' not in ledger[first[0].key]
    everything = protocol.jobs(ledger, {'mlp_200': task}, METHODS, only_tuning=True)
    assert not any(job.tests for job in everything)
    # A loss that is not finite is worst.
    assert quality({'test': {'loss': None}}, 'test', 'loss') == -np.inf
    assert quality({'test': {'loss': 2.0}}, 'test', 'loss') == -2


def test_pieces_of_work_are_shared_out_by_their_length():
    hours = {'a': 3.0, 'b': 2.0, 'c': 2.0, 'd': 0.5}
    assert plans.share_out(hours, hours.__getitem__, 2) == [['a', 'd'], ['b', 'c']]


def test_plan_runs_and_report(task, tmp_path, monkeypatch):
    del task
    monkeypatch.setattr(program, 'Maker', Told)
    Told.made = []
    tasks = {name: TASKS[name] for name in ('mlp_200', 'mlp_600')}
    shard = Shard(0, 1)
    run = lambda **k: program.run(tmp_path, tmp_path, tasks, tuple(METHODS), shard, **k)
    with pytest.raises(configuration.ConfigError, match='make it with --plan'):
        run()
    ledger = Ledger(tmp_path / 'probes.jsonl')
    for job in plan.probes(tasks):
        line = {'seconds': 2.0, 'steps': 100, 'wall': 2.5}
        # The first one compiles.
        ledger.add(job.key, {**line, 'wall': 7.5 if '690' in job.key else 2.5})
    made = plan.make(ledger, tasks, METHODS)
    seconds = made['tasks']['mlp_200']['seconds']['two']
    assert seconds == {'run': pytest.approx(4 * 0.02 + 0.5), 'setup': 5.0}
    sam = made['tasks']['mlp_200']['methods']['sam']
    assert (sam['tuning_runs'], sam['reported_runs']) == (3, 2)
    assert sam['seconds'] == pytest.approx(5 + 5 * seconds['run'])
    plan.write(made, tmp_path)
    assert '| all |' in (tmp_path / 'plan.md').read_text()

    long = json.loads((tmp_path / plans.PLAN).read_text())
    long['tasks']['mlp_200']['hours'] = 18.0  # Of one core.
    (tmp_path / plans.PLAN).write_text(json.dumps(long))
    with pytest.raises(configuration.ConfigError, match=r'take 9\.\d hours'):
        run()
    run(over=True)
    count = len(Told.made)
    planned = sum(
        row['tuning_runs'] + row['reported_runs']
        for task in made['tasks'].values()
        for row in task['methods'].values()
    )
    assert count == planned
    run(over=True)
    assert len(Told.made) == count
    with pytest.raises(configuration.ConfigError, match=r'must plan .* on clean_600'):
        program.run(
            tmp_path,
            tmp_path,
            {'clean_600': TASKS['clean_600']},
            tuple(METHODS),
            shard,
            over=True,
        )

    report.write(tmp_path)
    assert json.loads((tmp_path / 'decision.json').read_text())['verdict'] == (
        'not decided'  # Times are missing.
    )
    costs = {
        name: {'times_sgd': 1 + 0.1 * place, 'memory_times_sgd': 1.5}
        for place, name in enumerate(METHODS)
    }
    networks = {name: {'title': name, 'methods': costs} for name in ('a', 'b')}
    measured = {'networks': networks, **provenance.environment()}
    (tmp_path / report.COSTS).write_text(json.dumps(measured))
    table, decided, figure, gains = report.write(tmp_path)
    found = json.loads(decided.read_text())
    assert found['recommended'] == 'steady_03'
    assert [*report.by_cost(found)][:2] == ['sgd', 'sam']
    assert found['references']['sam']['minus_sam']['mean'] == 0
    assert found['references']['sgd']['kept'] == 0
    assert 'Decision: recommended: steady vSAM, η = 0.3' in table.read_text()
    assert figure.read_bytes().startswith(b'\x89PNG')
    assert '| steady vSAM, η = 0.3 | 1.20 | 1.50 |' in gains.read_text()


def test_what_sam_gains_on_text_is_told_in_points_and_bits(task, tmp_path, monkeypatch):
    of_text = dataclasses.replace(task, judge='loss')
    monkeypatch.setitem(TASKS, 'mlp_200', of_text)
    ledger, methods = Ledger(tmp_path / 'runs.jsonl'), ('sgd', 'sam')
    for _ in range(2):  # What is reported is known when the settings are.
        for job in protocol.jobs(ledger, {'mlp_200': of_text}, methods):
            if job.key not in ledger:
                ledger.add(job.key, told(job))
    accuracies = {
        m: protocol.accuracies(ledger, Unit('mlp_200', of_text, m)) for m in methods
    }
    lacking = {'sgd': None, 'sam': [0.5]}
    _, [row] = report.rows_of_gains({'mlp_200': accuracies, 'vit_600': lacking}, ledger)
    assert row[-2:] == ['+5.2 [+5.2, +5.2]', '−0.075 [−0.075, −0.075]']
    sam = protocol.reported(ledger, Unit('mlp_200', of_text, 'sam'))
    assert sam
    sam[0]['test']['loss'] = None  # It was not finite.
    _, [row] = report.rows_of_gains({'mlp_200': accuracies}, ledger)
    assert row[-2:] == ['+5.2 [+5.2, +5.2]', '–']


def test_costs_are_geometric_means_over_networks():
    networks = {
        'a': {'methods': {'sgd': {'x': 1.0}, 'sam': {'x': 2.0}, 'msam': {'x': 1.0}}},
        'b': {'methods': {'sgd': {'x': 1.0}, 'sam': {'x': 1.5}}},
    }
    assert report.relative(networks, 'x') == {'sgd': 1.0, 'sam': pytest.approx(3**0.5)}
    assert report.relative({}, 'x') == {}


def test_a_look_has_fewer_runs_than_the_study():
    found = look.look_of(CANDIDATES['cifar_2000'], epochs=0.1)
    assert found.config().epochs == 4
    assert sum(sum(protocol.count(found, m)[1:]) for m in look.METHODS) == 13


@pytest.mark.slow
def test_runs_of_a_method_share_a_program_and_its_results(task, tmp_path):
    ledger = Ledger(tmp_path / 'runs.jsonl')
    maker = many.Maker(ledger, tmp_path / 'runs', train)
    unit = Unit('mlp_200', task, 'slice_8_3')
    jobs = [unit.job(pair, 600, tests=True) for pair in ((0.5, 0.1), (1.0, 0.02))]
    maker.work(lambda: jobs, total=2, title='two')
    (shared,) = maker._programs.values()
    first, second = shared.step.compile_seconds.values()
    assert ledger[jobs[1].key]['compile'] == pytest.approx(first + second, rel=1e-5)
    alone = train(jobs[1].config, tmp_path / 'alone')
    line = ledger[jobs[1].key]
    np.testing.assert_allclose(
        line['test']['loss'], alone['log'][-1]['test_loss'], 1e-4
    )
    assert ledger[jobs[0].key]['test']['loss'] != line['test']['loss']
    assert not (tmp_path / 'runs' / jobs[1].key).exists()
    # What is there with other settings is not taken for it.
    other = configuration.with_values(jobs[0].config, {'epochs': 1})
    wrong = dataclasses.replace(jobs[0], config=other)
    with pytest.raises(configuration.ConfigError, match='with other settings'):
        maker.work(lambda: [wrong], total=1, title='one')


@pytest.mark.slow
def test_costs_of_a_network_in_a_few_steps(task, monkeypatch):
    monkeypatch.setattr(cost, 'CHUNK', 3)
    network = cost.Network('tiny', task.config, (0.5, 0.1), 6)
    rounds = []
    found = cost.measure(network, ('sgd', 'slice_8_3'), 2, lambda: rounds.append(1))
    assert found['steps'] == 6
    assert len(rounds) == 2 * found['steps'] / cost.CHUNK
    row = found['methods']['slice_8_3']
    assert row['sampled'] == pytest.approx(2 / 6)
    assert row['memory_times_sgd'] > 1
    assert found['methods']['sgd']['times_sgd'] == 1
    header, rows = cost.rows_of({'networks': {'tiny': found}})
    assert {len(row) for row in rows} == {len(header)}


@pytest.mark.parametrize(
    ('main', 'arguments', 'said'),
    [
        (look.main, ['--output=x', '--seeds=0'], "--seeds: .* at least 1, got '0'"),
        (look.main, ['--output=x', '--epochs=nan'], "--epochs: .* above 0, got 'nan'"),
        (look.main, ['--output=x', '--tasks=no'], '--tasks: no: there are'),
        (cost.main, ['--repeats=1.5'], "--repeats: .* at least 1, got '1.5'"),
        (widths.main, ['--widths=8'], "--widths: must be two widths, got '8'"),
        (widths.main, ['--widths=8,x'], "--widths: .* at least 1, got 'x'"),
        (gpu.main, ['--minutes=-1'], "--minutes: .* above 0, got '-1'"),
        (gpu.main, ['--tiny', '--items=no'], '--items=no: none begins so; there are'),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    main, arguments, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert re.search(said, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []
